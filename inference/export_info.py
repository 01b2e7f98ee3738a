"""What an exported folder says it was trained for: which form its prompts have.

The form decides which commands a model is for, and how a question is written. It is the key
`moss_prompt_form` of the folder's config.json. Exports made before there was that key are known by
their stage's name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from data_pipeline.prompts import STAGE_FORMS, PromptForm

FORM_KEY, STAGE_KEY = "moss_prompt_form", "moss_stage"
# A weights file without a known SHA-256 is known by so many parts of so many bytes, spread over it.
_PARTS, _PART = 16, 2**16


class ExportError(Exception):
    """A folder that is not an export; the message names it and what is wrong."""


@dataclass(frozen=True)
class ExportInfo:
    """prompt_form: None: unknown. stage: the name of its last training stage; None: unknown. tile:
    pixels of the side of a picture as the model sees it; None: unknown. weights: `weights_of` the
    folder."""

    prompt_form: PromptForm | None
    stage: str | None
    tile: int | None = None
    weights: str = ""

    @property
    def watches(self) -> bool | None:
        """Whether the model has learned to watch a stream and to be silent; None: unknown."""
        return None if self.prompt_form is None else self.prompt_form == "realtime"

    @property
    def question_form(self) -> PromptForm:
        """The form of a question that is not part of a stream: a real-time model learned chats."""
        return "pretrain" if self.prompt_form == "pretrain" else "chat"


def read_export_info(checkpoint: str | Path) -> ExportInfo:
    """Reads a folder's config.json, and of its weights no more than `weights_of`; ExportError."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise ExportError(f"{checkpoint}: there is no {path}: give the folder of an export")
    try:
        config = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ExportError(f"{path}: is not a JSON object: {error}") from None
    stage = config.get(STAGE_KEY)
    form = config.get(FORM_KEY) or STAGE_FORMS.get(stage)
    if form is not None and form not in get_args(PromptForm):
        allowed = ", ".join(get_args(PromptForm))
        raise ExportError(f"{path}: {FORM_KEY} {form!r}, allowed: {allowed}")
    vision = config.get("vision_config")
    tile = vision.get("image_size") if isinstance(vision, dict) else None
    tile = tile if isinstance(tile, int) else None
    try:
        weights = weights_of(Path(checkpoint))
    except OSError as error:  # as of a link to a file that is not there
        raise ExportError(f"{error.filename}: {error.strerror}") from None
    return ExportInfo(form, stage, tile, weights)


def weights_of(export: Path) -> str:
    """A digest of the weights in a folder: of the SHA-256 of its files in manifest.json, where an
    export has one, else of their sizes and parts of them. Empty: there are no weights. OSError: a
    file of weights cannot be read."""
    recorded = _recorded(export / "manifest.json")
    digest, files = hashlib.sha256(), sorted(export.glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        content = recorded.get(path.name) or _parts_of(path, size)
        digest.update(f"{path.name} {size} {content}\n".encode())
    return digest.hexdigest()[:16] if files else ""


def _recorded(manifest: Path) -> dict[str, str]:
    """SHA-256 of files by their names, in an export's manifest; {}: it is none, or not there."""
    try:
        files = json.loads(manifest.read_text())["files"]
        return {name: str(entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # other programs have files of that name, too


def _parts_of(path: Path, size: int) -> str:
    digest, last = hashlib.sha256(), max(0, size - _PART)
    with path.open("rb") as file:
        for number in range(_PARTS):
            file.seek(last * number // (_PARTS - 1))
            digest.update(file.read(_PART))
    return digest.hexdigest()
