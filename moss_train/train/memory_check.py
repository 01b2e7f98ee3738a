"""What a job needs of each rank's memory: seen before anything is built."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace

from data_pipeline import cgroups
from data_pipeline.ranks import ranks_of, ranks_of_machine
from moss_train import hardware
from moss_train.config import Config, ConfigError
from moss_train.log import log
from moss_train.model.hf_mapping import our_shape, parameters_of, table
from moss_train.train.activations import Batch, DecoderActivations
from moss_train.train.chunk_size import (
    MOMENTS,
    kept_by_frame,
    kept_by_projector,
    largest_chunk,
    passing_of_frame,
)

RECOMPUTE = ("none", "selective", "full")  # from the most memory to the least
ROOM = 0.9  # of a rank's memory: what a prediction may fill that is made to be followed
GRADIENT = 4  # bytes a trained parameter, in fp32
MAIN = 4  # the fp32 copy of weights in bf16; shared by the data-parallel ranks, as the moments are


def check_fits(config: Config) -> None:
    """Refuses a job of which a rank has not the memory: on a CPU, for weights, gradients and
    optimizer; on a GPU, for the largest microbatch that the configuration allows, too.

    Raises:
        ConfigError: names what is needed, what is there, and what to change.
    """
    ranks = ranks_of().size
    needed = least_bytes(config, ranks)
    device, available = _memory(config.hardware.device)
    layout = config.parallel
    if sum(needed.values()) > available:
        raise ConfigError([
            f"each rank needs at least {_described(needed)}, {device} has {available / 1e9:.1f}: "
            f"more ranks with a larger parallel.tensor ({layout.tensor}) or parallel.pipeline "
            f"({layout.pipeline}), more data-parallel ranks, which share the optimizer, a smaller "
            "model, or fewer parts in stage.train"
        ])  # fmt: skip
    if hardware.kind_of(config.hardware.device) == "cpu":
        return
    batch = largest_batch(config, ranks)
    needed = peak_bytes(config, ranks, batch)
    if sum(needed.values()) > available:
        raise ConfigError([
            f"a microbatch of {batch.tokens} tokens and {batch.frames} frames, as large as the "
            f"configuration allows, needs {_described(needed)} on a rank, {device} has "
            f"{available / 1e9:.1f}: {_remedies(config, ranks, batch)}"
        ])  # fmt: skip
    if ranks_of().rank == 0:
        more = _room_for_frames(config, ranks, available)
        log.info(
            "memory at the peak of a step: %s of %.1f%s", _described(needed), available / 1e9, more
        )


def _room_for_frames(config: Config, ranks: int, available: int) -> str:
    """What `model.vision.kept_frames` could be, where it is 0: whole chunks that are predicted to
    fit 0.9 of the memory, since a prediction may be off by a tenth."""
    vision = config.model.vision
    trains = any(map(config.trains, parameters_of(config.model, "vision")))
    if vision.kept_frames or not (vision.recompute and trains):
        return ""

    def needed(kept: int) -> int:
        own = replace(config, model=replace(config.model, vision=replace(vision, kept_frames=kept)))
        return sum(peak_bytes(own, ranks, largest_batch(own, ranks)).values())

    chunk = vision.frames_per_chunk or largest_chunk(vision)
    sizes = range(0, _frames_of_step(config, ranks) // _shares(config) + chunk, chunk)
    fitting = sizes[max(0, bisect_right(sizes, ROOM * available, key=needed) - 1)]
    if not fitting:
        return ""
    return f"; {needed(fitting) / 1e9:.1f} with model.vision.kept_frames={fitting}"


def _described(needed: dict[str, int]) -> str:
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in needed.items() if size)
    return f"{sum(needed.values()) / 1e9:.1f} GB ({parts})"


def _remedies(config: Config, ranks: int, batch: Batch) -> str:
    """Fields to change for a batch that does not fit."""
    data, layout = config.data, config.parallel
    recomputing = [
        f"parallel.recompute={kind} ({sum(peak_bytes(other, ranks, batch).values()) / 1e9:.1f} GB)"
        for kind in RECOMPUTE[RECOMPUTE.index(layout.recompute) + 1 :]
        for other in [replace(config, parallel=replace(layout, recompute=kind))]
    ]
    smaller = [
        f"a smaller data.max_tokens_per_batch ({config.microbatch_tokens})",
        f"data.max_frames_per_batch ({config.microbatch_frames})",
        f"data.micro_batch ({'null' if data.micro_batch is None else data.micro_batch})",
        f"data.sequence_length ({config.sequence_length})",
        f"model.vision.frames_per_chunk ({config.model.vision.frames_per_chunk or 'null'})",
    ]
    if config.model.vision.kept_frames:
        smaller.append(f"model.vision.kept_frames ({config.model.vision.kept_frames})")
    return f"{', '.join([*recomputing, *smaller])}, or a larger parallel.tensor ({layout.tensor})"


def largest_batch(config: Config, ranks: int) -> Batch:
    """A step of one such microbatch for each stage of the pipeline: as many tokens and frames as
    the bounds allow, or one sample that is longer. All that is not a frame is learned. Where frames
    are kept (`model.vision.kept_frames`), it has as many.
    """
    data, stage, layout = config.data, config.stage, config.parallel
    samples = max(1, _samples(config, ranks) // layout.pipeline)
    samples = min(samples, data.micro_batch or samples)
    longest = config.sequence_length
    tokens = max(longest, min(config.microbatch_tokens, samples * longest))
    tokens = -(-tokens // data.pad_multiple) * data.pad_multiple
    of_sample = _frames_of_sample(config)
    frames = max(of_sample, min(config.microbatch_frames, samples * of_sample))
    frames = min(frames, tokens - 1)
    # A token of a stream sees the frames before it: on average half of them. The frames of clips
    # and pictures stand before all text that sees them, which takes no mask.
    masked = tokens * frames // 2 if stage.prompt == "realtime" else 0
    count = layout.pipeline
    kept = min(config.model.vision.kept_frames * _shares(config), _frames_of_step(config, ranks))
    return Batch(tokens, tokens - frames, frames, masked, count, max(count * frames, kept))


def _samples(config: Config, ranks: int) -> int:
    """Of a replica's step."""
    replicas = max(1, ranks // (config.parallel.tensor * config.parallel.pipeline))
    return max(1, config.data.global_batch // replicas)


def _frames_of_sample(config: Config) -> int:
    most = {"text": 0, "image": 1, "video": config.stage.video_max_frames}
    return max(most[modality] for modality in config.stage.mixture.shares)


def _frames_of_step(config: Config, ranks: int) -> int:
    """The most that a replica's step can have."""
    return _samples(config, ranks) * _frames_of_sample(config)


def _shares(config: Config) -> int:
    """Ranks of a replica among which frames are split."""
    layout = config.parallel
    return layout.pipeline * layout.tensor // layout.vision_slices


def least_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes of one of `ranks` ranks, by what they are for: the mean of a pipeline's stages.

    With the activations of one frame where the tower trains. Adapters (`adapter`) are left out.
    """
    layout, model = config.parallel, config.model
    weight = hardware.DTYPES[model.dtype].itemsize
    optimizer = MOMENTS + (MAIN if model.dtype == "bf16" else 0)
    sums = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, "activations of a frame": 0.0}
    for rule in table(model):
        decoder = rule.ours.startswith("decoder.")
        slices = layout.tensor if decoder else layout.vision_slices
        stages = layout.pipeline if decoder else 1
        count = math.prod(our_shape(model, rule)) / stages
        count /= slices if rule.split is not None else 1
        sums["weights"] += weight * count
        if not config.trains(rule.ours):
            continue
        sums["gradients"] += GRADIENT * count
        sums["optimizer"] += optimizer * count / (ranks // (slices * stages))
        if rule.ours.startswith("vision"):
            sums["activations of a frame"] = kept_by_frame(config)
    return {part: round(size) for part, size in sums.items()}


def peak_bytes(config: Config, ranks: int, batch: Batch) -> dict[str, int]:
    """Bytes of one of `ranks` ranks at the peak of a step, by what they are for: in the first or
    the last stage of a pipeline, or when the tower's gradients are computed.
    """
    parts = least_bytes(config, ranks)
    frame = parts.pop("activations of a frame")
    layout, model = config.parallel, config.model
    decoder = DecoderActivations(config, batch)
    # Frames that this rank encodes; bytes of a frame's projected states, and of their gradient.
    own = math.ceil(batch.step_frames / _shares(config))
    state = decoder.patches * decoder.width * decoder.size
    gradient = state * decoder.states_train
    pixels = config.data.max_tiles * 3 * model.vision.image_size**2
    parts["frames"] = own * pixels + batch.step_frames * state
    recomputes, keeps = frame > 0 and model.vision.recompute, model.vision.kept_frames > 0
    chunk = min(own, model.vision.frames_per_chunk or (largest_chunk(model.vision) if keeps else 1))
    # The graphs of these frames are kept while the decoder works.
    once = model.vision.kept_of(own, chunk) if recomputes else own
    kept = once * (frame + kept_by_projector(config)) * decoder.states_train
    # Frames whose gradients wait on this rank until they are summed (parallel/exchange.py).
    waiting = batch.frames if layout.pipeline == 1 else batch.step_frames
    decoding = max(decoder.at_peak(stage) for stage in (0, layout.pipeline - 1))
    # The memory of the kept ones is free before others are encoded again.
    encoding = own * gradient + max(kept, chunk * frame if own > once else 0.0)
    if frame > 0:
        encoding += chunk * passing_of_frame(config)
    parts["activations"] = round(max(decoding + waiting * gradient + kept, encoding))
    return parts


def _memory(kind: str) -> tuple[str, int]:
    """What this rank computes on, and the bytes that it has."""
    if kind != "cpu" and hardware.has_accelerator():
        return hardware.device_name(), hardware.total_memory()
    here = ranks_of_machine()
    return f"this machine's share for one of {here} ranks", cgroups.memory() // here
