"""Kernels that nobody has seen on a device prove themselves there, before they are used.

Each is compared once with the same operation in plain torch. One that raises or differs is not
used, and a line says so; that one is right is remembered by device, versions and source code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.atomic import write_atomically

log = logging.getLogger(__name__)

# Two computations of one case: with the kernel, and in plain torch.
Case = tuple[Callable[[], Tensor], Callable[[], Tensor]]
# Largest difference, as a part of the largest number: some roundings of a result of the dtype.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Proofs:
    """Which kernels are right on one device.

    Args:
        device: where the cases are computed.
        sources: files of the kernels: with another content they prove themselves again.
        packages: names and versions of what compiles and runs them.
        folder: where results are kept; None: `~/.cache/moss_train` (or below XDG_CACHE_HOME).
    """

    def __init__(
        self,
        device: torch.device,
        sources: Iterable[Path],
        packages: dict[str, str],
        folder: Path | None = None,
    ):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.file = (folder or base / "moss_train") / "kernels.json"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        self.setting = json.dumps([name, packages, torch.__version__, digest[:16]])

    def right(self, name: str, cases: Iterable[Case]) -> bool:
        """Whether the kernel `name` computes in all `cases` what plain torch does. `name` says what
        the cases depend on, such as sizes and dtype."""
        known = self._known()
        if name in known.get(self.setting, ()):
            return True
        try:
            flaw = _flaw(cases)
        except Exception as error:  # whatever a compiler or a driver raises
            flaw = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if flaw is not None:
            log.warning("kernel %s: plain torch is used instead: %s", name, flaw)
            return False
        self._remember(name)
        return True

    def _known(self) -> dict[str, list[str]]:
        try:
            known = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _remember(self, name: str) -> None:
        """Another process may write at the same time: what it adds is proven again later."""
        known = self._known()
        known[self.setting] = sorted({*known.get(self.setting, ()), name})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(known, indent=1))
        except OSError as error:
            log.info("%s: cannot be written: %s", self.file, error)


def _flaw(cases: Iterable[Case]) -> str | None:
    """What is wrong with the first case that is."""
    for number, (ours, plain) in enumerate(cases):
        got, wanted = ours(), plain()
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"case {number}: {tuple(got.shape)} {got.dtype}, not {tuple(wanted.shape)}"
        exact = wanted.double()
        error = (got.double() - exact).abs().max().item()
        allowed = TOLERANCES[wanted.dtype] * max(exact.abs().max().item(), 1e-6)
        if not error <= allowed:  # also NaN
            return f"case {number}: differs by {error:.1e} (allowed: {allowed:.1e})"
    return None
