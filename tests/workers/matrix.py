"""Trains the same small model in several layouts: matrix.py '[["tp2", {"tensor": 2}, CASES], ...]'.

CASES lists what is trained on what: [["all", "mixed"], ...].

For each layout and case, rank 0 saves losses, first-step gradients and final weights under their
HF names, what differs between replicas, and how many frames each rank encoded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import EncodedSample, MicroBatch, collate
from moss_train import hardware
from tests.workers.groups import end_groups

KINDS = ("text", "image", "video", "mixed")
CASES = [(train, kind) for train in ("all", "frozen_vision") for kind in KINDS]
STEPS, GLOBAL, MICRO = 8, 4, 2
PATTERNS = {
    "all": ["*"],
    "frozen_vision": ["projector.*", "decoder.*"],
    "pt1": ["projector.*"],
    "lora": ["projector.*"],
    "balanced": ["*"],
}
FRAMES = {"text": [0], "image": [1], "video": [5], "mixed": [0, 1, 5, 2]}


def main(runs: list[tuple[str, dict, list[tuple[str, str]]]]) -> None:
    hardware.activate("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from moss_train.config import ParallelConfig
    from moss_train.parallel.process_groups import build_groups
    from tests.torchrun import save_result

    # Groups are made once a layout.
    names = ("dtype", "micro", "steps", "round_lengths", "accumulate", "kept_frames")
    by_layout: dict[str, list[tuple[str, dict, list[tuple[str, str]]]]] = {}
    for name, layout, cases in runs:
        options = {key: layout.pop(key) for key in names if key in layout}
        by_layout.setdefault(json.dumps(layout, sort_keys=True), []).append((name, options, cases))
    for fields, own in by_layout.items():
        parallel = ParallelConfig(**json.loads(fields))
        groups = build_groups(parallel, seed=1)
        for name, options, cases in own:
            for train, kind in cases:
                result = train_case(parallel, groups, train, kind, **options)
                if dist.get_rank() == 0:
                    save_result(f"{name}-{train}-{kind}", result)
        end_groups()
    dist.barrier()
    dist.destroy_process_group()


def train_case(
    parallel, groups, train: str, kind: str, micro=MICRO, steps=STEPS, accumulate=False,
    kept_frames=0, **fields,
) -> dict:  # fmt: skip
    """Trains in one layout; what came of it. `accumulate`: products add up weight gradients.
    `kept_frames`: of its tower. `fields`: of its model, other ones."""
    from moss_train.config import Config, OptimizerConfig, TrainerConfig
    from moss_train.convert.weights import export
    from moss_train.parallel.distribute import read_step
    from moss_train.parallel.packing import Bounds
    from moss_train.train.guard import Guard
    from moss_train.train.optimizer import make_train_state
    from moss_train.train.param_groups import freeze
    from moss_train.train.step import TrainStep

    config = Config(
        model=replace(small_model("fp32"), **fields),
        parallel=parallel,
        # Adam divides by the gradient's size: a larger eps keeps rounding of zeros out of weights.
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-6),
        trainer=TrainerConfig(steps=STEPS),
    )
    config.model.vision.kept_frames = kept_frames
    config.stage.silence_weight = 0.1
    if train == "balanced":
        config.loss.name = "state_balanced"
    model = drawn_model(config, groups, train == "lora", accumulate)
    state = make_train_state(model, config, freeze(model, PATTERNS[train]))
    step = TrainStep(config, model, state, silence_id=11, guard=Guard(None, [], 0))
    per_replica = GLOBAL // micro // groups.data_size
    batches = None
    if groups.is_leader:
        batches = microbatches(kind, groups.data_rank, per_replica, micro)

    bounds = Bounds(micro, multiple=parallel.pipeline if parallel.virtual > 1 else 1)
    results, encoded, gradients = [], [], first_gradients(step, groups)
    for _ in range(steps):
        batch = read_step(
            batches, per_replica, bounds, 8, (1, 3, 56, 56), groups, step.exchange.shares
        )
        encoded.append(_gather(len(batch.frames)))
        results.append(step(batch))
    state.gather_parameters()
    return {
        "losses": [result.loss for result in results],
        "weighted": [result.weighted_loss for result in results],
        "norms": [result.grad_norm for result in results],
        "kept": [result.kept_frames for result in results],
        "gradients": gradients,
        "weights": _merge(export(model)),
        "adapters": _merge(
            {n: t for n, t in export(model, torch.Tensor.detach).items() if "lora_" in n}
        ),
        "encoded": encoded,
        "shares": step.exchange.shares,
        **_compared(model),
    }


def _compared(model) -> dict:
    """What differs between replicas; and what is noticed, once one rank has another norm."""
    from moss_train.parallel.replicas import differing_replicas

    differing = differing_replicas(model)
    if dist.get_rank():
        model.encoder.vision.norm_post.weight.data[0] += 1
    noticed = differing_replicas(model)
    return {"differing": differing, "noticed": noticed, "ranks": dist.get_world_size()}


def first_gradients(step, groups) -> dict[str, Tensor]:
    """Gets those of the first step that is made, between its backward pass and its update."""
    from moss_train.convert.weights import export

    gradients: dict[str, Tensor] = {}
    compute = step.forward_backward

    def first(*arguments):
        done = compute(*arguments)
        _whole_gradients(step.state, groups)
        gradients.update(_merge(export(step.model, _gradient)))
        step.forward_backward = compute
        return done

    step.forward_backward = first
    return gradients


def drawn_model(config, groups, lora: bool, accumulate: bool):
    """With an adapter, or with products that add up weight gradients."""
    from moss_train.config import AdapterConfig
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model import weight_gradient
    from moss_train.model.choose_kernels import install
    from moss_train.model.kernels import Kernels
    from moss_train.model.moss_video import MossVideo

    adapter = AdapterConfig("lora", rank=4, alpha=8.0) if lora else None
    kernels = Kernels(accumulate=weight_gradient.accumulate) if accumulate else None
    if accumulate:
        install(weight_gradient.accumulate)
    model = MossVideo(config.model, config.parallel, groups, adapter, kernels)
    fill(model, uneven(random_reader(config.model, seed=8)))
    return model


def uneven(read):
    """As `read`, with a B of adapters that is not zero: else A would have no gradient."""

    def reader(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("lora_b"):
            return 0.3 * read(name.replace("lora_b", "lora_a"), shape)
        return read(name, shape)

    return reader


def small_model(dtype: str):
    """4 layers for 4 stages, or 2 of 2 chunks each; some of them without a cross-attention."""
    from moss_train.model_config import (
        InitConfig,
        ModelConfig,
        ProjectorConfig,
        TextConfig,
        VisionConfig,
    )

    return ModelConfig(
        name="small",
        vision=VisionConfig(
            hidden_size=32,
            num_layers=1,
            num_global_layers=1,
            num_heads=4,
            mlp_size=64,
            image_size=56,
            patch_size=14,
            intermediate_layers=[0],
            frames_per_chunk=3,
        ),
        projector=ProjectorConfig("average", 2),
        text=TextConfig(
            vocab_size=512,
            hidden_size=64,
            num_layers=4,
            cross_attention_layers=[1, 3],
            num_heads=8,
            num_kv_heads=4,
            mlp_size=128,
        ),
        init=InitConfig(std=0.1, gate=0.5),
        dtype=dtype,
    )


def microbatches(kind: str, replica: int, count: int, micro: int) -> Iterator[MicroBatch]:
    """This replica's share of an endless seeded stream: the same global batches in any layout."""
    step = 0
    while True:
        for number in range(replica * count, (replica + 1) * count):
            first = step * GLOBAL + number * micro
            yield collate([_sample(first + row, kind) for row in range(micro)], pad_token_id=4)
        step += 1


