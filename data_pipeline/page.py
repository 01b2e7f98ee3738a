"""HTML pages of one file each, from the templates beside the module that makes one."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

FRAME = Path(__file__).parent
# What HTML cannot hold (NUL) or nobody would see, as Unicode's pictures of it: `␀`, `␛`.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def render(template: str, folder: Path, **values: Any) -> str:
    """The page that a template of `folder` makes of `values`; text in them is escaped, and its
    control characters are seen.

    A template `{% extends "page.html.jinja" %}` for the frame, and imports `macros.html.jinja`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([folder, FRAME])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_seen
    )
    return environment.get_template(template).render(values)


def picture_url(picture: Image.Image, size: int) -> str:
    """A URL that holds a picture, made smaller so that no side has more than `size` pixels."""
    picture.thumbnail((size, size))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _seen(value: Any) -> Any:
    return value.translate(_PICTURES) if isinstance(value, str) else value
