"""The short form of tools/bench/soak.py, and its verdict."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from inference.engine.load import load_engine
from inference.serve.limits import Limits
from tests.inference.serve.serving import serving
from tests.waiting import until
from tools.bench import replicas, soak
from tools.bench.replicas import stop
from tools.bench.soak import FRAME_BYTES, Result, play, report
from tools.bench.visitor import FAULTS, Visitor


def test_every_fault_of_clients_leaves_the_others_alone(tiny: Path) -> None:
    """No event lost or twice, no frame without its decision, no session that stays."""
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=6)
    limits = Limits(frame_bytes=FRAME_BYTES, grace=60.0, fps=1000, decoders=1)
    with serving(engine, limits) as server:
        options = {"faults": 0.8, "interval": 0.0, "seed": 3}
        run = asyncio.run(play(server.host, 4, 80, pid=os.getpid(), **options))  # type: ignore[arg-type]
        assert (run.wrong, run.gaps) == ([], 0)
        assert set(run.faults) - {"turned away"} == set(FAULTS)
        assert len(run.latencies) == run.frames >= 80
        assert run.memory
        until(lambda: not any(live.socket for live in list(server.hub.sessions.values())))
        for live in list(server.hub.sessions.values()):
            live.close("its client does not come back")
        server.wait(0)


def made(seconds: float, sizes: tuple[int, int], *wrong: str) -> Result:
    """A run of 100 frames of so many seconds, after whose warm-up memory was sizes[0]."""
    visitor = Visitor(0, "", 0.0, 0.0, 1, Random(0), wrong=list(wrong))
    visitor.seconds, visitor.frames = [seconds] * 100, 100
    memory = [(0.0, 1), (0.1, 10**9), (0.25, sizes[0]), (0.6, 10**9), (0.95, sizes[1])]
    return Result([visitor], 1.0, memory)


@pytest.mark.parametrize(
    ("broken", "holds"),
    [
        (made(0.14, (10**8, 104 * 10**6)), True),
        (made(0.14, (10**8, 9 * 10**7)), True),
        (made(0.14, (10**8, 106 * 10**6)), False),
        (made(0.16, (10**8, 10**8)), False),
        (made(0.14, (10**8, 10**8), "closed with 1011"), False),
    ],
)
def test_a_soak_holds_where_nothing_has_grown_slowed_down_or_gone(
    broken: Result, holds: bool
) -> None:
    quiet = made(0.1, (1, 1))
    assert report(quiet, broken, left=0, code=0)["holds"] is holds
    assert report(quiet, broken, left=1, code=0)["holds"] is False
    assert report(quiet, broken, left=0, code=1)["holds"] is False


def test_a_server_that_does_not_end_is_killed():
    deaf = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    command = [sys.executable, "-c", f"{deaf}; signal.pause()"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    stop(process, seconds=0.5)
    assert process.returncode == -signal.SIGKILL
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    stop(process)
    assert process.returncode == -signal.SIGTERM


def test_a_port_that_another_server_has_is_refused(capsys):
    """Its answers would be taken for those of the server that is started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for tool in (soak, replicas):
            with pytest.raises(SystemExit) as end:
                tool.main(["--checkpoint", "none", "--port", port])
            assert end.value.code == 1
            assert f"--port {port}: another server listens there" in capsys.readouterr().err
