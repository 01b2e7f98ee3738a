"""Golden cases, run through the model in any parallel layout, and compared.

Used in the test process (one process) and by tests/workers/golden.py (several). Every rank encodes
all frames here; the frame exchange has its own tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torch import Tensor

from moss_train.config import ModelConfig, ParallelConfig
from moss_train.convert.hf_config import model_config_from_hf
from moss_train.convert.weights import export, fill
from moss_train.model.loss import LossOptions, find_targets
from moss_train.model.moss_video import MossVideo
from moss_train.model.text import PackedText
from moss_train.model.vision import concatenate_states
from moss_train.parallel.groups import Groups
from moss_train.parallel.schedule import DecoderInput, run_schedule
from tests.model.build import frames_of_batch

CASES = ("image", "video", "video_padded", "realtime")
MLLAMA = Path(__file__).resolve().parents[1] / "golden" / "mllama.safetensors"
SILENCE = 11


@dataclass
class Case:
    """A batch in HF's form, and what the reference made of it."""

    tokens: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    pixels: Tensor  # [B, F, T, 3, h, w]
    ratio_ids: Tensor  # [B, F]
    positions: Tensor  # [B, F]
    mask: Tensor  # [B, S, F, T]
    silence_weight: float
    expected: dict[str, Tensor]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row without padding."""
        return self.attention_mask.sum(1).tolist()


def golden_model(folder: Path, parallel: ParallelConfig, groups: Groups) -> MossVideo:
    """The model of a folder with config.json and model.safetensors."""
    model = model_config_from_hf(folder / "config.json")
    return _loaded(model, load_file(folder / "model.safetensors"), parallel, groups)


def mllama_model(parallel: ParallelConfig, groups: Groups) -> MossVideo:
    """The model of tests/golden/mllama.safetensors."""
    model = model_config_from_hf(MLLAMA.with_suffix(".json"))
    tensors = load_file(MLLAMA)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return _loaded(model, weights, parallel, groups)


def _loaded(
    model: ModelConfig, weights: dict[str, Tensor], parallel: ParallelConfig, groups: Groups
) -> MossVideo:
    built = MossVideo(model, parallel, groups)
    fill(built, lambda name, shape: weights[name])
    return built


def golden_case(folder: Path, name: str) -> Case:
    """A case of the golden numbers of MOSS-Video."""
    tensors = load_file(folder / f"{name}.safetensors")
    return _case(tensors, tensors["vision_position_ids"], silence_weight=0.1)


def mllama_case() -> Case:
    """The case of tests/golden. Its cross-attention knows no positions: any will do."""
    tensors = load_file(MLLAMA)
    return _case(tensors, torch.zeros_like(tensors["aspect_ratio_ids"]), silence_weight=1.0)


def _case(tensors: dict[str, Tensor], positions: Tensor, silence_weight: float) -> Case:
    return Case(
        tokens=tensors["input_ids"],
        labels=tensors["labels"],
        attention_mask=tensors["attention_mask"],
        pixels=tensors["pixel_values"],
        ratio_ids=tensors["aspect_ratio_ids"],
        positions=positions,
        mask=tensors["cross_attention_mask"],
        silence_weight=silence_weight,
        expected=tensors,
    )


def run_case(model: MossVideo, case: Case) -> dict[str, Tensor]:
    """Everything that the golden numbers hold, of this rank; each row is a microbatch.

    Logits and loss are those of the last pipeline stage (elsewhere absent), gradients those of the
    parameters that this rank's stage holds.
    """
    groups, batch = model.groups, len(case.tokens)
    for _, parameter in model.named_parameters():
        parameter.grad = None
    final, states = model.encoder.vision(case.pixels.flatten(0, 1), case.ratio_ids.flatten())
    pooled = model.encoder.projector.pool_states(final, states)
    projected = model.encoder.projector(pooled)
    leaf = projected.detach().requires_grad_()

    items = [_input(model, case, row, leaf) for row in range(batch)]
    total = torch.tensor(float(sum(item.targets.count for item in items)))
    logits = _logits(model, items)
    loss = run_schedule(model.chunks, items, total)
    assert leaf.grad is not None
    dist.all_reduce(leaf.grad, group=groups.replica)
    projected.backward(leaf.grad)

    images = case.ratio_ids.shape
    out = {
        "vision_output": concatenate_states(final, states).unflatten(0, images),
        "pooled": pooled.unflatten(0, images),
        "projected": projected.view(*images, *pooled.shape[1:3], -1),
        **{f"grad.{name}": value for name, value in gradients(model).items()},
    }
    if groups.is_last_stage:
        out |= {"logits": torch.stack(logits), "loss": loss[None]}
    if "greedy" in case.expected:
        out["greedy"] = _greedy(model, case, leaf.detach())
    return {name: value.detach() for name, value in out.items()}


def gradients(model: MossVideo) -> dict[str, Tensor]:
    """Whole gradients by HF name, of the parameters on this pipeline stage. A collective."""
    for _, parameter in model.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if getattr(parameter, "partial_over_tensor", False):
            dist.all_reduce(parameter.grad, group=model.groups.decoder.tp)

    def gradient(parameter: torch.nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    return export(model, gradient)


def _input(model: MossVideo, case: Case, row: int, states: Tensor) -> DecoderInput:
    """One row of the batch; `states` are of the whole batch `[B x F, T x P, H]`."""
    rows, lengths = slice(row, row + 1), case.lengths[row : row + 1]
    attend_all = model.config.blind_rows == "attend_all"
    frames = frames_of_batch(
        case.positions[rows], case.mask[rows], lengths, attend_all, case.tokens.shape[1]
    )
    frames.states = states.unflatten(0, case.ratio_ids.shape)[row]
    targets = find_targets(case.labels[row], lengths, LossOptions(SILENCE, case.silence_weight))
    return DecoderInput(PackedText(case.tokens[row], lengths), frames, targets)


def _logits(model: MossVideo, items: list[DecoderInput]) -> list[Tensor]:
    """Logits of each microbatch `[T, V]`, on the last stage."""
    iterator = iter(items)

    def forward(_: object, chunk: torch.nn.Module):
        item = next(iterator)
        return chunk(item.text, item.frames), lambda logits, non_loss_data: logits

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=list(model.chunks),
        num_microbatches=len(items),
        seq_length=len(items[0].text.tokens),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _greedy(model: MossVideo, case: Case, states: Tensor) -> Tensor:
    """Greedy tokens that follow the first row, each from a full forward pass."""
    length = case.lengths[0]
    tokens, mask = case.tokens[0, :length], case.mask[:1, :length]
    new: list[Tensor] = []
    count = case.ratio_ids.shape[1]
    attend_all = model.config.blind_rows == "attend_all"
    while len(new) < len(case.expected["greedy"]):
        frames = frames_of_batch(case.positions[:1], mask, [len(tokens)], attend_all)
        frames.states = states[:count]
        text = PackedText(tokens, [len(tokens)])
        item = DecoderInput(text, frames, find_targets(tokens, text.lengths, LossOptions(SILENCE)))
        with torch.no_grad():
            logits = _logits(model, [item])
        best = logits[0][-1].argmax() if logits else torch.zeros((), dtype=torch.long)
        dist.broadcast(best, dist.get_world_size() - 1)  # the last rank is on the last stage
        new.append(best)
        tokens = torch.cat((tokens, best[None]))
        mask = torch.cat((mask, mask[:, -1:]), dim=1)
    return torch.stack(new)


def differences(case: Case, got: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each kind: absolute, but of gradients relative to their norm."""
    kept = case.attention_mask.bool()
    worst: dict[str, float] = {}
    for name, value in got.items():
        if name not in case.expected:
            continue
        wanted = case.expected[name]
        if name.startswith("grad."):
            off = ((value - wanted).norm() / wanted.norm()).item()
            worst["gradients"] = max(worst.get("gradients", 0.0), off)
            continue
        if name == "logits":
            value, wanted = value[kept], wanted[kept]
        worst[name] = (value - wanted).abs().max().item()
    return worst


LIMITS = {
    "vision_output": 1e-4,
    "pooled": 1e-4,
    "projected": 1e-4,
    "logits": 1e-4,
    "loss": 1e-5,
    "gradients": 1e-3,
    "greedy": 0.0,
}
