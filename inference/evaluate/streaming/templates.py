"""Reads the templates of questions to a model and to a judge (prompts.yaml).

A benchmark's own templates may not be shipped with this project. Where the file of questions lies
in the benchmark's repository, they are read from there, out of its Python files.
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
# Name of a template -> file in the benchmark's repository, and constant in it.
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
class Templates:
    """Templates of questions."""

    templates: dict[str, str]  # by name
    found: dict[str, str]  # those of the benchmark's own repository: name -> file and constant

    def __call__(self, name: str, *values: object) -> str:
        """A template with the values in place of its `{}`; other braces stay as they are."""
        parts = self.templates[name].split("{}")
        filled = [str(value) + part for value, part in zip(values, parts[1:], strict=True)]
        return "".join([parts[0], *filled]).strip()


def read_templates(questions: Path | None = None, own: Path | None = None) -> Templates:
    """Our templates, overridden by those of the repository that the file `questions` lies in, and
    these by those of the user's file `own`.

    FormError: the user's file has another name, or a template with another number of `{}`.
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
    return Templates(templates, found)


def describe_own(file: Path) -> dict[str, Any]:
    """The digest and the texts of a user's file, which a run's settings keep."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"sha256": digest, "texts": read_own(file, yaml.safe_load(_OURS.read_text()))}


def read_own(file: Path, known: dict[str, str]) -> dict[str, str]:
    """The templates of a user's file. FormError: it has a name that is not `known`, or a template
    with another number of `{}` than the known one."""
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
    """The text that a Python file assigns to a name, without running the file; None: there is
    none."""
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
