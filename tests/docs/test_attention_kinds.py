"""docs/devices.md has the table by which kinds of attention are chosen and refused."""

from __future__ import annotations

from data_pipeline import devices
from data_pipeline.attention_kinds import (
    EVERYWHERE,
    INFERENCE,
    KINDS,
    TRAINING,
    AttentionKind,
    sizes,
)
from tests.conftest import REPO

HEAD = (
    "kind", "package", "devices", "training", "inference", "dtypes", "head sizes", "mask",
    "packed", "grouped heads", "dropout",
)  # fmt: skip


def row(name: str, kind: AttentionKind) -> str:
    uses = (", ".join(kind.places(use)) or "-" for use in (TRAINING, INFERENCE))
    able = (kind.mask, kind.packed, kind.grouped, kind.dropout)
    cells = (
        f"`{name}`", kind.package, ", ".join(kind.devices), *uses, ", ".join(kind.dtypes),
        sizes(kind), *("yes" if can else "no" for can in able),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def test_the_page_has_the_table() -> None:
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    table = "\n".join([*lines, *(row(*entry) for entry in KINDS.items())])
    assert table in (REPO / "docs" / "devices.md").read_text(), f"write there:\n{table}"


def test_what_runs_everywhere_runs_on_all_kinds_of_devices() -> None:
    assert EVERYWHERE == devices.KINDS
