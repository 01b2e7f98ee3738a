"""What an engine keeps, and how it runs: its configuration, with ranges and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.fields import check_values, choice, number
from inference.engine.choose_attend import CHOICES
from inference.kernels.choose import KINDS

KV_DTYPES = VISION_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine keeps, and how it runs. Raises ValueError that names the field.

    Attributes:
        window: frames in a slot's ring.
        sinks: the first frames of a slot, which never leave its ring.
        max_tokens: cached tokens of a slot. When they are more, the oldest pairs of
            `<|silence|>` and `<|image|>` go, then other old text; positions of the rest stay.
        max_sessions: slots.
        compile: passes of fixed shape (a token, a frame, a short prompt) are compiled with
            torch.compile.
        graphs: passes of fixed shape, and the vision tower, run as CUDA graphs, on CUDA.
        attention: of passes of other shapes, and of the vision tower: "sdpa": torch's; "flash":
            flash-attn; "npu": torch_npu's; "auto": npu on an Ascend NPU, else sdpa.
        kernels: what passes of fixed shape are made of: "auto": on CUDA the Triton kernels that
            prove right there, else plain torch; "triton": without a proof; "torch": plain torch.
        kv_dtype: of cached keys and values. "auto": the model's; "fp8": e4m3, a byte each.
        vision_dtype: of the vision tower's products. "auto": the model's; "fp8": e4m3, where they
            prove right. The model's tower is changed for good.
        tokens_before_first_frame: "zero": they attend no frame; "attend_all": they attend all
            frames that come in the same step (what checkpoints of the published code do offline).
    """

    window: int = number(256, above=0)
    sinks: int = number(0, least=0)
    max_tokens: int = number(8192, above=0)
    max_sessions: int = number(1, above=0)
    compile: bool = False
    graphs: bool = True
    attention: str = choice("auto", CHOICES)
    kernels: Literal["auto", "triton", "torch"] = choice("auto", KINDS)
    kv_dtype: Literal["auto", "fp8"] = choice("auto", KV_DTYPES)
    vision_dtype: Literal["auto", "fp8"] = choice("auto", VISION_DTYPES)
    tokens_before_first_frame: Literal["zero", "attend_all"] = choice(
        "zero", ("zero", "attend_all")
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.sinks >= self.window:
            raise ValueError(f"sinks={self.sinks}: must be less than window={self.window}")