def _sample(index: int, kind: str) -> EncodedSample:
    generator = torch.Generator().manual_seed(index)
    frames = FRAMES[kind][index % len(FRAMES[kind])]
    length = int(torch.randint(20, 60, (1,), generator=generator))
    tokens = torch.randint(20, 512, (length,), generator=generator)
    image_at = torch.randperm(length - 8, generator=generator)[:frames].sort().values + 1
    tokens[image_at] = 512
    labels = tokens.clone()
    labels[image_at], labels[:5], labels[length - 3] = -100, -100, 11
    pixels = torch.randint(0, 255, (frames, 1, 3, 56, 56), dtype=torch.uint8, generator=generator)
    ones = torch.ones(frames, dtype=torch.long)
    return EncodedSample(f"{kind}/{index}", tokens, labels, pixels, image_at, ones)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    main = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter, dtype=torch.float32) if main is None else main


def _whole_gradients(state, groups) -> None:
    """Gathers the shards that the distributed optimizer's reduce-scatter leaves on each rank."""
    modules = [(chunk, groups.decoder.dp) for chunk in state.wrapped_chunks]
    if state.encoder is not None:
        modules.append((state.encoder, groups.vision.dp))
    for module, group in modules:
        for bucket_group in module.bucket_groups:
            for bucket in bucket_group.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _merge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On rank 0: all ranks' tensors in one dict (the stages of a pipeline have different ones).

    A rank's travel, and are saved, as one: a pickle of hundreds takes longer than a step.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    flat = None
    if tensors:
        (_,) = {tensor.dtype for tensor in tensors.values()}  # else cat would change one
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    everywhere: list[tuple] = [()] * dist.get_world_size()
    dist.gather_object((shapes, flat), everywhere if dist.get_rank() == 0 else None)
    return {
        name: part.view(shapes[name])
        for shapes, flat in filter(None, everywhere)
        for name, part in zip(shapes, _split(flat, shapes), strict=True)
    }


def _split(flat: Tensor | None, shapes: dict[str, torch.Size]) -> tuple[Tensor, ...]:
    return () if flat is None else flat.split([shape.numel() for shape in shapes.values()])


def _gather(value: int) -> list[int]:
    everywhere = [0] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
