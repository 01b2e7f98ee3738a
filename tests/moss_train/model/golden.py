"""Golden cases, run through the model in any parallel layout, and compared.

Used in the test process (one process) and by tests/workers/golden.py (several). Every rank encodes
all frames here; the frame exchange has its own tests.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from moss_train.config import ParallelConfig
from moss_train.convert.hf_config import model_config_from_hf
from moss_train.convert.weights import export, fill
from moss_train.model.groups import Groups
from moss_train.model.moss_video import MossVideo
from moss_train.model.vision import concatenate_states
from moss_train.model_config import ModelConfig
from moss_train.parallel.schedule import run_logits, run_schedule
from moss_train.verify.case import Case
from moss_train.verify.forward import greedy_tokens, row_input
from tools.differences import largest

CASES = ("image", "video", "video_padded", "realtime")
MLLAMA = Path(__file__).resolve().parents[2] / "golden" / "mllama.safetensors"
SILENCE = 11


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
        silence_id=SILENCE,
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

    items = [row_input(model, case, row, leaf) for row in range(batch)]
    total = torch.tensor(float(sum(item.targets.count for item in items)))
    logits = run_logits(model.chunks, items)
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
        out["greedy"] = greedy_tokens(model, case, leaf.detach(), len(case.expected["greedy"]))
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
            worst["gradients"] = largest([worst.get("gradients", 0.0), off])
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
