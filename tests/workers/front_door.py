"""What a notebook does with moss_train, in one process: front_door.py TOY OUT; saves `seen`."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torchrun import save_result


class Circle:
    """Lives until the collector of garbage finds it."""

    def __init__(self) -> None:
        self.itself = self


def _circles() -> tuple[Circle, list[weakref.ref[Circle]]]:
    """One that is in use, and both it and one that is garbage."""
    used = Circle()
    return used, [weakref.ref(Circle()), weakref.ref(used)]


def _left(circles: list[weakref.ref[Circle]]) -> list[bool]:
    gc.collect()
    return [circle() is not None for circle in circles]


def main(toy: Path, out: Path) -> dict[str, Any]:
    import moss_train

    def config(name: str, steps: int, *more: str) -> moss_train.Config:
        return moss_train.load_config(
            "pt2", model="tiny", run={"dir": out / name},
            data={"root": toy, "global_batch": 2, "micro_batch": 2, "workers": 0},
            trainer={"steps": steps}, stage={"mixture": {"text": 0, "image": 1, "video": 1}},
            hardware={"device": "cpu", "threads": 1},
            overrides=["model.text.vocab_size=512", *more],
        )  # fmt: skip

    import torch
    import torch.distributed as dist

    seen: dict[str, Any] = {}
    random.seed(1)
    torch.manual_seed(1)
    seen["draws"] = [random.random(), torch.rand(1).item()]
    random.seed(1)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()) as lines:
        first = moss_train.train(config("first", 3))
        seen["lines"] = lines.getvalue()
    used, circles = _circles()
    with contextlib.redirect_stderr(io.StringIO()) as lines:
        second = moss_train.train(config("second", 3), quiet=True)
        seen["quiet"] = lines.getvalue()
    del used
    seen["left"] = _left(circles)
    seen["stdout"] = said.getvalue()
    seen["runs"] = [[row["loss"] for row in run.metrics] for run in (first, second)]
    seen["draws_after"] = [random.random(), torch.rand(1).item()]
    seen["threads_kept"] = torch.get_num_threads() == threads
    seen["rank"] = os.environ.get("RANK")
    seen["group_ended"] = not dist.is_initialized()

    seen |= _once_more(config, out / "first")
    model, other = first.model(threads=1), second.model(threads=1)
    picture = torch.full((3, 40, 30), 200, dtype=torch.uint8)
    seen["answers"] = [m.generate("", images=[picture], max_new_tokens=4) for m in (model, other)]
    with model:
        interrupted = _interrupt(lambda: moss_train.train(config("long", 400), quiet=True), out)
    seen["stopped"] = [interrupted.stopped, len(interrupted.metrics)]
    seen["saved"] = str(interrupted.checkpoint)
    seen["answer_later"] = other.generate("", images=[picture], max_new_tokens=4)
    seen["export"] = sorted(p.name for p in other.export(out / "export").iterdir())
    other.close()
    seen["group_ended_after_models"] = not dist.is_initialized()

    found: list[moss_train.Run] = []
    thread = threading.Thread(
        target=lambda: found.append(moss_train.train(config("thread", 1), quiet=True))
    )
    thread.start()
    thread.join()
    seen["thread"] = len(found[0].metrics)
    return seen


def _once_more(config: Callable[..., Any], run: Path) -> dict[str, Any]:
    """What commands for a run say that is done, and whether they leave its folder as it was."""
    import moss_train

    before = _contents(run)
    with contextlib.redirect_stderr(io.StringIO()) as lines:
        moss_train.train(config("first", 3, "optimizer.lr=0.5"))
    refused: list[str] = []
    for wrong in ("stage.train=[nothing.*]", "data.shuffle_window=7", "trainer.resume=none"):
        try:
            moss_train.train(config("first", 4, wrong), quiet=True)
        except moss_train.ConfigError as error:
            refused += error.problems
    untouched = _contents(run) == before
    return {"again": lines.getvalue(), "refused": refused, "untouched": untouched}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _interrupt(train: Callable[[], Any], out: Path) -> Any:
    """Sends this process what Ctrl-C sends, once the first step is done."""

    def watch() -> None:
        metrics = out / "long" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    return train()


if __name__ == "__main__":
    save_result("seen", main(Path(sys.argv[1]), Path(sys.argv[2])), as_json=True)
