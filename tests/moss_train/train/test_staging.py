"""Copies of a checkpoint in host memory are what is written, and are proven right before that."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from data_pipeline import cgroups
from moss_train.train import staging
from moss_train.train.staging import Files, Staging, host_bytes


def tensors() -> list[torch.Tensor]:
    """Of every kind that a checkpoint has, and some that are hard to compare."""
    return [
        torch.randn(300, 7),
        torch.full((5,), float("nan")),
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.arange(12).view(3, 4).t(),
        torch.tensor([True, False]),
        torch.empty(0),
    ]


def files() -> Files:
    whole = tensors()
    return [
        ("/there/a", "a", ([], list(enumerate(whole[:4])))),
        ("/there/b", "b", (["an object"], list(enumerate(whole[4:])))),
    ]


def request(of: Files, copy: Any) -> AsyncRequest:
    """As megatron's writer makes it."""
    return AsyncRequest(print, (0, of, None), [], preload_fn=lambda: copy(of))


def cloned(of: Files) -> Files:
    return [
        (p, n, (o, [(i, t.clone(memory_format=torch.contiguous_format)) for i, t in ts]))
        for p, n, (o, ts) in of
    ]


def bits(of: Files) -> list[Any]:
    """All that `of` says, tensors as the bytes of their elements."""
    return [
        (path, name, objects, [(item, t.dtype, t.shape, t.contiguous().reshape(-1)
                                .view(torch.uint8).tolist()) for item, t in held])
        for path, name, (objects, held) in of
    ]  # fmt: skip


@pytest.mark.parametrize("piece", [1, 64, 1 << 24])
def test_right_copies_are_what_is_written(monkeypatch, caplog, piece):
    monkeypatch.setattr(staging, "PIECE", piece)
    whole, made = files(), []

    def copy(of: Files) -> Files:
        made.append(cloned(of))
        return made[-1]

    found = Staging(on_device=True).checked(request(whole, copy)).preload_fn()
    assert found is made[0]
    assert bits(found) == bits(whole)
    assert not caplog.records


@pytest.mark.parametrize("number", range(5))
def test_a_wrong_copy_is_made_again(caplog, number):
    """One bit of the last element of each tensor in turn."""
    whole, calls = files(), []

    def copy(of: Files) -> Files:
        calls.append(1)
        copies = cloned(of)
        last = held(copies)[number].view(-1)[-1:].view(torch.uint8)
        last ^= 1
        return copies

    saves = Staging(on_device=True)
    with caplog.at_level(logging.WARNING):
        assert bits(saves.checked(request(whole, copy)).preload_fn()) == bits(whole)
    assert "differ from what is on CPU" in caplog.text
    again = files()
    assert bits(saves.checked(request(again, copy)).preload_fn()) == bits(again)
    assert len(calls) == 1


def test_without_page_locked_memory_a_save_uses_ordinary_one(caplog):
    """A rank that raised would leave the others in the save. The next save tries again."""
    whole, calls = files(), []

    def copy(of: Files) -> Files:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported")
        return cloned(of)

    saves = Staging(on_device=True)
    with caplog.at_level(logging.WARNING):
        assert bits(saves.checked(request(whole, copy)).preload_fn()) == bits(whole)
    assert "cannot be made (CUDA error: out of memory): it is copied into" in caplog.text
    again = files()
    assert saves.checked(request(again, copy)).preload_fn() is saves.copies
    assert bits(saves.copies) == bits(again)
    assert len(calls) == 2


def test_later_saves_are_not_compared():
    saves, whole = Staging(on_device=True), files()
    saves.checked(request(whole, cloned)).preload_fn()
    other = files()
    assert bits(saves.checked(request(whole, lambda _: other)).preload_fn()) == bits(other)


def test_copies_are_kept_until_all_is_written():
    """A writing process shares their memory, and whoever asks for page-locked memory next gets it
    once they are dropped."""
    saves = Staging(on_device=True)
    copies = [weakref.ref(t) for t in held(saves.checked(request(files(), cloned)).preload_fn())]
    gc.collect()
    assert all(copy() is not None for copy in copies)
    saves.release()
    gc.collect()
    assert all(copy() is None for copy in copies)


def held(of: Files) -> list[torch.Tensor]:
    return [tensor for _, _, (_, pairs) in of for _, tensor in pairs]


def test_what_is_in_host_memory_is_not_copied():
    asked = request(files(), cloned)
    assert Staging(on_device=False).checked(asked) is asked
    nothing = AsyncRequest(None, (), [])
    assert Staging(on_device=True).checked(nothing) is nothing


def test_megatron_copies_what_it_is_given(monkeypatch):
    """The form of `Files` is that of the installed version."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    whole = files()
    assert bits(FileSystemWriterAsync.preload_tensors(whole, True)) == bits(whole)


def test_too_little_memory_is_told(monkeypatch, caplog):
    """torch's CachingHostAllocator rounds page-locked memory up to a power of two."""
    held = [torch.empty(3 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)]
    whole: Files = [("/there/a", "a", ([], list(enumerate(held))))]
    assert host_bytes(whole) == 5 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(cgroups, "free_memory", lambda: 40 << 20)
    Staging(on_device=True).checked(request(whole, cloned)).preload_fn()
    assert not caplog.records
    monkeypatch.setattr(cgroups, "free_memory", lambda: (40 << 20) - 1)
    Staging(on_device=True).checked(request(whole, cloned)).preload_fn()
    assert "take about 0.0 GB of this machine's memory" in caplog.text
