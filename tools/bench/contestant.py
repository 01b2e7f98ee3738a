"""Runs a contestant of the training benchmark: starts its processes, and is each of them.

`python -m tools.bench.contestant JOB.json` is one rank. It sets up, then does as many steps as each
line on stdin says, and answers with JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from data_pipeline.batch import MicroBatch
from moss_train import hardware
from moss_train.config import Config, from_dict

REPO = Path(__file__).resolve().parents[2]
PIPELINE_SAMPLES = 4  # samples of a microbatch at most in a pipeline, which needs several

Step = Callable[[], tuple[float, float]]  # loss, and this rank's part of all tokens with padding


def _free_port() -> int:
    """A port without a listener, below those of outgoing connections: contestants that start at the
    same time would sometimes take each other's."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port between 20000 and 30000")


class Contestant:
    """The processes of one contestant in one layout."""

    def __init__(self, name: str, ranks: int, job: dict[str, Any]):
        self.name, self.ranks = name, ranks
        self.losses: list[float] = []
        self.padded = 0.0  # tokens of all steps, with padding
        self.turns: list[dict[str, Any]] = []
        stem = Path(job["folder"]) / name.replace(" ", "-")
        spec = stem.with_suffix(".json")
        spec.write_text(json.dumps(job))
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.logs = [stem.with_suffix(f".{rank}.log") for rank in range(ranks)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tools.bench.contestant", str(spec)],
                cwd=REPO,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("w"),
                text=True,
            )
            for rank, log in enumerate(self.logs)
        ]

    def answers(self) -> list[dict[str, Any]]:
        """The next line of every rank."""
        lines = [cast(Any, process.stdout).readline() for process in self.processes]
        if not all(lines):
            logs = "\n".join(log.read_text()[-4000:] for log in self.logs)
            raise RuntimeError(f"{self.name} failed:\n{logs}")
        return [json.loads(line) for line in lines]

    def turn(self, steps: int) -> dict[str, Any]:
        """Runs `steps` steps on all ranks; the memory is of the rank that uses most."""
        for process in self.processes:
            cast(Any, process.stdin).write(f"{steps}\n")
            cast(Any, process.stdin).flush()
        answers = self.answers()
        self.losses += answers[0]["losses"]
        self.padded += sum(answer["padded"] for answer in answers)
        return max(answers, key=lambda answer: answer["peak_gb"])

    def close(self) -> None:
        """Lets the processes end, or ends them."""
        for process in self.processes:
            cast(Any, process.stdin).close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def serve(job: dict[str, Any]) -> None:
    """A rank: does as many steps as each line on stdin says, and answers with a line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log
    config = from_dict(job["config"])
    if job["side"] == "data":
        replies.write(json.dumps(prepare(config, job)) + "\n")
        return
    config.hardware.threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"]))
    step = _hf_step(config, job) if job["side"] == "hf" else _our_step(config, job)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        torch.distributed.barrier()
        began = time.perf_counter()
        losses, padded = zip(*(step() for _ in range(int(line))), strict=True)
        torch.distributed.barrier()
        seconds = time.perf_counter() - began
        reply = {"seconds": seconds, "losses": losses, "padded": sum(padded)}
        reply["start_gb"] = job["start_gb"]
        replies.write(json.dumps(reply | {"peak_gb": hardware.peak_memory_gb()}) + "\n")
    torch.distributed.destroy_process_group()


def _microbatches(job: dict[str, Any], replica: int, replicas: int) -> Iterator[MicroBatch]:
    """This replica's microbatches, step after step: every `replicas`-th of all."""
    batches = torch.load(Path(job["folder"]) / "batches.pt", weights_only=False)
    return itertools.cycle(batches[replica::replicas])


def _our_step(config: Config, job: dict[str, Any]) -> Step:
    from moss_train.train.loop import Job
    from moss_train.train.process import start_process_group

    job["start_gb"] = hardware.peak_memory_gb()  # imports only: nothing has been built yet
    start_process_group(config)
    training = Job(config, None)
    if training.reader.loader is not None:  # it has not begun to read
        training.reader.loader.close()
        groups = training.groups
        training.reader.batches = _microbatches(job, groups.data_rank, groups.data_size)
    pipelined = config.parallel.pipeline > 1
    samples = PIPELINE_SAMPLES if pipelined else config.data.global_batch
    training.reader.bounds = replace(training.reader.bounds, samples=samples)

    def step() -> tuple[float, float]:
        result = training.step(*training._read())
        return result.loss, result.padded_tokens / torch.distributed.get_world_size()

    return step


def _hf_step(config: Config, job: dict[str, Any]) -> Step:
    from tools.bench.hf_baseline import join, make_step

    job["start_gb"] = hardware.peak_memory_gb()
    batches = _microbatches(job, *join(config))
    weights = torch.load(Path(job["folder"]) / "weights.pt")
    return make_step(config, batches, weights, job["warmup"])


def prepare(config: Config, job: dict[str, Any]) -> dict[str, float]:
    """Reads the microbatches and exports our random initialization, for all contestants."""
    from moss_train.convert.weights import export
    from moss_train.train.loop import Job
    from moss_train.train.process import start_process_group

    start_process_group(config)
    training = Job(config, None)
    reads, loader = cast(Any, training.reader.batches), cast(Any, training.reader.loader)
    batches = [next(reads)]  # the first waits for the loader's processes to start
    began = time.perf_counter()
    batches += [next(reads) for _ in range(max(job["microbatches"] - 1, 50))]
    rate = (len(batches) - 1) * config.data.read_together(1) / (time.perf_counter() - began)
    loader.close()
    torch.save(batches[: job["microbatches"]], Path(job["folder"]) / "batches.pt")
    torch.save(export(training.model), Path(job["folder"]) / "weights.pt")
    torch.distributed.destroy_process_group()
    return {"samples_per_s": rate}


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text()))
