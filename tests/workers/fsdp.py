"""An exported model's gradients where its layers are wrapped by FSDP, beside those of one process.

Usage: fsdp.py FOLDER {1,2} {plain,recompute}: torch's older FSDP or `fully_shard`.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from tests.torchrun import save_result

LENGTH, MARKS = 12, [2, 6]


def make(folder: str, recompute: bool) -> Any:
    model = MossVideoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):  # the layers of frames take part
            parameter.data.fill_(0.5)
    if recompute:
        model.gradient_checkpointing_enable()
    return model.train()


def batch(model: Any, number: int) -> dict[str, Tensor]:
    config, draws = model.config, torch.Generator().manual_seed(number)
    tokens = torch.randint(20, 60, (1, LENGTH), generator=draws)
    tokens[0, MARKS] = config.image_token_index
    tile = config.vision_config.image_size
    labels = tokens.masked_fill(tokens == config.image_token_index, -100)
    pixels = torch.randn(1, len(MARKS), 1, 3, tile, tile, generator=draws)
    return {"input_ids": tokens, "pixel_values": pixels, "labels": labels}


def wrapped(model: Any, version: str) -> tuple[Any, int]:
    """The model with all that it names in `_no_split_modules` wrapped, and how many those are."""
    layers = [one for one in model.modules() if type(one).__name__ in model._no_split_modules]
    if version == "1":
        kinds: set[type[nn.Module]] = {type(layer) for layer in layers}
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
        whole = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        return whole, len(layers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), len(layers)


def gradients(model: Any, version: str) -> dict[str, Tensor]:
    if version == "1":
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in found.items()}
    both = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: grad.full_tensor() for name, grad in both if grad is not None}


def main() -> None:
    folder, version, form = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain = make(folder, form == "recompute")
    losses = [plain(**batch(plain, number)).loss for number in range(ranks)]
    (sum(losses) / ranks).backward()
    model, count = wrapped(make(folder, form == "recompute"), version)
    loss = model(**batch(plain, rank)).loss
    loss.backward()
    save_result("losses", [loss.item(), losses[rank].item(), count], as_json=True)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    save_result("gradients", (gradients(model, version), wanted))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
