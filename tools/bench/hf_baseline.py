"""Trains the baseline of the training benchmark: transformers' Mllama, with plain PyTorch or DDP.

Built from the same sizes and weights, fed the same microbatches, with the same trained parameters
and the same AdamW. What differs from a bare MllamaForConditionalGeneration:

- a pooled grid: Mllama has no pooling, so the tower's output is average-pooled for the projector;
- `blind_slots`, during warm-up only: Mllama lets tokens before the first frame attend every frame
  slot of their row, also those that only pad it to the row with the most frames. They are masked
  while losses are compared; the steps that are measured run without this.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.parallel import DistributedDataParallel
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import BaseModelOutput

from data_pipeline.batch import IGNORED_LABEL, MicroBatch
from moss_train.config import Config, from_hydra
from moss_train.convert.hf_files import vision_section
from moss_train.model.hf_mapping import normalize_name
from moss_train.model_config import ModelConfig
from moss_train.presets import conf_dir

# Trained parts by the first word of our names -> how names on disk begin.
PARTS = {
    "vision": ("vision_model.",),
    "projector": ("multi_modal_projector.",),
    "decoder": ("language_model.",),
}


def comparable_config(
    stage: str, model: str, layout: str, data: str, run: Path, changes: list[str]
) -> Config:
    """The job's configuration, with the model in the form that transformers can compute.

    Plain Llama-3.2-Vision: one tile, its masks, no rotation in the cross-attention, tokens before
    the first frame attend all frames. transformers 5 cannot take the state that enters the tower's
    first layer, so the intermediate states are shifted off it. Neither side recomputes activations
    and the learning rate is constant.

    Args:
        model, layout: presets of conf/model and conf/parallel.
        data: folder of the toy world.
        changes: further `field=value`.
    """
    presets = {
        "stage": stage, "model": model, "parallel": layout, "data": "toy",
        "optimizer": "adamw", "trainer": "default", "hardware": "cpu",
    }  # fmt: skip
    raw = OmegaConf.create(
        {
            group: OmegaConf.load(conf_dir() / group / f"{name}.yaml")
            for group, name in presets.items()
        }
    )
    plain = {
        "model.cross_attention_rope": False,
        "model.tokens_before_first_frame": "attend_all",
        "model.vision.full_attention": False,
        "model.vision.max_tiles": 1,
        "model.vision.recompute": False,
        "stage.schedule": "constant",
        "stage.warmup_ratio": 0.0,
        "data.root": data,
        "trainer.steps": 1_000_000,
        "run.dir": str(run),
    }
    for field, value in plain.items():
        OmegaConf.update(raw, field, value, force_add=True)
    config = from_hydra(cast(Any, OmegaConf.merge(raw, OmegaConf.from_dotlist(changes))))
    vision = config.model.vision
    if 0 in vision.intermediate_layers:
        free = (i for i in range(1, vision.num_layers) if i not in vision.intermediate_layers)
        vision.intermediate_layers = sorted({*vision.intermediate_layers, next(free)} - {0})
    return config


def mllama_config(model: ModelConfig) -> MllamaConfig:
    """transformers' configuration of `model` (average pooling comes on top, see PooledVision)."""
    text, scaling = model.text, model.text.rope_scaling
    # Ours enter the named layers, those of transformers 5 leave them.
    left = [index - 1 for index in model.vision.intermediate_layers]
    return MllamaConfig(
        vision_config=vision_section(model) | {"intermediate_layers_indices": left},
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "intermediate_size": text.mlp_size,
            "cross_attention_layers": text.cross_attention_layers,
            "rms_norm_eps": text.norm_eps,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": text.rope_theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            },
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
        image_token_index=text.vocab_size,
    )


class PooledVision(nn.Module):
    """Mllama's vision model, its patch grid pooled; the class token is kept apart."""

    def __init__(self, tower: nn.Module, grid: int, stride: int):
        super().__init__()
        self.tower, self.grid, self.stride = tower, grid, stride
        self.num_patches = (grid // stride) ** 2 + 1  # MllamaModel sizes its mask by it

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        """Returns the states of MllamaVisionModel, `[B, F, T, P, D]`, with P patches after
        pooling."""
        x = self.tower(**inputs).last_hidden_state
        image = x[..., 1:, :].flatten(0, 2).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pooled = avg_pool2d(image, self.stride).flatten(2).transpose(1, 2)
        x = torch.cat((x[..., :1, :], pooled.unflatten(0, x.shape[:3])), dim=-2)
        return BaseModelOutput(last_hidden_state=x)


def build_model(config: Config, weights: dict[str, Tensor]) -> MllamaForConditionalGeneration:
    """The model with `weights` (HF names on disk); only parameters that the stage trains have
    gradients."""
    hf = mllama_config(config.model)
    hf._attn_implementation = "sdpa"  # also transformers' default
    model = MllamaForConditionalGeneration(hf).float().train()
    inner: Any = model.model
    patterns = [*config.stage.train, *config.stage.also]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[normalize_name(name)])
            parameter.requires_grad_(_trains(normalize_name(name), patterns))
    if config.model.projector.pool != "none":
        assert config.model.projector.pool == "average", "the baseline pools by average only"
        grid, stride = config.model.vision.grid, config.model.projector.stride
        inner.vision_model = PooledVision(inner.vision_model, grid, stride)
    return model


