"""Every command of the README runs, in order, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.docs.commands import make_checkout, run
from tests.torchrun import free_port
from tests.waiting import PATIENCE, until

REPO = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands() -> list[str]:
    """The README's commands, continued lines joined."""
    text = "\n".join(BLOCK.findall((REPO / "README.md").read_text()))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def runnable() -> list[str]:
    """Those that need neither a cluster nor another set-up."""
    return [c for c in commands() if not c.startswith("make") and "$HOST" not in c]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a checkout, with a user's records in it."""
    folder = make_checkout(tmp_path_factory.mktemp("checkout"))
    records = folder / "my_records"
    records.mkdir()
    _write_records(records)
    return folder


def _write_records(folder: Path) -> None:
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    messages = [
        {"role": "user", "content": "<|video|>What is this?"},
        {"role": "assistant", "content": "Noise."},
    ]
    records = []
    for number in range(4):
        name = f"clip{number}.mp4"
        with av.open(str(folder / name), "w") as out:
            stream = out.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(24):
                picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
        records.append({"messages": messages, "videos": [name]})
    (folder / "records.json").write_text(json.dumps(records))


def _serve(command: str, folder: Path, env: dict[str, str]) -> None:
    """A server starts, is healthy, and ends when it is asked to. The README's port may be taken."""
    words, port = shlex.split(command), free_port()
    words[words.index("--port") + 1] = str(port)
    health, log = f"http://127.0.0.1:{port}/health", folder / "server.log"
    with log.open("w") as said:
        server = subprocess.Popen(words, cwd=folder, env=env, stderr=said)
    try:
        until(lambda: server.poll() is not None or _healthy(health))
        assert server.poll() is None, log.read_text()
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    finally:
        server.kill()
        server.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return json.load(answer)["status"] == "ok"
    except OSError:  # URLError among them
        return False


def test_make_has_the_two_commands() -> None:
    wanted = [c.split("#")[0].split() for c in commands() if c.startswith("make")]
    assert [w[1] for w in wanted] == ["demo", "test"]
    for target in ("demo", "demo-full", "test", "check"):
        subprocess.run(["make", "-n", target], cwd=REPO, check=True, capture_output=True)


def test_readme_commands_run(checkout: Path) -> None:
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }
    assert len(runnable()) >= 6
    for command in runnable():
        small = command
        if "parallel=tp2 " in command and "stage=pt1" in command:
            small += " trainer.steps=5"  # the demo itself takes minutes
        elif command.endswith("data_pipeline.toy toy_world"):
            small += " --train 120 --heldout 10"
        if "inference.serve" in command:
            _serve(command, checkout, env)
        elif command == runnable()[0]:  # this one starts as in a user's shell
            subprocess.run(small, shell=True, cwd=checkout, env=env, check=True, timeout=300)
        else:
            run(small, checkout, seconds=300)
    assert (checkout / "toy_world/toy.json").exists()
    lines = (checkout / "runs/first/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 30  # 20 steps, then 10 more in another layout
    assert shutil.which("torchrun", path=env["PATH"])
