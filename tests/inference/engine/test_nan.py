"""Logits that are NaN: of weights that have diverged, or of a number that was none."""

from __future__ import annotations

import pytest
import torch

from inference.engine.sampling import Sampling
from inference.engine.slots import Step
from tests.inference.engine.streams import IMAGE
from tests.inference.engine.test_engine import SILENCE, engine_of
from tests.inference.tiny import tiny_model


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=3, seed=1)])
def test_a_slot_that_is_nan_ends_alone_and_leaves_nothing(form: str, sampling: Sampling) -> None:
    engine = engine_of(tiny_model(silence_token_id=SILENCE), form, max_sessions=2)
    shape = engine.cache.patches, engine.config.text_config.hidden_size
    frame = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def stream(*beside: Step) -> list[int | None]:
        """Tokens of a new slot, in whose first step others have theirs."""
        slot = engine.open(sampling)
        tokens = engine.step([Step(slot, [5, 6, 7], likely=2), *beside])[:1]
        tokens += engine.step([Step(slot, [IMAGE], [frame])])
        tokens += [token for _ in range(6) for token in engine.step([Step(slot)])]
        engine.close(slot)
        return tokens

    wanted, sick = stream(), engine.open(sampling)
    engine.step([Step(sick, [5, IMAGE], [frame * torch.nan], sample=False)])
    assert engine.step([Step(sick, [*range(20, 29)], likely=2)]) == [None]
    with pytest.raises(ValueError, match=r"slot 0 .* is NaN"):
        engine.step([Step(sick, [5])])
    engine.close(sick)
    assert stream() == wanted  # in the same slot
    sick = engine.open(sampling)
    engine.step([Step(sick, [5, IMAGE], [frame * torch.nan], sample=False)])
    assert stream(Step(sick, [8, 9])) == wanted  # beside it
    assert sick.broken
