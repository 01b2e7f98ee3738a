"""HTML pages of one file each, from the templates beside this module and those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """The page that a template of `folder` makes of `values`; text in them is escaped.

    A template `{% extends "page.html.jinja" %}` for the frame, and imports `macros.html.jinja`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([folder, TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values)
