"""A job in which a rank stops is ended, with who is behind and where; others are not disturbed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed import HashStore, TCPStore

from moss_train.processes import stat_fields
from moss_train.train import flight_recorder, heartbeat, machines
from moss_train.train.hang_detection import (
    STOPPED,
    Limits,
    Pace,
    RankStatus,
    hangs,
    report,
    verdict,
)
from moss_train.train.heartbeat import Heartbeat, HeartbeatWriter, read
from moss_train.train.machines import Machines
from moss_train.train.stragglers import slow_ranks
from moss_train.train.watchdog import wake, watch
from tests.waiting import running, until


def seen(rank: int, step: int, doing: str, silent_s: float, **other: Any) -> RankStatus:
    given: dict[str, Any] = {"host": f"node{rank}", "count": 3, "pid": 70 + rank, "state": "waits"}
    given |= other
    return RankStatus(rank=rank, step=step, doing=doing, silent_s=silent_s, **given)


def test_the_report_has_all_ranks_of_all_machines_the_late_ones_first():
    ranks = [seen(0, 12, "data", 61.2), seen(1, 11, "data", 61.2, state=STOPPED)]
    lines = report(ranks, 60).splitlines()
    assert lines[0] == verdict(ranks, 60)
    assert [line.split() for line in lines[3:]] == [
        ["1", "node1", "11", "data", "61", "71,", "stopped", "by", "a", "signal"],
        ["0", "node0", "12", "data", "61", "70,", "waits"],
    ]


def test_the_flight_recorder_is_asked_and_its_dump_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    flight_recorder.prepare(tmp_path)
    # What torch does with these names on a GPU (ProcessGroupNCCL.hpp, DumpPipe).
    pipe = f"{os.environ['TORCH_NCCL_DEBUG_INFO_PIPE_FILE']}1.pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    flight_recorder.request_dumps(tmp_path, [0, 1])
    assert os.read(reader, 128) == b"1\n"
    os.close(reader)
    Path(f"{os.environ['TORCH_FR_DUMP_TEMP_FILE']}1").write_bytes(b"collectives")
    (tmp_path / "hang").mkdir()
    flight_recorder.collect(tmp_path, [0, 1], tmp_path / "hang")
    assert [path.name for path in (tmp_path / "hang").iterdir()] == ["nccl_1"]


@contextmanager
def stopped_launcher() -> Iterator[int]:
    with running(["sleep", "1000"]) as launcher:
        os.kill(launcher.pid, signal.SIGSTOP)
        until(lambda: stat_fields(launcher.pid)[0] == "T")
        yield launcher.pid


def test_a_stopped_launcher_is_continued():
    with stopped_launcher() as pid:
        began = time.monotonic()
        assert wake(pid, began, 60) == began
        assert stat_fields(pid)[0] == "T"
        assert wake(pid, began - 61, 60) == began - 61
        until(lambda: stat_fields(pid)[0] == "S")
        assert wake(pid, began - 61, 60) >= began


def test_a_watchdog_whose_ranks_have_ended_leaves_no_stopped_launcher(tmp_path):
    """However short it has been stopped: without the watchdog nobody would continue it."""
    gone = 2**22 + 1  # no process has this number
    with stopped_launcher() as pid:
        watch(tmp_path / "job", Limits(60, 500), gone, pid, Machines(HashStore, 0, 1))
        until(lambda: stat_fields(pid)[0] == "S")


def test_the_rank_with_the_least_progress_is_behind():
    ranks = [seen(rank, 12, "after forward", 61.2, count=7) for rank in range(4)]
    ranks[2] = replace(ranks[2], count=4)
    assert verdict(ranks, 60) == (
        "the job hangs (hardware.hang_s=60): furthest behind: rank 2 on node2 (step 12, after "
        "forward, silent for 61 s, waits)"
    )
    assert "rank 0 on node0" in verdict([replace(ranks[0], step=11, count=9), *ranks[1:]], 60)
    ranks[1] = replace(ranks[1], count=9, state=STOPPED)
    assert "behind: rank 1 on node1" in verdict(ranks, 60)


def test_a_step_has_a_minute_and_storage_has_more():
    limits = Limits(60, 500, usual_step_s=2)
    stuck = seen(0, 12, "after forward", 61)
    assert hangs([stuck], limits)
    assert not hangs([replace(stuck, silent_s=59)], limits)
    assert not hangs([replace(stuck, state="ended")], limits)
    for doing in ("start", "load", "save", "data"):
        assert not hangs([seen(0, 12, doing, 499)], limits)
        assert hangs([seen(0, 12, doing, 501)], limits)
        assert hangs([seen(0, 12, doing, 61, state=STOPPED)], limits)
    # In the first step kernels are compiled; the steps of a large model may take long.
    assert not hangs([replace(stuck, silent_s=499)], Limits(60, 500))
    assert not hangs([replace(stuck, silent_s=149)], Limits(60, 500, usual_step_s=30))
    assert hangs([replace(stuck, silent_s=151)], Limits(60, 500, usual_step_s=30))


def test_ranks_that_wait_for_a_slow_storage_elsewhere_are_no_hang():
    limits = Limits(60, 500, usual_step_s=2)
    waiting = seen(0, 12, "after plan", 100)
    assert not hangs([waiting, seen(1, 12, "data", 100)], limits)
    assert not hangs([waiting, seen(1, 11, "save", 10)], limits)
    assert hangs([waiting, seen(1, 13, "data", 100)], limits)  # it is ahead: nobody waits for it
    assert hangs([waiting, seen(1, 12, "data", 100, state=STOPPED)], limits)
    assert hangs([waiting, seen(1, 12, "data", 501)], limits)


def test_a_usual_step_is_the_median_of_those_that_were_seen():
    def at(step: int) -> list[Heartbeat]:
        return [Heartbeat(0.0, 0, 1, step, 0, "data")]

    pace = Pace()
    for now, step in ((0.0, 0), (30.0, 1), (31.0, 1), (90.0, 2), (92.0, 4), (93.0, 5)):
        pace.add(at(step), now)
        assert (pace.usual_step_s is None) == (step < 2)
    assert pace.usual_step_s == 1.0  # of 60, 1, 1; the start is no step


def test_machines_learn_what_the_others_see_and_that_one_says_hang(monkeypatch):
    monkeypatch.setattr(machines, "PATIENCE", 120.0)
    monkeypatch.setattr(machines, "EVERY", 0.1)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    ranks = [seen(number, 12, "data", 1) for number in range(2)]

    def connect() -> TCPStore:
        return TCPStore("localhost", port, is_master=False)

    both = [Machines(connect, number, 2) for number in range(2)]
    for machine, own in zip(both, ranks, strict=True):
        machine.publish([own])
    until(lambda: both[0].all() == ranks)
    assert not both[1].hang
    assert both[0].publish_hang() == ranks
    until(lambda: both[1].hang)
    del store
    # Where the store has gone, a machine decides by itself.
    assert both[0].all() == ranks[:1]


def test_signs_of_life_are_read_back(tmp_path):
    heart, began = HeartbeatWriter(tmp_path, 3), time.monotonic()
    heart.beat("data", 7)
    heart.beat("after forward")
    ended = time.monotonic()
    (beat,) = read(tmp_path)
    assert (beat.rank, beat.pid, beat.step, beat.doing) == (3, os.getpid(), 7, "after forward")
    assert beat.count > 0
    assert began <= beat.at <= ended


def test_what_ranks_do_unequally_often_says_nothing_about_who_is_behind(tmp_path):
    heartbeat.start(tmp_path, 0)
    heartbeat.beat("data", 7)
    with heartbeat.uncounted():
        heartbeat.beat("validation")
        (inside,) = read(tmp_path)
    heartbeat.beat("after validation")
    (after,) = read(tmp_path)
    heartbeat.stop()
    assert (inside.doing, inside.count) == ("validation", 0)
    assert after.count == 1


def test_a_sign_of_life_costs_microseconds(tmp_path):
    heart = HeartbeatWriter(tmp_path, 0)
    began = time.thread_time()  # what others do meanwhile does not count
    for _ in range(1000):
        heart.beat("after forward")
    assert (time.thread_time() - began) / 1000 < 200e-6


def test_slow_ranks_are_named_by_phase_with_their_host():
    def rank(host: str, **phases: float) -> tuple[str, dict[str, float]]:
        usual = {"data": 0.1, "encode": 2.0, "plan": 0.1, "forward": 3.0, "backward": 6.0}
        return host, {**usual, "all": 12.0, **phases}

    ranks = [rank("a"), rank("a", plan=0.2), rank("b", forward=4.2, encode=2.4), rank("b")]
    assert slow_ranks(ranks) == ["forward: rank 2 on b takes 1.40 times the median"]
    ranks[0] = rank("a", backward=9.0)
    assert slow_ranks(ranks)[0] == "backward: rank 0 on a takes 1.50 times the median"
