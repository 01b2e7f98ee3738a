"""A forked process does not free the garbage of the one that it is a copy of."""

from __future__ import annotations

import gc
import io
import os
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import av
import pytest

import data_pipeline  # noqa: F401  what is tested is what it sets up
from tests.waiting import PATIENCE


class Held:
    """Something that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def exit_code(work: Callable[[], Any]) -> int | None:
    """Of a fork that does it; None: it stood still."""
    fork = get_context("fork").Process(target=lambda: os._exit(work()))
    fork.start()
    fork.join(PATIENCE)
    code = fork.exitcode
    fork.kill()
    fork.join()
    return code


def test_what_was_there_before_is_not_collected() -> None:
    freed = weakref.ref(Held())

    def collected() -> int:
        own = weakref.ref(Held())
        gc.collect()
        return 2 * (own() is None) + (freed() is None)

    assert freed() is not None
    assert exit_code(collected) == 2  # its own alone
    gc.collect()
    assert freed() is None


def test_a_codec_s_threads_are_not_waited_for() -> None:
    """The filters with which PyAV resamples sound have threads, which no fork has."""
    with av.open(io.BytesIO(), "w", "mp4") as file:
        track: Any = file.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame("s16", "mono", 4000)
        sound.sample_rate = 8000
        file.mux(track.encode(sound))
        file.mux(track.encode(None))
    garbage = Held()
    garbage.track = track  # type: ignore[attr-defined]
    del garbage, track, file, sound

    def collected() -> int:
        gc.collect()
        return 0

    assert exit_code(collected) == 0
