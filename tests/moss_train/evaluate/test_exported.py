"""An export answers as the model that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train.config import to_dict
from moss_train.convert.hf_files import HfFiles, write_files
from moss_train.convert.weights import export
from moss_train.evaluate.controls import ModelInput, watch
from moss_train.evaluate.exported import ExportedModel
from moss_train.evaluate.generate import answers, streams
from moss_train.evaluate.items import EvaluationError
from moss_train.evaluate.model import TrainedModel
from tests.torchrun import REPO

LOAD = MossVideoForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def exported(model: TrainedModel, toy: Path, tmp_path_factory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("exported")
    run = {"step": 7, "config": to_dict(model.config)}
    nowhere, code = folder / "source", REPO / "inference/hf"
    files = HfFiles(model.config, run, "moss", "sft", toy / "tokenizer", nowhere, code)
    write_files(folder, files, {torch.float32}, None)
    weights = {name: tensor.clone() for name, tensor in export(model.model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ExportedModel.open_with(LOAD, folder, "cpu")


def test_it_encodes_and_predicts_the_same(model, exported, questions):
    assert exported.step == 7
    for item in questions:
        tokens, places = item.encoded.tokens.tolist(), item.encoded.frame_positions.tolist()
        (mine,), (theirs,) = model.encode([item.encoded]), exported.encode([item.encoded])
        if places:
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
        ratios = item.encoded.aspect_ratio_ids
        nothing: list[int] = []
        for seen in (places, nothing):
            ((one, chances),) = model.predict([ModelInput(tokens, seen, mine, ratios)])
            shown = ModelInput(tokens, seen, theirs, ratios)
            ((other, theirs_too),) = exported.predict([shown])
            torch.testing.assert_close(theirs_too, chances, rtol=1e-4, atol=1e-4)
            assert torch.equal(other, one)


@pytest.mark.parametrize("room", [None, 100])
def test_sequences_that_go_together_answer_as_alone(
    model, exported, questions, live, monkeypatch, room
):
    """Of several lengths and counts of frames, whole and cut, in passes of any size."""
    monkeypatch.setattr(exported.config.data, "max_tokens_per_batch", room)
    inputs = []
    for seen in watch(model, [*questions, *live[:2]]):
        tokens = seen.item.encoded.tokens.tolist()
        places = seen.item.encoded.frame_positions.tolist()
        for end in (len(tokens), 2 * len(tokens) // 3):
            for shown in ([place for place in places if place < end], []):
                inputs.append(ModelInput(tokens[:end], shown, seen.states, seen.ratios))
    alone = [model.predict([one])[0] for one in inputs]
    together = exported.predict(inputs)
    assert len({len(one.tokens) for one in inputs}) > 5
    assert len({len(one.positions) for one in inputs}) > 2
    for (likely, chances), (other, other_chances) in zip(alone, together, strict=True):
        torch.testing.assert_close(other_chances, chances, rtol=1e-4, atol=1e-4)
        assert torch.equal(other, likely)
    assert exported.next_tokens(inputs) == [int(likely[-1]) for likely, _ in alone]
    assert exported.next_tokens([]) == exported.predict([]) == []


def test_it_answers_and_comments_the_same(model, exported, questions, live):
    for items, ask in ((questions[:7], answers), (live[:1], streams)):
        ours, theirs = (ask(m, watch(m, items), most=3) for m in (model, exported))
        assert theirs == ours


def test_a_folder_that_is_no_export_of_a_run_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"training\.json .*: give the export of a run"):
        ExportedModel.open_with(LOAD, tmp_path, "cpu")
