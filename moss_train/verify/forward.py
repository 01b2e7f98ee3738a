"""A case through a checkpoint in any layout: torchrun -m moss_train.verify.forward JOB.json

The job names the checkpoint, the case, the layout, and where results go.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL
from moss_train import hardware
from moss_train.checkpoint_dir import read_run
from moss_train.config import HardwareConfig, ParallelConfig, from_dict
from moss_train.imports import quick_imports
from moss_train.validate import for_reading
from moss_train.verify.case import Case, ForwardJob, read_case

with quick_imports():
    from moss_train.model.frame_plan import NEVER, FramePlan, plan_frames
    from moss_train.model.loss import LossOptions
    from moss_train.model.moss_video import MossVideo
    from moss_train.parallel.process_groups import build_groups
    from moss_train.parallel.schedule import DecoderInput, decoder_input, run_logits, run_schedule
    from moss_train.train.checkpoint import load_weights
    from moss_train.train.process import start_process_group


def main(job: ForwardJob) -> None:
    """Runs on each rank; the last stage's first rank writes the results."""
    config = from_dict(read_run(Path(job.checkpoint))["config"])
    config.parallel = ParallelConfig(**job.parallel)
    config.hardware = HardwareConfig(device=job.device)
    config.model = for_reading(replace(config.model, dtype=job.dtype), job.device)
    start_process_group(config)
    groups = build_groups(config.parallel, seed=0)
    model = MossVideo(config.model, config.parallel, groups)
    load_weights(model, Path(job.checkpoint))
    case = read_case(Path(job.case), job.image_id, job.silence_id, job.silence_weight)
    out = run_forward(model, case, job.greedy)
    if dist.get_rank() == dist.get_world_size() - 1:  # on the last stage
        save_file({name: tensor.cpu().contiguous() for name, tensor in out.items()}, job.out)
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def run_forward(model: MossVideo, case: Case, greedy: int) -> dict[str, Tensor]:
    """`logits` `[B, S, V]` and `loss` `[1]` (of the last stage), `greedy` tokens. A collective.

    Not for interleaved chunks (`parallel.virtual`), whose schedule wants more than one microbatch.
    """
    device = hardware.device()
    dtype = model.encoder.vision.class_embedding.dtype
    pixels = case.pixels.flatten(0, 1).to(device, dtype)
    states = model.encoder(pixels, case.ratio_ids.flatten().to(device))
    items = [row_input(model, case, row, states) for row in range(len(case.tokens))]
    count = float(sum(item.targets.count for item in items))
    logits = run_logits(model.chunks, items)
    loss = run_schedule(model.chunks, items, torch.tensor(count, device=device), forward_only=True)
    out = {"loss": loss[None].float()}
    if greedy:
        out["greedy"] = greedy_tokens(model, case, states, greedy)
    if logits:
        out["logits"] = torch.stack(logits)[:, : case.tokens.shape[1]].float()
    return out


def plan_case(
    positions: Tensor, mask: Tensor, lengths: list[int], attend_all: bool, total: int | None = None
) -> FramePlan:
    """FramePlan of a batch in HF's form, its rows packed one after the other.

    Args:
        positions: index of each frame's `<|image|>` token `[B, F]`.
        mask: cross_attention_mask `[B, S, F, T]`; a frame that no token sees is padding.
        lengths: tokens of each row without padding.
        attend_all: as in plan_frames.
        total: length of the packed rows with padding; None: there is none.
    """
    mask = mask.bool()
    batch, length, count, max_tiles = mask.shape
    sees = mask.any(3)  # [B, S, F]
    padding = ~sees.any(1)  # [B, F]
    first = sees.int().argmax(1).masked_fill(padding, NEVER)
    last = length - sees.flip(1).int().argmax(1)
    return plan_frames(
        torch.arange(batch).repeat_interleave(count),
        positions.flatten(),
        lengths,
        sum(lengths) if total is None else total,
        visible_from=first.flatten(),
        visible_until=last.masked_fill(padding, NEVER).flatten(),
        tiles=mask.any(1).sum(2).flatten(),
        max_tiles=max_tiles,
        attend_all=attend_all,
    )


def row_input(model: MossVideo, case: Case, row: int, states: Tensor) -> DecoderInput:
    """One row of a case as a microbatch; `states` are of the whole case `[B x F, T x P, H]`."""
    rows, lengths = slice(row, row + 1), case.lengths[row : row + 1]
    tokens, labels = (
        _padded(model, case.tokens[row]),
        _padded(model, case.labels[row], IGNORED_LABEL),
    )
    plan = plan_case(
        case.positions[rows], case.mask[rows], lengths, _attends_all(model), len(tokens)
    )
    own = states.unflatten(0, case.ratio_ids.shape)[row]
    options = LossOptions(case.silence_id, case.silence_weight)
    return decoder_input(tokens, labels, lengths, plan, own, options)


def _attends_all(model: MossVideo) -> bool:
    return model.config.tokens_before_first_frame == "attend_all"


def _padded(model: MossVideo, row: Tensor, value: int = 0) -> Tensor:
    """A row that sequence-parallel ranks can share evenly."""
    return torch.nn.functional.pad(row, (0, -len(row) % model.parallel.tensor), value=value)


def greedy_tokens(model: MossVideo, case: Case, states: Tensor, count: int) -> Tensor:
    """Greedy tokens that follow the first row, each from a full forward pass. A collective."""
    own, last = case.lengths[0], dist.get_world_size() - 1  # the last rank is on the last stage
    tokens, mask = case.tokens[0, :own], case.mask[:1, :own]
    states = states[: case.ratio_ids.shape[1]]
    new: list[Tensor] = []
    while len(new) < count:
        row, lengths = _padded(model, tokens), [len(tokens)]
        plan = plan_case(case.positions[:1], mask, lengths, _attends_all(model), len(row))
        unlabelled = torch.full_like(row, IGNORED_LABEL)
        item = decoder_input(row, unlabelled, lengths, plan, states, LossOptions(-1))
        with torch.no_grad():
            logits = run_logits(model.chunks, [item])
        best = torch.zeros((), dtype=torch.long, device=hardware.device())
        best = logits[0][len(tokens) - 1].argmax() if logits else best
        dist.broadcast(best, last)
        new.append(best.cpu())
        tokens = torch.cat((tokens, best.cpu()[None]))
        mask = torch.cat((mask, mask[:, -1:]), dim=1)
    return torch.stack(new)


if __name__ == "__main__":
    main(ForwardJob(**json.loads(Path(sys.argv[1]).read_text())))
