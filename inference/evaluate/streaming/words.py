"""The words in which a model and a judge are asked (prompts.yaml).

A benchmark's own words are not ours to ship. They are read from its repository where the file of
questions lies in one: its templates are texts that a Python file assigns to names.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.commands import one_line
from inference.evaluate.streaming.forms import FormError

_OURS = Path(__file__).with_name("prompts.yaml")
# name here -> file in the repository, name there
_THEIRS = {
    "streamingbench.choice": ("src/benchmark/StreamingBench.py", "PROMPT_TEMPLATE"),
    "streamingbench.sequence": ("src/benchmark/StreamingBenchSQA.py", "PROMPT_TEMPLATE"),
    "streamingbench.proactive": (
        "src/benchmark/StreamingBenchProactive.py",
        "PROMPT_TEMPLATE_PROACTIVE",
    ),
    "ovobench.choice": ("constant.py", "BR_PROMPT_TEMPLATE"),
    "ovobench.REC": ("constant.py", "REC_PROMPT_TEMPLATE"),
    "ovobench.SSR": ("constant.py", "SSR_PROMPT_TEMPLATE"),
    "ovobench.CRR": ("constant.py", "CRR_PROMPT_TEMPLATE"),
}


@dataclass(frozen=True)
class Words:
    """Templates by name; `found`: those of the benchmark's own repository, with their file."""

    templates: dict[str, str]
    found: dict[str, str]

    def __call__(self, name: str, *values: object) -> str:
        """A template with its `{}` filled in; other braces are text."""
        parts = self.templates[name].split("{}")
        filled = [str(value) + part for value, part in zip(values, parts[1:], strict=True)]
        return "".join([parts[0], *filled]).strip()


def read_words(questions: Path | None = None, own: Path | None = None) -> Words:
    """Ours, those of the repository around `questions`, and those of a file of the user.

    FormError for a file that has other names, or another number of `{}`.
    """
    templates = yaml.safe_load(_OURS.read_text())
    found: dict[str, str] = {}
    for folder in questions.resolve().parents if questions else ():
        for name, (file, constant) in _THEIRS.items():
            text = _constant(folder / file, constant) if name not in found else None
            if text is not None and _holes(text) == _holes(templates[name]):
                templates[name], found[name] = text, f"{folder / file}: {constant}"
    if own is not None:
        templates |= read_own(own, templates)
    return Words(templates, found)


def describe_own(file: Path) -> dict[str, Any]:
    """What a run keeps of a file of the user: its digest and its texts."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"sha256": digest, "texts": read_own(file, yaml.safe_load(_OURS.read_text()))}


def read_own(file: Path, known: dict[str, str]) -> dict[str, str]:
    """The texts of a file, by names that are `known`. FormError for anything else in it."""
    try:
        data = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FormError(f"{file}: cannot be read: {one_line(error)}") from None
    for name, text in data.items() if isinstance(data, dict) else [("", None)]:
        if name not in known or not isinstance(text, str):
            raise FormError(f"{file}: {name!r}: expected texts by names of {_OURS.name}")
        if _holes(text) != _holes(known[name]):
            raise FormError(f"{file}: {name}: needs {_holes(known[name])} times {{}}")
    return dict(data)


def _holes(text: str) -> int:
    return text.count("{}")


def _constant(file: Path, name: str) -> str | None:
    """The text that a Python file assigns to a name; the file is not run."""
    if not file.is_file():
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            return node.value.value
    return None
