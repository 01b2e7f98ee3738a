"""Which tokens a step allows, and how likely they were, beside steps that ask for neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor

from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Step
from inference.engine.token_choice import all_but, choose_tokens, read_likely
from tests.inference.engine.test_engine import engine_of
from tests.inference.tiny import tiny_model

PROMPT = [5, 9, 30, 41]
COUNT = 5  # most likely tokens that are asked for


def mask_of(allowed: set[int]) -> Tensor:
    """As a grammar library writes it."""
    words = [sum(1 << bit for bit in range(32) if 32 * word + bit in allowed) for word in range(16)]
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_step_that_asks_changes_nothing_beside_it(model, form: str, temperature: float) -> None:
    """Three slots, of which the first asks; then again without a question: no mask is left."""
    sampling = Sampling(temperature=temperature, repetition_penalty=1.1, seed=3)
    allowed = {31, 64, 95, 200, 511}

    def run(asks: bool) -> tuple[list[list[int | None]], list[Tensor | None]]:
        engine: Engine = engine_of(model, form, max_sessions=3)
        slots = [engine.open(sampling) for _ in range(3)]
        engine.step([Step(slot, PROMPT[n:]) for n, slot in enumerate(slots)])
        said, likely = list[list[int | None]](), list[Tensor | None]()
        for _ in range(4):
            first = Step(slots[0])
            if asks:
                first.allowed, first.likely = mask_of(allowed), COUNT
            said.append(engine.step([first, *map(Step, slots[1:])]))
            likely.append(slots[0].likely)
        said.append(engine.step([*map(Step, slots)]))
        return said, likely

    asked, likely = run(True)
    plain, none = run(False)
    assert [step[1:] for step in asked] == [step[1:] for step in plain]
    assert all(step[0] in allowed for step in asked[:-1])
    assert none == [None] * 4
    assert asked[-1][0] is not None
    free = run_alone(model, [PROMPT, *[step[:1] for step in asked[:-1]]], sampling)
    assert asked[-1][0] == free  # after the mask the slot is as if it had chosen these itself
    # Against the whole text in one pass, in fp64, of the model's own logits.
    text = [*PROMPT, *first_pending(model, sampling), *[step[0] for step in asked[:4]]]
    logits = model.double()(torch.tensor([text])).logits[0].log_softmax(-1)
    model.float()
    for n, values in enumerate(likely):
        assert values is not None
        own, top = read_likely(values, COUNT)
        expected = logits[len(PROMPT) + n]
        assert own == pytest.approx(float(expected[asked[n][0]]), abs=1e-4)
        best = pytest.approx(expected.topk(COUNT).values.tolist(), abs=1e-4)
        assert [value for _, value in top] == best
        assert expected[[token for token, _ in top]].tolist() == best  # in any order where equal
        assert len({token for token, _ in top}) == COUNT


def first_pending(model, sampling: Sampling) -> list[int | None]:
    engine = Engine(model, max_tokens=128)
    return engine.step([Step(engine.open(sampling), PROMPT)])


def run_alone(model, said: list[Any], sampling: Sampling) -> int | None:
    """What a slot samples after a prompt and tokens that were chosen for it."""
    engine = Engine(model, max_tokens=128)
    slot = engine.open(sampling)
    engine.step([Step(slot, said[0])])
    for (token,) in said[1:]:
        engine.step([Step(slot)])
        slot.pending = token
        engine.sampler.add_context(slot.index, [token])
    return engine.step([Step(slot)])[0]


def test_all_but_some_tokens_is_what_transformers_forbids_before_a_length() -> None:
    """Beside a grammar's mask, which may have bits of more tokens than there are logits."""
    ends, logits = [3, 31, 32, 99], torch.randn(2, 100)
    processor = MinNewTokensLengthLogitsProcessor(4, 2, ends, device="cpu")
    wanted = processor(torch.zeros(1, 5, dtype=torch.long), logits[:1].clone())
    model = tiny_model()
    slots = [Engine(model, max_tokens=128).open() for _ in range(2)]
    steps = [
        Step(slots[0], allowed=all_but([*ends, 100], 100)),
        Step(slots[1], allowed=torch.full((5,), -1, dtype=torch.int32)),
    ]
    got = logits.clone()
    choose_tokens(got, steps, [0, 1], lambda: got.argmax(-1))
    assert torch.equal(got[:1], wanted)
    assert torch.equal(got[1], logits[1])


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
def test_penalties_of_what_was_said_are_those_of_a_slot_that_is_told_it(model, form: str) -> None:
    """Token by token against the formula, over what the engine itself has said; the slot goes on
    after it was saved, and beside one that is as before."""
    sampling = Sampling(frequency_penalty=1.5, presence_penalty=0.3, logit_bias={7: 8.0})
    engine: Engine = engine_of(model, form, max_sessions=2)
    plain, slot = engine.open(), engine.open(sampling)
    said = list[int]()
    for number in range(8):
        first = [Step(plain, PROMPT), Step(slot, PROMPT)]
        asked = first if not number else [Step(plain), Step(slot)]
        token = engine.step(asked)[1]
        assert token is not None
        said.append(token)
        if number == 4:
            state = engine.save(slot)
            engine.close(slot)
            slot = engine.restore(state)
    text = [*PROMPT, *said]
    logits = model.double()(torch.tensor([text])).logits[0]
    model.float()
    for number, token in enumerate(said):
        scores = logits[len(PROMPT) - 1 + number].clone()
        scores[7] += 8.0
        for before in set(said[:number]):
            scores[before] -= 0.3 + 1.5 * said[:number].count(before)
        assert token == int(scores.argmax())
    assert 1 < said.count(7) < 8  # it is said until the penalties are larger than the bias
    greedy = Engine(model, max_tokens=128)
    alone = greedy.open()
    own = [greedy.step([Step(alone, PROMPT if not n else [])])[0] for n in range(8)]
    assert plain.tokens[len(PROMPT) :] == own[:-1]
