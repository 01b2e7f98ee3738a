"""Overrides as people type them: paths are taken as they are, and what Hydra's grammar does not
read is refused with the spelling that it reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moss_train.config import ConfigError

# Fields whose text is a path, whatever signs are in it.
PATHS = (
    "init_from", "run.dir", "data.root", "data.tokenizer", "trainer.resume",
    "model.init.from_llama",
)  # fmt: skip


def as_typed(arguments: Sequence[str], conf: Path) -> list[str]:
    """Arguments of a command line, paths in the quotes that Hydra's grammar wants.

    Args:
        arguments: overrides, and Hydra's flags.
        conf: folder of the presets.

    Raises:
        ConfigError: a path is empty, a group of presets is null.
    """
    problems = []
    made = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        name = key.lstrip("+")
        if sign and name in PATHS:
            if not value.strip():
                problems.append(f"{argument}: is empty (an unset variable?): give a path")
            elif value != "null" and not _is_quoted(value):
                argument = f"{key}={quoted(value)}"
        elif sign and value in ("null", "") and (conf / name).is_dir() and name:
            choices = ", ".join(sorted(path.stem for path in (conf / name).glob("*.yaml")))
            problems.append(f"{argument}: choose one of {choices}")
        made.append(argument)
    if problems:
        raise ConfigError(problems)
    return made


def quoted(text: str) -> str:
    """In single quotes: a backslash is special before a quote only."""
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda found: found[1] * 2, text) + "'"


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def explain_override(override: str, reason: str) -> str:
    """What to write in place of an override that Hydra's grammar does not read."""
    key, sign, value = override.partition("=")
    if not sign:
        return f"{override}: must be FIELD=VALUE"
    element = re.match(r"(.*?)[.\[](\d+)\]?(\.|$)", key)
    if element is not None:
        return (
            f"{override}: one element of a list cannot be set: give the whole list, "
            f"'{element[1]}=[...]', or a preset in conf/"
        )
    if not re.fullmatch(r"[~+]*[\w./@:$-]+", key):
        return f"{override}: {key} is not the name of a field"
    if value.lstrip().startswith(("{", "[")):
        spelt = re.sub(r"""(["'])([^"']*)\1(\s*:)""", r"\2\3", value)
        hint = f": write '{key}={spelt}'" if spelt != value else f" ({reason})"
        return f"{override}: quotes stand around values of a dict, not around its keys{hint}"
    if "," in value and "Ambiguous" in reason:
        return f"{override}: a list is '{key}=[{value}]', a text is '{key}={quoted(value)}'"
    spelt = quoted(value).replace("'", '"') if "'" not in value and '"' not in value else value
    note = " (~ is your home in paths)" if value.startswith("~") else ""
    return f"{override}: put the value in quotes: '{key}={spelt}'{note}"


def explain_value(key: str, line: str) -> str:
    """A value of the wrong form: a dict where a list is."""
    if "ListConfig" in line or "list" in line.lower():
        return f"{key}: is a list: give it in brackets, '{key}=[...]' ({line})"
    return f"{key}: {line}"
