"""How many frames a tower that trains encodes at once: as many as fit.

A chunk's activations are there in its backward pass alone, whatever else a step has, but for those
that are kept for it (parallel/exchange.py). Larger chunks keep a GPU busier: of 16 frames a step
took 3 % less than of 4 (an H200).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moss_train import hardware
from moss_train.config import Config
from moss_train.log import log
from moss_train.model.moss_video import MossVideo
from moss_train.model.projector import pooled_tokens
from moss_train.model.vision import rows_of_tile
from moss_train.model_config import MOST_FRAMES_PER_CHUNK, VisionConfig
from moss_train.train.optimizer import TrainState

MOMENTS = 8  # bytes of a parameter, in fp32


def frames_per_chunk(config: Config, model: MossVideo, state: TrainState) -> int:
    """`model.vision.frames_per_chunk`, or what fits where it is null; that is logged. A collective.

    Null stands for 16 where a chunk's size is not what fills the memory: on a CPU, for a frozen
    tower, and where all chunks are kept. In deterministic runs, too: another size adds gradients in
    another order, and a resumed run may find other memory. It is never more than the frames that
    are to be kept (`model.vision.kept_frames`): a chunk is kept as a whole.
    """
    vision = config.model.vision
    if vision.frames_per_chunk is not None:
        return vision.frames_per_chunk
    most = largest_chunk(vision)
    if (
        not hardware.on_accelerator()
        or not any(p.requires_grad for p in model.encoder.vision.parameters())
        or not vision.recompute
        or config.trainer.deterministic
    ):
        return most
    free = hardware.free_memory() - moments_to_come(state)
    frame = kept_by_frame(config)
    # All ranks have the same: those of a sharded tower encode together.
    where = next(model.encoder.parameters()).device
    least = torch.tensor(float(free), device=where)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    size = fitting_chunk(int(least.item()), frame, most)
    log.info(
        "vision encoder: %d frames at once, %.1f GB of activations of %.1f GB that are free",
        size, size * frame / 1e9, least.item() / 1e9,
    )  # fmt: skip
    return size


def largest_chunk(vision: VisionConfig) -> int:
    """What `model.vision.frames_per_chunk=null` stands for where memory sets no bound."""
    return _power_of_two(min(MOST_FRAMES_PER_CHUNK, vision.kept_frames or MOST_FRAMES_PER_CHUNK))


def fitting_chunk(free: int, frame: int, most: int = MOST_FRAMES_PER_CHUNK) -> int:
    """The largest power of two, up to `most`, of frames of `frame` bytes that fit half of
    `free`."""
    return _power_of_two(max(1, min(most, free // 2 // frame)))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def kept_by_frame(config: Config) -> int:
    """Bytes of activations that the tower keeps of a frame for its backward pass, on a rank.

    Of each row of width D, with an MLP of M: the input of both norms, Q, K, V and what the
    attention gives, the MLP's hidden states; and, unless they are computed again, the outputs of
    both norms and of GELU: 6 D + M or 8 D + 2 M. Global layers keep 2 D more, for their gates, and
    what is before and between the layers 3 D and the pixels. Tensor ranks that share a tower have
    parts of Q, K, V, of what the attention gives and of the MLP; all else each of them has whole.
    """
    vision, model = config.model.vision, config.model
    again = config.parallel.recompute != "none"
    slices = config.parallel.vision_slices
    row = 2 * vision.hidden_size + (4 * vision.hidden_size + vision.mlp_size) // slices
    if not again:
        row += 2 * vision.hidden_size + vision.mlp_size // slices
    rows = config.data.max_tiles * rows_of_tile(vision, model.attention)[0]
    layers = vision.num_layers + vision.num_global_layers
    elements = row * layers + (2 * vision.num_global_layers + 3) * vision.hidden_size
    pixels = config.data.max_tiles * 3 * vision.image_size**2
    return (rows * elements + pixels) * hardware.DTYPES[model.dtype].itemsize


def kept_by_projector(config: Config) -> int:
    """Bytes that the projector keeps of a frame: the input of its linear layer, and of the
    convolution that pools, where there is one."""
    model = config.model
    rows = pooled_tokens(model)
    if model.projector.pool == "channel_fusion":
        rows += model.vision.num_patches
    size = hardware.DTYPES[model.dtype].itemsize
    return config.data.max_tiles * rows * model.vision.output_size * size


def passing_of_frame(config: Config) -> int:
    """Bytes that the backward pass of a tower's layer needs for a frame beside `kept_by_frame`:
    what GELU gives, its gradient and that of its input."""
    vision, model = config.model.vision, config.model
    rows = config.data.max_tiles * rows_of_tile(vision, model.attention)[0]
    inner = vision.mlp_size // config.parallel.vision_slices
    return 3 * rows * inner * hardware.DTYPES[model.dtype].itemsize


def moments_to_come(state: TrainState) -> int:
    """Bytes of the moments that the first update will make on this rank."""
    return sum(
        MOMENTS * parameter.numel()
        for adam in state.optimizer.adams()
        for group in adam.param_groups
        for parameter in group["params"]
        if not adam.state.get(parameter)
    )
