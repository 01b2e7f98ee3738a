"""The loss `state_balanced` against equation 2 of its source, label by label in fp64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch
from data_pipeline.prompts import PromptBuilder
from data_pipeline.schema import Message
from data_pipeline.tokens import SpecialTokens, build_toy_tokenizer, load_tokenizer
from moss_train.model.states import BEGIN, SILENCE, WORD, label_states
from moss_train.parallel.packing import Bounds
from tests.workers.matrix import microbatches

SILENT, IMAGE = 11, 512  # of workers/matrix.py


def state_of(tokens: list[int], labels: list[int], at: int) -> int:
    """The state of a label of a stream, from what its reader would have seen before it."""
    if labels[at] == SILENT:
        return SILENCE
    before = next(i for i in range(at - 1, -1, -1) if tokens[i] != IMAGE)
    return BEGIN if labels[before] in (SILENT, -100) else WORD


def equation_2(rows: list[tuple[Tensor, list[int], list[int]]], gamma: float) -> float:
    """Of (logits, tokens, labels) of each sequence: sum of w x cross entropy / labels."""
    found = []
    for logits, tokens, labels in rows:
        stream = SILENT in labels
        for at in range(1, len(labels)):
            if labels[at] != -100:
                log_p = logits[at - 1].double().log_softmax(0)[labels[at]].item()
                found.append((state_of(tokens, labels, at) if stream else WORD, log_p))
    n = Counter(state for state, _ in found)
    total = 0.0
    for state, log_p in found:
        a = (n[SILENCE] + n[BEGIN]) / (2 * n[state])
        p = torch.tensor(log_p).exp().item()
        total -= log_p * (1.0 if state == WORD else a * (1 - p) ** gamma)
    assert n[BEGIN]
    assert n[SILENCE]
    return total / len(found)


def balanced_step(groups: Any, gamma: float) -> Any:
    from moss_train.config import Config, LossConfig, ParallelConfig, TrainerConfig
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model.moss_video import MossVideo
    from moss_train.train.guard import Guard
    from moss_train.train.optimizer import make_train_state
    from moss_train.train.param_groups import freeze
    from moss_train.train.step import TrainStep
    from tests.workers.matrix import small_model

    config = Config(model=small_model("fp32"), trainer=TrainerConfig(steps=9))
    config.loss = LossConfig("state_balanced", gamma)
    model = MossVideo(config.model, ParallelConfig(), groups)
    fill(model, random_reader(config.model, seed=8))
    state = make_train_state(model, config, freeze(model, ["*"]))
    return TrainStep(config, model, state, silence_id=SILENT, guard=Guard(None, [], 0))


def quiet(batch: MicroBatch) -> MicroBatch:
    """The same without a label of silence: a chat."""
    return replace(batch, labels=batch.labels.masked_fill(batch.labels == SILENT, -100))


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_a_step_has_the_loss_of_the_equation(groups, gamma):
    from moss_train.parallel.distribute import read_step
    from moss_train.parallel.schedule import run_logits

    step = balanced_step(groups, gamma)
    samples = list(islice(microbatches("mixed", 0, 4, 1), 6))
    samples[1::3] = [quiet(sample) for sample in samples[1::3]]
    bounds, shape = Bounds(2), (1, 3, 56, 56)
    batch = read_step(iter(samples), 6, bounds, 8, shape, groups, 1)
    with torch.no_grad():
        plan = step.prepare(batch, step.loss)
        logits = run_logits(step.state.chunks, plan.inputs)
    rows = []
    for one, own in zip(batch.microbatches, logits, strict=True):
        parts = [t[: sum(one.lengths)].split(one.lengths) for t in (own, one.tokens, one.labels)]
        rows += [(x, t.tolist(), la.tolist()) for x, t, la in zip(*parts, strict=True)]
    assert len(rows) == 6
    (loss, weighted), _ = step.forward_backward(batch)
    assert loss.item() == pytest.approx(equation_2(rows, gamma), rel=1e-6)
    labels = [
        (x[at - 1], la[at]) for x, _, la in rows for at in range(1, len(la)) if la[at] != -100
    ]
    plain = -sum(x.double().log_softmax(0)[label].item() for x, label in labels) / len(labels)
    assert weighted.item() == pytest.approx(plain, rel=1e-6)  # stage.silence_weight is 1


def test_a_batch_of_chats_has_the_loss_of_chats(groups):
    from moss_train.parallel.distribute import read_step

    step = balanced_step(groups, 2.0)
    samples = [quiet(sample) for sample in islice(microbatches("mixed", 0, 4, 1), 2)]
    batch = read_step(iter(samples), 2, Bounds(), 8, (1, 3, 56, 56), groups, 1)
    (loss, weighted), _ = step.forward_backward(batch)
    assert loss.item() == pytest.approx(weighted.item(), rel=1e-6)


def test_who_begins_to_speak_in_a_conversation(tmp_path):
    """By the words of a stream: after silence, after a question that interrupts, not after a frame
    that lands between two words, nor after a turn that is context alone."""
    told = "<|silence|><|image|>one two<|image|>three<|silence|><|image|><|silence|><|image|>four"
    messages = [
        Message("user", ""),
        Message("assistant", told),
        Message("user", "and now?"),
        Message("assistant", "five<|image|><|silence|><|image|>six<|silence|>"),
        Message("user", "say nothing of this"),
        Message("assistant", "seven<|image|>", learn=False),
        Message("user", "go on"),
        Message("assistant", "eight"),
    ]
    tokenizer = load_tokenizer(build_toy_tokenizer(tmp_path, ["one two three four five six"]))
    special = SpecialTokens.from_tokenizer(tokenizer)
    builder = PromptBuilder(tokenizer, special)
    prompt = builder.build(messages, [1] * 7, form="realtime", sequence_length=400)
    labels = torch.tensor(prompt.labels)
    positions = torch.tensor(prompt.frame_positions)
    states = label_states(labels, [len(labels)], positions, special.silence)
    begun = [tokenizer.decode(prompt.tokens[at:]) for at in (states == BEGIN).nonzero()[:, 0]]
    words = ("one", "four", "five", "six", "eight")
    assert len(begun) == len(words)
    assert all(text.startswith(word) for text, word in zip(begun, words, strict=True))
    assert (states == SILENCE).sum() == (labels == special.silence).sum() == 5
