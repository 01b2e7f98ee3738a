"""Which kernels (kernels.py) a job's layers use: those that prove right on its GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from data_pipeline import devices
from data_pipeline.choose_fp8 import PRODUCT, fp8_of, right_parts
from data_pipeline.fp8 import Fp8
from data_pipeline.kernel_proof import Case, Kernel, proven
from moss_train import hardware
from moss_train.log import log
from moss_train.model.agreement import agreed
from moss_train.model.kernels import Kernels, Statistics
from moss_train.model.mlp import swiglu
from moss_train.model.rope import rotate
from moss_train.model.weight_gradient import accumulate
from moss_train.model_config import ModelConfig, TextConfig

CODE = tuple(
    f"moss_train.model.{name}" for name in ("choose_kernels", "mlp", "rope", "weight_gradient")
)


def choose_kernels(model: ModelConfig) -> Kernels:
    """The kernels of `model.kernels` that this job uses: those that are right on all ranks. A
    collective.

    Each is compared with plain torch once on a GPU; where it fails or differs, a line says so and
    plain torch runs. On a CPU all is plain torch; FP8, if asked for, is computed by it.
    """
    if not hardware.on_accelerator():
        return Kernels(fp8=None if model.fp8 == "none" else Fp8())
    triton = model.kernels != "torch"
    there, parts = candidates() if triton else {}, list[str]()

    def prove(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in there and _proven(name, there[name], model)]

    right = agreed("the training kernel", lambda: prove(there), prove)
    if model.fp8 != "none":
        widths = sorted(set(model.fp8_widths().values()))
        dtype, device = hardware.DTYPES[model.dtype], hardware.device()
        find = partial(right_parts, widths, dtype, device, triton)
        parts = agreed("FP8, the part", find, lambda names: find())
    if "accumulate" in right:
        install(accumulate)
    fp8 = fp8_of(parts) if PRODUCT in parts else None
    return Kernels(**{name: there[name] for name in right}, fp8=fp8)


def candidates() -> dict[str, Any]:
    """Every kernel but FP8's that can be had here, by its name in `Kernels`."""
    found: dict[str, Any] = {"accumulate": accumulate}
    if not devices.has_triton(hardware.device()):
        return found
    try:
        from moss_train.model import triton_kernels
    except ImportError as error:
        log.warning("Triton's kernels are not used: %s: pip install triton", error)
        return found
    others = {*found, "fp8"}
    names = [field.name for field in fields(Kernels) if field.name not in others]
    return found | {name: getattr(triton_kernels, name) for name in names}


def install(kernel: Any) -> None:
    """Has megatron's own parallel layers add up weight gradients by `kernel`, too: they look for an
    extension of Apex."""
    module: Any = layers
    module._grad_accum_fusion_available = True
    module.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=lambda x, gradient, total: kernel(total, gradient, x)
    )


def _proven(name: str, kernel: Any, model: ModelConfig) -> bool:
    """Whether a kernel computes what plain torch does, in the sizes of a model."""
    dtype, device = hardware.DTYPES[model.dtype], hardware.device()
    own = kernel.__module__
    code = CODE if own in CODE else (*CODE, own)
    cases = partial(getattr(Trials(model.text, dtype, device), name), kernel)
    shapes = f"{dtype}, {model.text}"
    return proven(
        Kernel(f"the training kernel {name}", shapes, ("torch", "triton"), code, cases), device
    )


class Trials:
    """Cases of each kernel, by the name that `Kernels` gives it."""

    def __init__(self, text: TextConfig, dtype: torch.dtype, device: torch.device):
        self.text, self.dtype, self.device = text, dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def swiglu(self, kernel: Callable[[Tensor], Tensor]) -> Iterator[Case]:
        yield Case("", kernel, swiglu, self._draw((3, 1, 2 * self.text.mlp_size)))

    def rotate(self, kernel: Callable[..., Tensor]) -> Iterator[Case]:
        """Queries of cross-attention; keys of frames and of text, which lie between others."""
        width, kv = self.text.head_dim, self.text.num_kv_heads
        angles = self._draw((5, 1, width // 2))[0].repeat(1, 1, 2)
        turn = angles.cos(), angles.sin()

        def rotated(by: Callable[..., Tensor], x: Tensor) -> Tensor:
            return by(x[..., 1:-1, :], *(t.to(x.dtype) for t in turn))

        for shape in ((self.text.num_heads,), (3, kv), (kv, 5)):
            inputs = self._draw((5, *shape[:-1], shape[-1] + 2, width))
            yield Case(
                f"heads {[*shape]}", partial(rotated, kernel), partial(rotated, rotate), inputs
            )

    def statistics(self, kernel: Statistics) -> Iterator[Case]:
        """Whole blocks of columns and a part of one; a label that another rank has."""

        def joined(by: Statistics, own: Tensor, x: Tensor) -> Tensor:
            return torch.stack(by(x * 1, own))  # x itself is a leaf, which stays as it is

        for size in (self.text.vocab_size, 777):
            own = torch.tensor([5, -1, size - 1, 0], device=self.device)
            run, plain = (partial(joined, by, own) for by in (kernel, plain_statistics))
            yield Case(f"{size} columns", run, plain, self._draw((4, size)))

    def accumulate(self, kernel: Callable[..., None]) -> Iterator[Case]:
        def added(grad: Tensor, x: Tensor) -> Tensor:
            total = torch.ones(grad.shape[1], x.shape[1], device=self.device)
            kernel(total, grad, x)
            return total

        def plain(grad: Tensor, x: Tensor) -> Tensor:
            return (grad.T @ x).to(torch.promote_types(x.dtype, torch.float32)) + 1

        width = self.text.hidden_size
        for rows, out in ((1, 24), (300, width)):
            inputs = self._draw((rows, out), (rows, width))
            yield Case(f"{rows} rows", added, plain, inputs, gradients=False)

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        drawn = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return tuple(x.to(self.device, self.dtype) for x in drawn)


def plain_statistics(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernels.statistics` in plain torch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = logits.gather(1, own.clamp(min=0)[:, None])[:, 0]
    return logits.logsumexp(1), picked.masked_fill(own < 0, 0.0), logits.sum(1)
