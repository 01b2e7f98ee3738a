"""The loss against transformers' and against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from moss_train.model.loss import LossOptions, find_targets, weighted_loss
from tests.torchrun import run_ranks
from tests.workers.loss import KERNELS, OPTIONS, STATE_WEIGHTS, batch, gradient, hits

SILENCE, VOCAB = 11, 50
pytestmark = pytest.mark.usefixtures("groups")


def random_batch(seed: int) -> tuple[Tensor, Tensor]:
    """Logits `[B, S, V]` and labels with ignored and silent positions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, (3, 20), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = SILENCE
    return torch.randn(3, 20, VOCAB, generator=generator), labels


def our_loss(logits: Tensor, labels: Tensor, weight: float, total: float | None = None) -> Tensor:
    """As the decoder computes it: the rows packed, only the loss positions."""
    targets = find_targets(
        labels.flatten(), [labels.shape[1]] * len(labels), LossOptions(SILENCE, weight)
    )
    selected = logits.flatten(0, 1)[targets.positions][:, None]
    total = total or float(targets.count)
    assert dist.group.WORLD is not None
    return weighted_loss(selected, targets, torch.tensor(total), dist.group.WORLD)


def test_without_silence_weight_it_is_transformers_loss():
    logits, labels = random_batch(1)
    expected = ForCausalLMLoss(logits, labels, VOCAB)
    torch.testing.assert_close(our_loss(logits, labels, 1.0), expected, rtol=1e-6, atol=1e-6)


def test_silence_weighs_less_and_counts_whole():
    logits, labels = random_batch(2)
    wanted = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), wanted, ignore_index=-100, reduction="none"
    )
    weights = torch.where(wanted == SILENCE, 0.1, 1.0).double()
    expected = (losses * weights).sum() / (wanted != -100).sum()
    assert our_loss(logits, labels, 0.1).item() == pytest.approx(expected.item(), rel=1e-6)


def test_microbatches_add_up_to_the_loss_of_the_whole():
    logits, labels = random_batch(3)
    total = float((labels[:, 1:] != -100).sum())
    parts = [our_loss(logits[n : n + 1], labels[n : n + 1], 0.1, total) for n in range(3)]
    assert torch.stack(parts).sum().item() == pytest.approx(
        our_loss(logits, labels, 0.1).item(), rel=1e-6
    )


def test_a_microbatch_without_labels_adds_nothing():
    logits = torch.randn(2, 6, VOCAB, requires_grad=True)
    labels = torch.full((2, 6), -100)
    labels[:, 0] = 3  # no loss position: nothing comes before it
    loss = our_loss(logits, labels, 0.1, total=7.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two tensor ranks make of the batch."""
    return run_ranks("tests/workers/loss.py", 2, out=tmp_path_factory.mktemp("loss"))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_form_of_the_loss_is_that_of_fp64(name: str, ranks: int, kernel: str, request):
    options = OPTIONS[name]
    logits, tokens = batch()
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        exact, tokens, reduction="none", label_smoothing=options.label_smoothing
    )
    losses = losses + options.z_loss * exact.exp().sum(1).log() ** 2
    weights = torch.where(tokens == options.silence_id, 0.1, 1.0).double()
    if options.focal_gamma is not None:  # speech begins behind silence
        begins = torch.tensor([False, *(tokens[:-1] == 11)]) & (tokens != 11)
        a = torch.where(begins, STATE_WEIGHTS[2], STATE_WEIGHTS[1]).double()
        p = exact.softmax(1).gather(1, tokens[:, None])[:, 0]
        weights = torch.where(begins | (tokens == 11), a * (1 - p) ** 2, 1.0)
    expected = (losses * weights).sum() / 7
    expected.backward()
    if ranks == 1:
        assert dist.group.WORLD is not None
        loss, grad = gradient(logits, tokens, options, dist.group.WORLD, KERNELS[kernel])
    else:
        found = [request.getfixturevalue("sharded").load(name + kernel, rank) for rank in range(2)]
        assert found[0][0] == found[1][0]
        loss, grad = found[0][0], torch.cat([part for _, part in found], dim=1)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert exact.grad is not None
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_hits_are_the_labels_that_are_the_likeliest_of_the_whole_vocabulary(sharded):
    logits, tokens = batch()
    logits[::2].scatter_(1, tokens[::2, None], 100.0)
    expected = int((logits.argmax(1) == tokens).sum())
    assert 0 < expected < len(tokens)
    assert dist.group.WORLD is not None
    assert hits(*batch(), dist.group.WORLD) == expected
    assert [sharded.load("hits", rank) for rank in range(2)] == [expected] * 2