def _trains(name: str, patterns: list[str]) -> bool:
    part = next(p for p, starts in PARTS.items() if name.startswith(starts))
    return any(fnmatchcase(f"{part}.x", pattern) for pattern in patterns)


def blind_slots(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Masks padding frames for tokens that see no frame (and so attend all frame slots)."""
    mask = kwargs["cross_attention_mask"]  # float [B, 1, S, F x T x P], 0 or the lowest number
    row_sees = kwargs["full_text_row_masked_out_mask"]  # [B, 1, S, 1]
    slots = torch.where(row_sees == 1, mask, mask.min()).amax(2, keepdim=True)  # [B, 1, 1, ...]
    kwargs["cross_attention_mask"] = torch.where(row_sees == 1, mask, slots)
    return args, kwargs


def hf_inputs(batch: MicroBatch) -> dict[str, Tensor]:
    """A microbatch in the form of transformers' MllamaProcessor.

    Rows are padded to the most frames of any (id 0, zero pixels), as there; a token at index t
    attends the frames whose `<|image|>` token is at or before t, padding tokens attend none.
    """
    rows, length = batch.tokens.shape
    counts = torch.bincount(batch.frame_rows, minlength=rows)
    count, tiles = int(counts.max()), batch.frames.shape[1]
    slot = torch.arange(len(batch.frame_rows)) - (counts.cumsum(0) - counts)[batch.frame_rows]
    place = (batch.frame_rows, slot)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = torch.zeros(rows, count, *batch.frames.shape[1:])
    pixels[place] = (batch.frames.float() / 255 - mean) / std
    ids = torch.zeros(rows, count, dtype=torch.long)
    ids[place] = batch.aspect_ratio_ids
    attention = torch.arange(length) < batch.lengths[:, None]  # [B, S]
    starts = torch.full((rows, count), length)
    starts[place] = batch.frame_positions
    sees = (torch.arange(length)[:, None] >= starts[:, None]) & attention[..., None]  # [B, S, F]
    return {
        "input_ids": batch.tokens,
        "attention_mask": attention.long(),
        "labels": batch.labels,
        "pixel_values": pixels,
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": torch.ones(rows, count, tiles, dtype=torch.long),
        "cross_attention_mask": sees[..., None].expand(-1, -1, -1, tiles).long(),
    }


def join(config: Config) -> tuple[int, int]:
    """Joins the process group, as torchrun's environment says; returns rank and count of ranks."""
    torch.set_num_threads(config.hardware.threads or 1)
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size()


def make_step(
    config: Config, batches: Iterator[MicroBatch], weights: dict[str, Tensor], warmup: int
) -> Callable[[], tuple[float, float]]:
    """A function that does one optimizer step on this rank's next microbatches.

    Gradients are accumulated over the microbatches without communication, then reduced once. It
    returns the loss of the global batch per label, and this rank's tokens with padding.
    torch.distributed must be initialized.
    `blind_slots` works during the first `warmup` steps.
    """
    ranks = dist.get_world_size()
    model = build_model(config, weights)
    text: nn.Module = cast(Any, model.model).language_model
    masked = text.register_forward_pre_hook(blind_slots, with_kwargs=True)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks > 1 else None
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = _adamw(config, trained)
    count = config.data.global_batch // config.data.read_together(1) // ranks

    done = itertools.count()

    def step() -> tuple[float, float]:
        if next(done) == warmup:
            masked.remove()
        own = [next(batches) for _ in range(count)]
        labels = torch.tensor(sum(int((b.labels[:, 1:] != IGNORED_LABEL).sum()) for b in own))
        if ranks > 1:
            dist.all_reduce(labels)
        total = torch.zeros(())
        optimizer.zero_grad()
        for index, batch in enumerate(own):
            with ddp.no_sync() if ddp and index < count - 1 else contextlib.nullcontext():
                out = (ddp or model)(**hf_inputs(batch), use_cache=False, num_items_in_batch=labels)
                (out.loss * ranks).backward()  # DDP averages over ranks, the loss is a sum
            total += out.loss.detach()
        nn.utils.clip_grad_norm_([p for _, p in trained], config.optimizer.clip_grad)
        optimizer.step()
        if ranks > 1:
            dist.all_reduce(total)
        return total.item(), sum(batch.tokens.numel() for batch in own)

    return step


def _adamw(config: Config, trained: list[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """The optimizer of moss_train/train/optimizer.py: norms, gates and biases do not decay; fused
    kernel."""

    def decays(name: str) -> bool:
        return not ("norm" in name or name.endswith(("gate", "gate_attn", "gate_ffn", "bias")))

    options = config.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if decays(name)]},
        {"params": [p for name, p in trained if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )
