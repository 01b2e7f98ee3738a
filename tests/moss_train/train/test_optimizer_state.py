"""Each rank's part of the optimizer's state is written as boxes, and is what megatron writes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moss_train.checkpoint_dir import checkpoints_folder
from moss_train.train.optimizer_state import boxes
from tests.torchrun import Result, run_ranks

LAYOUTS = {
    # First: after other layouts, its groups of the same ranks have names that are taken.
    "dp2_tp2_sp": {"tensor": 2, "sequence": True, "vision_tensor": True},
    "dp4": {},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
}


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found, inside = list(boxes(shape, start, end)), []
            for offsets, sizes in found:
                box = whole
                for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    box = box.narrow(axis, offset, size)
                inside += box.flatten().tolist()
            assert inside == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("states")
    layouts = json.dumps(list(LAYOUTS.items()))
    return run_ranks("tests/workers/optimizer_state.py", 4, layouts, out=out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything of the optimizer in a checkpoint, put together by torch."""
    reader = dcp.FileSystemReader(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith("optimizer.")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def ours(run: Path) -> dict[str, torch.Tensor]:
    return tensors(checkpoints_folder(run) / "step_00000001")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_hold_what_megatron_gathers(saved: Result, layout: str) -> None:
    theirs = tensors(saved.out / layout / "megatron")
    assert {name.split(".")[2] for name in theirs} == {"exp_avg", "exp_avg_sq", "param"}
    moved = [name for name, value in theirs.items() if "exp_avg" in name and value.any()]
    assert len(moved) > len(theirs) / 2
    assert_equal(ours(saved.out / layout / "run"), theirs)


@pytest.mark.parametrize(("before", "layout"), pairwise(LAYOUTS))
def test_what_megatron_wrote_in_another_layout_is_read(
    saved: Result, before: str, layout: str
) -> None:
    again, wanted = ours(saved.out / layout / "again"), tensors(saved.out / before / "megatron")
    assert_equal(again, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_writes_a_part_and_no_element_is_written_twice(
    saved: Result, layout: str
) -> None:
    written = saved.load_all(f"{layout}-bytes")
    total = sum(t.nbytes for t in tensors(saved.out / layout / "megatron").values())
    assert sum(written) == total
    if layout == "dp4":
        assert max(written) < 1.1 * total / 4
        files = (saved.out / layout / "run").glob("checkpoints/step_*/*.distcp")
        sizes = dict.fromkeys("0123", 0)
        for file in files:  # __RANK_NUMBER.distcp, weights too
            sizes[file.name.split("_")[2]] += file.stat().st_size
        assert max(sizes.values()) < 1.2 * sum(sizes.values()) / 4
