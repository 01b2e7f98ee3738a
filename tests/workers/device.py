"""Training steps on a simulated GPU: device.py '[[NAME, RUN], ...]' (JSON; see `train`).

Every rank saves what came of each run; and, as "probe", what the simulation says of calls that a
GPU would refuse, or wait in.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.batch import EncodedSample, MicroBatch, collate
from tests import simulated_cuda
from tests.workers.groups import end_groups
from tests.workers.matrix import GLOBAL, microbatches, small_model

STEPS = 2  # the first makes constants and the optimizer's state


def main(runs: list[tuple[str, dict]]) -> None:
    torch.set_num_threads(1)
    from moss_train import hardware

    simulated_cuda.install()
    hardware.activate("cuda")
    dist.init_process_group("gloo")
    from tests.torchrun import save_result

    save_result("probe", {name: probe(call) for name, call in calls().items()})
    for name, run in runs:
        save_result(name, (ask if run.pop("asks", False) else train)(**run))
        end_groups()
    dist.barrier()
    dist.destroy_process_group()


def train(
    stage: str,
    data: str = "mixed",
    dtype: str = "fp32",
    micro: int = 2,
    loss: str = "weighted",
    kept_frames: int = 0,
    **layout: Any,
) -> dict[str, Any]:
    """Two steps. `data`: a kind of workers/matrix.py, "stream" or "tiles"; `loss`: a preset of
    conf/; `kept_frames`: of the tower; `layout`: of ParallelConfig.

    Returns:
        losses and gradient norms; what was seen while the second step's batch was read and while
        it ran (`Record`), its phases and its seconds; the parameters that are not on the device.
    """
    from moss_train.config import ParallelConfig
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model.moss_video import MossVideo
    from moss_train.parallel.distribute import read_step
    from moss_train.parallel.packing import Bounds
    from moss_train.parallel.process_groups import build_groups
    from moss_train.train.guard import Guard
    from moss_train.train.optimizer import make_train_state
    from moss_train.train.param_groups import freeze
    from moss_train.train.step import TrainStep

    config = staged(stage, loss)
    config.model, config.parallel = small_model(dtype), ParallelConfig(**layout)
    vision = config.model.vision
    vision.frames_per_chunk, vision.kept_frames = 64 if data == "stream" else 3, kept_frames
    config.data.max_tiles = tiles = 4 if data == "tiles" else 1
    groups = build_groups(config.parallel, seed=1)
    model = MossVideo(config.model, config.parallel, groups)
    fill(model, random_reader(config.model, seed=8))
    counts = freeze(model, config.stage.train, config.stage.also)
    state = make_train_state(model, config, counts)
    step = TrainStep(config, model, state, silence_id=11, guard=Guard(3.0, [9.0] * 10, 0))
    reads = GLOBAL // micro // groups.data_size
    batches = samples(data, groups.data_rank, reads, micro) if groups.is_leader else None
    shape, shares = (tiles, 3, 56, 56), step.exchange.shares
    results, seconds = [], 0.0
    for _ in range(STEPS):
        with simulated_cuda.recording() as reading:
            batch = read_step(batches, reads, Bounds(micro), 8, shape, groups, shares)
        with simulated_cuda.recording() as stepping:
            began = time.perf_counter()
            results.append(step(batch))
            seconds = time.perf_counter() - began
    elsewhere = [name for name, p in model.named_parameters() if not simulated_cuda.on_device(p)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "reading": reading,
        "stepping": stepping,
        "elsewhere": elsewhere,
        "phase_s": results[-1].phase_s,
        "seconds": seconds,
    }


def ask(dtype: str = "fp32", **layout: Any) -> dict[str, Any]:
    """What a model is asked while it trains: frames to encode, then the next tokens of sequences,
    and the probabilities of theirs. The answers, and what was seen each time (`Record`)."""
    from moss_train.config import ParallelConfig
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.evaluate.controls import ModelInput
    from moss_train.evaluate.replica import ReplicaModel
    from moss_train.model.moss_video import MossVideo
    from moss_train.parallel.exchange import FrameExchange
    from moss_train.parallel.process_groups import build_groups

    config = staged("sft")
    config.model, config.parallel = small_model(dtype), ParallelConfig(**layout)
    config.data.max_tiles = 1
    groups = build_groups(config.parallel, seed=1)
    model = MossVideo(config.model, config.parallel, groups)
    fill(model, random_reader(config.model, seed=8))
    exchange = FrameExchange(config.model, model.encoder, groups)
    asked = ReplicaModel(config, model.chunks, exchange, groups)
    encoded = next(microbatches("mixed", 0, 2, GLOBAL)).samples()
    seen: dict[str, Any] = {}
    for _ in range(STEPS):
        with simulated_cuda.recording() as seen["encode"]:
            states = asked.encode(encoded)
        inputs = [
            ModelInput(one.tokens.tolist(), one.frame_positions.tolist(), state,
                       one.aspect_ratio_ids)
            for one, state in zip(encoded, states, strict=True)
        ]  # fmt: skip
        with simulated_cuda.recording() as seen["next"]:
            seen["tokens"] = asked.next_tokens(inputs)
        with simulated_cuda.recording() as seen["predict"]:
            seen["scores"] = asked.predict(inputs)
    return seen


def staged(stage: str, loss: str = "weighted") -> Any:
    """The configuration of a stage."""
    from moss_train.compose import load_config

    config = load_config(
        stage, overrides=["data=shards", "data.tokenizer=x", "run.dir=x", f"loss={loss}"]
    )
    config.trainer.steps = 20
    return config


def samples(kind: str, replica: int, count: int, micro: int) -> Iterator[MicroBatch]:
    """Those of workers/matrix.py; "stream": 120 frames, 4 tokens apart, whose attention is planned
    in masked blocks; "tiles": pictures of one to four tiles.
    """
    if kind not in ("stream", "tiles"):
        yield from microbatches(kind, replica, count, micro)
        return
    generator = torch.Generator().manual_seed(replica)
    frames, tiles = (120, 1) if kind == "stream" else (3, 4)
    while True:
        yield collate([_sample(frames, tiles, generator) for _ in range(micro)], pad_token_id=4)


def _sample(frames: int, tiles: int, generator: torch.Generator) -> EncodedSample:
    tokens = torch.randint(20, 512, (20 + 4 * frames,), generator=generator)
    positions = torch.arange(frames) * 4 + 8
    tokens[positions] = 512
    labels = tokens.clone()
    labels[positions], labels[:8] = -100, -100
    size = (frames, tiles, 3, 56, 56)
    pixels = torch.randint(0, 255, size, dtype=torch.uint8, generator=generator)
    ratios = torch.randint(1, 9 if tiles > 1 else 2, (frames,), generator=generator)
    return EncodedSample("made/1", tokens, labels, pixels, positions, ratios)


def calls() -> dict[str, Callable[[], Any]]:
    """What a GPU would refuse or wait in, and what it would not."""
    here = torch.arange(4.0, device="cuda")
    host, pinned = torch.arange(4.0), torch.arange(4.0).pin_memory()
    mask, order = here > 1, here.argsort()

    def fetch() -> Any:
        copy, event = here.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        event.synchronize()
        return copy.tolist()

    def collect() -> None:
        dist.all_reduce(host.clone())

    return {
        "item": lambda: here[0].item(),
        "truth": lambda: bool(here[0] > 1),
        "list": lambda: here.tolist(),
        "pageable": lambda: host.to("cuda", non_blocking=True),
        "number": lambda: torch.tensor(1.0, device="cuda"),
        "mask": lambda: here[mask],
        "nonzero": lambda: here.nonzero(),
        "host index": lambda: here[torch.tensor([0, 1])],
        "mixed": lambda: here + host,
        "host to collective": collect,
        "too early": lambda: here.to("cpu", non_blocking=True).tolist(),
        "fetched": fetch,
        "masked fill": lambda: here.clone().__setitem__(mask, 0),
        "a number at a place": lambda: here.clone().__setitem__(1, 5.0),
        "a number at places": lambda: here.clone().__setitem__(order, 5.0),
        "a number in a row": lambda: here.view(2, 2).clone().__setitem__(1, 5.0),
        "pinned": lambda: pinned.to("cuda", non_blocking=True) + here * 2.0,
        "made there": lambda: torch.zeros(3, device="cuda") + here.sum(),
    }


def probe(call: Callable[[], Any]) -> str | dict[str, int]:
    """The counts of a call, or "refused"."""
    with simulated_cuda.recording() as seen:
        try:
            call()
        except simulated_cuda.DeviceMixError:
            return "refused"
    return dict(seen.counts)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
