"""Commands. README.md lists them."""

from __future__ import annotations

import data_pipeline  # noqa: F401  before torch
