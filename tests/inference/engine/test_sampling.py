"""Sampling against transformers' own processors, and draws against their probabilities."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.engine.sampling import (
    DRAWS,
    Draw,
    Sampler,
    Sampling,
    bytes_of_slot,
    draw_of,
    uniform,
)

CPU = torch.device("cpu")
SILENCE = 3


def sampler_of(*settings: Sampling, vocabulary: int = 40) -> Sampler:
    sampler = Sampler(len(settings), vocabulary, SILENCE, CPU)
    for slot, sampling in enumerate(settings):
        sampler.open(slot, sampling)
    return sampler


def draws(sampler: Sampler, logits: torch.Tensor, count: int, slot: int = 0) -> torch.Tensor:
    """Tokens at `count` positions from the same logits."""
    rows = logits.expand(count, -1).clone()
    slots = torch.full((count,), slot)
    return sampler(rows, slots, torch.arange(count), DRAWS[-1])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (1.0, 8, 0.8)]
)
def test_draws_have_the_probabilities_of_transformers(temperature, top_k, top_p) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    wanted = scores.softmax(-1)[0]
    count = 20000
    sampler = sampler_of(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=4))
    got = draws(sampler, logits, count).bincount(minlength=40) / count
    assert (got[wanted == 0] == 0).all()
    # Five standard deviations of a frequency.
    assert ((got - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"), [(0.1, 0, 1.0), (0.02, 6, 1.0), (0.3, 0, 0.7), (1.0, 0, 1.0)]
)
def test_min_p_is_that_of_transformers_before_top_k_and_top_p(min_p, top_k, top_p) -> None:
    """In vLLM's order; transformers has it last, where top_p counts what it takes away."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    scores = MinPLogitsWarper(min_p)(None, TemperatureLogitsWarper(1.3)(None, logits))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    wanted = scores.softmax(-1)[0]
    assert 0 < int((wanted > 0).sum()) < 30
    count = 20000
    sampling = Sampling(temperature=1.3, min_p=min_p, top_k=top_k, top_p=top_p, seed=4)
    got = draws(sampler_of(sampling), logits, count).bincount(minlength=40) / count
    assert (got[wanted == 0] == 0).all()
    assert ((got - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()
    assert draws(sampler_of(Sampling(min_p=min_p)), logits, 1) == logits.argmax()


def scores_of(sampler: Sampler, logits: torch.Tensor, slot: int = 0) -> torch.Tensor:
    """What is drawn from, `[V]`."""
    changes = sampler.settings[torch.tensor([slot])][..., None].unbind(1)[4:]
    return sampler._changed(logits, torch.tensor([slot]), *changes, extra=True)[0]


def test_biases_and_penalties_are_those_of_transformers_and_openai() -> None:
    """A bias comes first, as in both; the other penalties are OpenAI's formula: logits[j] -
    c[j] * frequency - (c[j] > 0) * presence. Silence, which a stream says all the time, is none of
    what they count."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    bias = {5: 1.5, 9: -2.25, 31: -100.0, SILENCE: 0.5}
    said = [9, 30, 9, SILENCE, 9, 17]
    context = torch.tensor([[5, 9, 30, 17]])
    theirs = LogitsProcessorList([
        SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        RepetitionPenaltyLogitsProcessor(1.7),
    ])  # fmt: skip
    wanted = theirs(context, logits.clone())[0].double()
    for token, count in ((9, 3), (30, 1), (17, 1)):
        wanted[token] -= count * 0.4 + 1.25
    sampling = Sampling(
        logit_bias=bias, repetition_penalty=1.7, presence_penalty=1.25, frequency_penalty=0.4
    )
    # Between slots that ask for nothing, or for something else.
    sampler = sampler_of(Sampling(), sampling, Sampling(frequency_penalty=-2.0))
    sampler.add_context(1, [5])
    for token in said:
        for slot, own in enumerate((Sampling(), sampling, Sampling(frequency_penalty=-2.0))):
            sampler.add_sampled(slot, token, own)
    torch.testing.assert_close(scores_of(sampler, logits, 1).double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(scores_of(sampler, logits, 0), logits[0])
    lured = logits[0].clone()
    for token, count in ((9, 3), (30, 1), (17, 1)):
        lured[token] += 2.0 * count
    torch.testing.assert_close(scores_of(sampler, logits, 2), lured)
    # Whoever has the place next has none of it.
    sampler.open(1, Sampling())
    assert torch.equal(scores_of(sampler, logits, 1), logits[0])
    with pytest.raises(ValueError, match="logit_bias: 40: the model says tokens from 0 to 39"):
        sampler.check(Sampling(logit_bias={40: 1.0}))


@pytest.mark.parametrize(
    "changes",
    [{"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"logit_bias": {8: 9.0}}],
)
def test_what_changes_logits_changes_the_most_likely_token(changes: dict) -> None:
    sampling = Sampling(**changes)
    assert (sampling.draw, Sampling(min_p=0.5).draw) == (Draw.EXTRA, Draw.GREEDY)
    assert Sampling(min_p=0.5, temperature=1.0).draw is Draw.EXTRA
    logits = torch.zeros(1, 40)
    logits[0, 8], logits[0, 9] = 1.0, 0.9
    sampler = sampler_of(sampling)
    sampler.add_sampled(0, 8 if "presence_penalty" in changes else 9, sampling)
    wanted = 9 if sampling.counts else 8
    slot, at = torch.tensor([0]), torch.tensor([1])
    assert sampler(logits.clone(), slot, at, sampling.draw).tolist() == [wanted]


def test_draws_depend_on_seed_and_position_alone() -> None:
    logits = torch.zeros(1, 40)
    one = Sampling(temperature=1.0, seed=1)
    sampler = sampler_of(Sampling(temperature=1.0, seed=2), one)
    alone = draws(sampler_of(one), logits, 50)
    assert torch.equal(draws(sampler, logits, 50, slot=1), alone)
    assert not torch.equal(draws(sampler, logits, 50, slot=0), alone)
    mixed = sampler(torch.zeros(2, 40), torch.tensor([1, 0]), torch.tensor([7, 7]), Draw.CUT)
    assert mixed[0] == alone[7]


def test_a_draw_is_the_same_beside_slots_that_sort_the_vocabulary() -> None:
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(2))
    whole = Sampling(temperature=0.8, seed=5)
    assert whole.draw is Draw.WHOLE
    assert Sampling(temperature=0.8, top_p=0.9).draw is Draw.CUT
    assert Sampling(silence_bias=1.0, top_p=0.9).draw is Draw.WHOLE
    assert Sampling(top_p=0.9).draw is Draw.GREEDY
    sampler = sampler_of(whole, vocabulary=400)
    slots, at = torch.zeros(200, dtype=torch.long), torch.arange(200)
    drawn = {draw: sampler(logits.expand(200, -1).clone(), slots, at, draw) for draw in DRAWS[1:]}
    assert len(drawn[Draw.WHOLE].unique()) > 50
    for draw in DRAWS[2:]:
        assert torch.equal(drawn[Draw.WHOLE], drawn[draw])


def test_a_batch_takes_what_its_slots_take_together_and_no_more() -> None:
    """Settings that nobody in it has are not looked at: here they would change every token."""
    greedy, whole = Sampling(), Sampling(temperature=0.8, seed=5)
    cut, counted = Sampling(temperature=0.8, top_k=30, seed=5), Sampling(presence_penalty=1.0)
    assert draw_of([greedy, whole]) is Draw.WHOLE
    assert draw_of([whole, cut, greedy]) is Draw.CUT
    assert draw_of([greedy, counted]) is Draw.EXTRA
    assert draw_of([counted, cut]) is DRAWS[-1]
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(2)).expand(200, -1)
    slots, at = torch.zeros(200, dtype=torch.long), torch.arange(200)
    for sampling in (greedy, whole, cut):
        sampler = sampler_of(sampling, vocabulary=400)
        wanted = sampler(logits.clone(), slots, at, sampling.draw)
        sampler.bias[0, 17] = torch.inf
        sampler.sampled_counts += 1000
        sampler.settings[0, 3] = 1.0  # min_p
        assert torch.equal(sampler(logits.clone(), slots, at, sampling.draw), wanted)
        other = sampler(logits.clone(), slots, at, sampling.draw | Draw.EXTRA)
        assert (other == 17).all()
        assert not (wanted == 17).all()


def test_the_memory_of_a_slot_is_what_its_tensors_have() -> None:
    sampler = sampler_of(Sampling(), Sampling(), Sampling(), vocabulary=1000)
    kept = [value for value in vars(sampler).values() if isinstance(value, torch.Tensor)]
    taken = sum(tensor.nbytes for tensor in kept if tensor.shape[-1] == 1000)
    assert taken == 3 * bytes_of_slot(1000)


def test_uniform_numbers_are_even_and_unrelated() -> None:
    position, token = torch.arange(300)[:, None], torch.arange(300)
    grid = uniform(torch.tensor(5), position, token)
    assert grid.min() > 0
    assert grid.max() < 1
    counts = (grid * 10).long().flatten().bincount(minlength=10) / grid.numel()
    assert (counts - 0.1).abs().max() < 0.005
    for other in (grid.roll(1, 0), grid.roll(1, 1)):
        assert torch.corrcoef(torch.stack((grid.flatten(), other.flatten())))[0, 1].abs() < 0.02


def test_repetition_penalty_is_that_of_transformers_but_spares_silence() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    context = torch.tensor([[5, 9, SILENCE, 9, 30]])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(context, logits.clone())
    wanted[0, SILENCE] = logits[0, SILENCE]
    sampler = sampler_of(Sampling(repetition_penalty=1.7))
    sampler.add_context(0, [*context[0].tolist(), 40])  # 40 is <|image|>: no one can say it
    order = []
    remaining = logits.clone()
    for _ in range(6):  # the most likely tokens, one after the other
        best = draws(sampler, remaining, 1)
        order.append(best.item())
        remaining[0, best] = -1e9
    assert order == wanted[0].argsort(descending=True)[:6].tolist()


def test_silence_bias_moves_the_decision() -> None:
    logits = torch.zeros(1, 40)
    logits[0, 8] = 1.0
    for bias, wanted in ((0.9, 8), (1.1, SILENCE), (-1.0, 8)):
        assert draws(sampler_of(Sampling(silence_bias=bias)), logits, 1).tolist() == [wanted]


def test_a_greedy_slot_stays_greedy_beside_one_that_draws() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    sampler = sampler_of(Sampling(), Sampling(temperature=5.0, seed=1))
    got = sampler(logits.clone(), torch.tensor([0, 1]), torch.tensor([4, 4]), Draw.CUT)
    assert got[0] == logits[0].argmax()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"min_p": 1.5},
        {"presence_penalty": float("nan")},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"sampling: {next(iter(wrong))}"):
        Sampling(**wrong)


def test_a_seed_that_is_not_given_is_drawn() -> None:
    seeds = {Sampling().seed for _ in range(8)} | {Sampling(seed=None).seed}
    assert len(seeds) == 9
    assert all(seed is not None and 0 <= seed < 2**53 for seed in seeds)
    logits = torch.zeros(1, 40)
    own = [
        draws(sampler_of(Sampling(1.0, seed=s)), logits, 50) for s in (1, 2**53 + 1, -1, -(2**63))
    ]
    assert len({tuple(draw.tolist()) for draw in own}) == 4
    for wrong in (2**63, -(2**63) - 1, 1.5):
        with pytest.raises(ValueError, match="sampling: seed"):
            Sampling(seed=wrong)  # type: ignore[arg-type]


def test_top_k_may_be_written_as_vllm_does() -> None:
    assert Sampling(top_k=-1).top_k == 0
