"""What each kind of attention can do: the one table by which training and inference choose and
refuse, and which docs/devices.md shows.

A model attends in three places: text (causal; packed sequences, or new tokens after cached ones),
tower (the patches of a frame), frames (the cross-attention: a token sees a prefix of the frames).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from data_pipeline import npu

TEXT, TOWER, FRAMES = "text", "tower", "frames"
PLACES = (TEXT, TOWER, FRAMES)
TRAINING, INFERENCE = "training", "inference"
NPU = "npu"
# The kinds of devices.py, which imports torch: a configuration is read without.
EVERYWHERE = ("cuda", NPU, "xpu", "mps", "cpu")
HALF, ALL = ("bf16", "fp16"), ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class AttentionKind:
    """What one kind of attention can do.

    training, inference: the places that it computes there; the others are sdpa's.
    devices, dtypes: that it runs on, and computes in.
    mask: whether it takes one: the tower's, where padding is hidden, and tokens of one call that
        see different frames. Where it takes none, such a call of the cross-attention is sdpa's in
        training, and one call for each run of equal tokens in inference.
    packed: whether sequences of several lengths are one call; else they are padded.
    grouped: whether several query heads share a KV head as they are; else the KV head is repeated.
    dropout: whether it can drop weights (no model here does).
    least, largest, multiple: of a head's size; largest None: any.
    package, module: what it needs, as an index calls it, and as it is imported.
    install: how to get that.
    """

    training: tuple[str, ...] = ()
    inference: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[str, ...] = HALF
    mask: bool = False
    packed: bool = True
    grouped: bool = True
    dropout: bool = True
    least: int = 1
    largest: int | None = None
    multiple: int = 1
    package: str = "torch"
    module: str = "torch"
    install: str = "torch"

    def places(self, use: str) -> tuple[str, ...]:
        """The places that it computes in TRAINING or INFERENCE."""
        return self.training if use == TRAINING else self.inference

    def installed(self) -> bool:
        """Whether its package is there; torch_npu only where it can be imported."""
        return find_spec(self.module) is not None if self.module != npu.NAME else npu.usable()


KINDS = {
    "sdpa": AttentionKind(PLACES, PLACES, EVERYWHERE, ALL, mask=True, packed=False),
    "flex": AttentionKind(
        (FRAMES,), (), dtypes=ALL, mask=True, dropout=False, least=16, package="triton",
        module="triton", install="triton",
    ),
    "flash": AttentionKind(
        PLACES, PLACES, least=8, largest=256, multiple=8, package="flash-attn", module="flash_attn",
        install="moss-train[flash]",
    ),
    "te": AttentionKind(
        (TEXT, TOWER), (), largest=256, multiple=8, package="transformer-engine",
        module="transformer_engine", install="moss-train[te]",
    ),
    NPU: AttentionKind(
        (), PLACES, (NPU,), mask=True, packed=False, dropout=False, largest=512, multiple=16,
        package="torch-npu", module=npu.NAME, install="moss-train[npu]",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AttentionNeeds:
    """What a job asks of its attention.

    use: TRAINING or INFERENCE. device: kind of device. dtype: as configurations call it.
    heads: size of a head, by place.
    mask: the field that needs a mask in the tower, "" where none does.
    """

    use: str
    device: str
    dtype: str
    heads: Mapping[str, int]
    mask: str = ""


def kinds_of(use: str) -> tuple[str, ...]:
    """Names of the kinds that compute anything in TRAINING or INFERENCE."""
    return tuple(name for name, kind in KINDS.items() if kind.places(use))


def unable(name: str, needs: AttentionNeeds) -> list[str]:
    """Why a kind cannot do what is needed, whatever is installed; none where it can."""
    kind, reasons = KINDS[name], []
    places = kind.places(needs.use)
    if not places:
        reasons.append(f"computes nothing in {needs.use}")
    if needs.device not in kind.devices:
        reasons.append(f"runs on {_either(kind.devices)}, not on {needs.device}")
    if needs.dtype not in kind.dtypes:
        reasons.append(f"computes in {_either(kind.dtypes)}, not in {needs.dtype}")
    if needs.mask and TOWER in places and not kind.mask:
        reasons.append(f"takes no mask, which {needs.mask} needs")
    for place in places:
        size = needs.heads[place]
        if not kind.least <= size <= (kind.largest or size) or size % kind.multiple:
            reasons.append(f"takes heads of {sizes(kind)} numbers, the {place}'s have {size}")
    return reasons


def missing(name: str, needs: AttentionNeeds) -> list[str]:
    """Why a kind cannot be had here: what it cannot do, or what is not installed."""
    kind = KINDS[name]
    reasons = unable(name, needs)
    if not reasons and not kind.installed():
        reasons.append(f"{kind.package} is not installed (pip install '{kind.install}')")
    return reasons


def able(needs: AttentionNeeds) -> list[str]:
    """Names of the kinds that can be had, sdpa first."""
    return [name for name in KINDS if not missing(name, needs)]


def refusals(field: str, name: str, needs: AttentionNeeds) -> Iterator[str]:
    """A line for each reason why the kind that `field` names cannot be had, with what can."""
    for reason in missing(name, needs):
        yield f"{field}={name}: {reason}: use {_either(('auto', *able(needs)))}"


def sizes(kind: AttentionKind) -> str:
    """Sizes of a head that it takes, as text."""
    parts = (
        [f"{kind.least} or more"] if kind.largest is None else [f"{kind.least} to {kind.largest}"]
    )
    if kind.multiple > 1:
        parts.append(f"a multiple of {kind.multiple}")
    return ", ".join(parts)


def _either(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
