"""Peak memory of training steps on a simulated GPU: live_memory.py '[[NAME, RUN], ...]' (JSON)."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.batch import EncodedSample, collate
from tests import simulated_cuda
from tests.live_memory import LiveMemory
from tests.workers.device import staged

TOKENS, FRAMES = 360, 24  # of a sample


def main(runs: list[tuple[str, dict]]) -> None:
    torch.set_num_threads(1)
    from moss_train import hardware
    from moss_train.model import norms

    # torch's kernel keeps what ours does; on a CPU torch takes it apart, and keeps more.
    norms._FUSED = False
    simulated_cuda.install()
    memory = LiveMemory()
    hardware.activate("cuda")
    dist.init_process_group("gloo")
    from tests.torchrun import save_result

    for name, run in runs:
        save_result(name, peak(memory, **run))
    dist.barrier()
    dist.destroy_process_group()


def configured(
    train: list[str],
    micro: int = 1,
    vocabulary: int = 1024,
    frames_per_chunk: int = 16,
    kept_frames: int = 0,
    **layout: Any,
) -> Any:
    """A model of a few MB, so that what a step keeps is most of its memory."""
    from moss_train.config import ParallelConfig
    from moss_train.model_config import ModelConfig, TextConfig, VisionConfig

    config = staged("sft")
    config.stage.train, config.stage.also = train, []
    vision = VisionConfig(
        hidden_size=128, num_layers=4, num_global_layers=2, num_heads=2, mlp_size=512,
        image_size=56, patch_size=14, max_tiles=1, intermediate_layers=[1],
        frames_per_chunk=frames_per_chunk, kept_frames=kept_frames,
    )  # fmt: skip
    text = TextConfig(
        vocab_size=vocabulary, hidden_size=256, num_layers=4, cross_attention_layers=[1],
        num_heads=4, num_kv_heads=2, mlp_size=768,
    )  # fmt: skip
    config.model = ModelConfig(vision=vision, text=text, kernels="torch")
    config.parallel = ParallelConfig(**layout)
    config.data.max_tiles, config.data.micro_batch = 1, micro
    return config


def peak(memory: LiveMemory, samples: int = 2, **run: Any) -> dict[str, Any]:
    """Bytes at the peak of the second step and after it, and what was predicted."""
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model.moss_video import MossVideo
    from moss_train.parallel.distribute import read_step
    from moss_train.parallel.packing import Bounds
    from moss_train.parallel.process_groups import build_groups
    from moss_train.train.activations import Batch
    from moss_train.train.guard import Guard
    from moss_train.train.memory_check import peak_bytes
    from moss_train.train.optimizer import make_train_state
    from moss_train.train.param_groups import freeze
    from moss_train.train.step import TrainStep

    gc.collect()
    begun = memory.now
    config = configured(**run)
    micro = config.data.micro_batch
    groups = build_groups(config.parallel, seed=1)
    model = MossVideo(config.model, config.parallel, groups)
    fill(model, random_reader(config.model, seed=8))
    state = make_train_state(model, config, freeze(model, config.stage.train))
    step = TrainStep(config, model, state, silence_id=11, guard=Guard(None, [], 0))
    reads = samples // groups.data_size
    made = iter(lambda: collate([_sample(config)], pad_token_id=4), None)
    loader = made if groups.is_leader else None
    shape = (1, 3, config.model.vision.image_size, config.model.vision.image_size)
    for _ in range(2):
        memory.restart()
        batch = read_step(loader, reads, Bounds(micro), 8, shape, groups, step.exchange.shares)
        step(batch)
        del batch
        gc.collect()
    size = Batch(
        tokens=micro * TOKENS,
        labels=micro * (TOKENS - FRAMES - 2),
        frames=micro * FRAMES,
        masked=0,
        microbatches=reads // micro,
        step_frames=reads * FRAMES,
    )
    predicted = peak_bytes(config, dist.get_world_size(), size)
    return {
        "peak": memory.peak - begun,
        "rest": memory.now - begun,
        "predicted": predicted,
        "batch": asdict(size),
    }


def _sample(config: Any) -> EncodedSample:
    """Its frames, then text, all of which has labels."""
    tokens = torch.randint(20, 512, (TOKENS,))
    positions = torch.arange(FRAMES) + 1
    tokens[positions] = config.model.text.vocab_size
    labels = tokens.clone()
    labels[: FRAMES + 2] = -100
    size = config.model.vision.image_size
    pixels = torch.randint(0, 255, (FRAMES, 1, 3, size, size), dtype=torch.uint8)
    ratios = torch.ones(FRAMES, dtype=torch.long)
    return EncodedSample("made/1", tokens, labels, pixels, positions, ratios)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
