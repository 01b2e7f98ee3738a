"""Where the presets of conf/ are."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """The folder conf/: of the checkout, or that which travels inside the wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
