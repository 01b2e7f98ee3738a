"""Overrides as people type them: paths are taken as they are; what Hydra's grammar does not read,
and what is Hydra's own and no part of a run, is refused with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin

from moss_train.config import Config, ConfigError, flatten, to_dict
from moss_train.field_errors import field_types, similar

# Fields whose text is a path, whatever signs are in it.
PATHS = (
    "init_from", "run.dir", "data.root", "data.tokenizer", "trainer.resume",
    "model.init.from_llama",
)  # fmt: skip
PROFILE = "trainer.profile"  # is like steps=10..12, for which the grammar wants quotes
# Flags of Hydra's that have a value, in the next argument or behind a =.
_VALUED = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p")
# Arguments with which Hydra looks for presets in other places, too.
SEARCHED = r"\+*hydra\.searchpath\b|--config-(path|name)\b|-c[pn]\b"


def as_typed(arguments: Sequence[str], conf: Path) -> list[str]:
    """Arguments of a command line, paths in the quotes that Hydra's grammar wants.

    Args:
        arguments: overrides, and Hydra's flags.
        conf: folder of the presets.

    Raises:
        ConfigError: a path is empty, a preset does not exist, something is Hydra's own.
    """
    problems = []
    made = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        name = key.lstrip("+~")
        problem = _hydras_own(argument, arguments) or _missing_preset(argument, arguments, conf)
        problem = problem or _no_switch(name, value)
        if problem:
            problems.append(problem)
        elif sign and name in (*PATHS, PROFILE):
            if name != PROFILE and not value.strip():
                problems.append(f"{argument}: is empty (an unset variable?): give a path")
            elif value != "null" and not _is_quoted(value):
                argument = f"{key}={quoted(value)}"
        made.append(argument)
    if problems:
        raise ConfigError(problems)
    return made


def _no_switch(name: str, value: str) -> str | None:
    """Why a number for a field that is on or off is refused: OmegaConf takes all but 0 for on."""
    kind = field_types(Config).get(name)
    number = re.fullmatch(r"[+-]?[\d.]+", value.strip())
    if bool not in (kind, *get_args(kind)) or number is None or value.strip() in ("0", "1"):
        return None
    return f"{name}={value}: must be true or false"


def _hydras_own(argument: str, arguments: Sequence[str]) -> str | None:
    """Why an argument that is Hydra's, not the job's, is refused; a sweep among them."""
    name, _, value = argument.partition("=")
    many = len(name) > 2 and "--multirun".startswith(name)
    sweeper = re.match(r"\+*hydra[./](launcher|sweeper|sweep|mode)\b", name)
    if argument == "-m" or many or sweeper:
        return f"{argument}: {sweep_instead(arguments)}"
    if name.lstrip("+~") == "hydra.run.dir":
        return f"{argument}: the run folder is run.dir: write run.dir={value}"
    if re.match(r"[+~]*hydra[./](?!searchpath\b|verbose\b)", name):
        return f"{argument}: is a setting of Hydra's, and the job takes none: leave it out"
    if name.startswith("--") and name.lstrip("-") in field_types(Config):
        return f"{argument}: fields have no dashes before them: write {argument.lstrip('-')}"
    return None


def sweep_instead(arguments: Sequence[str]) -> str:
    """The shell's loop that does what several values of a field ask for."""
    field, values = "trainer.seed", "1 2"
    for argument in arguments:
        key, _, value = argument.partition("=")
        listed = re.fullmatch(r"(?:choice\()?([^\[{(]+,[^\[{(]+?)\)?", value)
        if listed is not None:
            field, values = key.lstrip("+"), " ".join(re.split(r"\s*,\s*", listed[1]))
            break
    short = field.rpartition(".")[2]
    return (
        "one command is one run: for several write a loop: "
        f"for x in {values}; do ... {field}=$x run.dir=runs/{short}-$x; done"
    )


def _missing_preset(argument: str, arguments: Sequence[str], conf: Path) -> str | None:
    """Why an override of a group is refused: there is no such preset. Hydra would pass over it
    where the group is optional."""
    key, sign, value = argument.partition("=")
    group = key.lstrip("+")
    if group.startswith("~") and (conf / group[1:]).is_dir() and group != "~recipe":
        group, value = group[1:], ""
    elif not sign or not group or not (conf / group).is_dir():
        return None
    folders = [conf, *(Path(folder) for folder in _own_folders(arguments))]
    choices = sorted(path.stem for folder in folders for path in (folder / group).glob("*.yaml"))
    if value in choices:
        chosen = f"{group}={value}"
        return f"{argument}: {group} has a value: write {chosen}" if key != group else None
    elsewhere = any(re.match(SEARCHED, one) for one in arguments)
    if value.startswith("["):  # Hydra would take all of them, each over the ones before
        return (
            f"{argument}: one preset of {group} is taken: choose one of {', '.join(choices)}; "
            f"single fields are set behind it, {group}.FIELD=..."
        )
    if value and value != "null" and (elsewhere or not re.fullmatch(r"[\w.-]+", value)):
        return None
    return f"{argument}: choose one of {', '.join(choices)}"


def _own_folders(arguments: Sequence[str]) -> Iterator[str]:
    """Folders of presets that Hydra's flag --config-dir names."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, sign, value = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            yield value if sign else following


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags before the overrides: it takes no override behind a flag behind another one."""
    flags, overrides = list[str](), list[str]()
    for before, argument in pairwise(["", *arguments]):
        is_override = re.match(r"~|[^-].*=", argument) and before not in _VALUED
        (overrides if is_override else flags).append(argument)
    return [*flags, *overrides]


def explain_own_file(line: str, arguments: Sequence[str]) -> str:
    """Says where a configuration of one's own must be: `line` is Hydra's message about what it
    misses."""
    settings = [f"{flag} {value}" for flag, value in pairwise(arguments) if flag in _VALUED]
    settings += [one for one in arguments if re.match("--config-.*=", one)]
    inside = re.match(r"In '(.*)': Could not load '(.*)'", line)
    missing = f"{inside[1]}.yaml names {inside[2]}, which is not there: " if inside else ""
    return (
        f"{' '.join(settings) or line}: {missing}--config-dir FOLDER --config-name NAME reads "
        "FOLDER/NAME.yaml beside the presets of conf/ (--config-path: in place of them)"
    )


def configured_paths(config: Config) -> dict[str, str]:
    """The fields among PATHS that have a value, which may be empty."""
    return {key: value for key, value in flatten(to_dict(config))
            if key in PATHS and isinstance(value, str)}  # fmt: skip


def quoted(text: str) -> str:
    """`text` in single quotes: a backslash is special before a quote only."""
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda found: found[1] * 2, text) + "'"


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def explain_override(override: str, reason: str) -> str:
    """What to write in place of an override that Hydra's grammar does not read."""
    key, sign, value = override.partition("=")
    if not sign:
        return f"{override}: must be FIELD=VALUE"
    if key != key.strip():
        return f"{override}: no blank may stand before the =: write {key.strip()}={value}"
    element = re.match(r"(.*?)[.\[](\d+)\]?(\.|$)", key)
    if element is not None:
        return (
            f"{override}: one element of a list cannot be set: give the whole list, "
            f"'{element[1]}=[...]', or a preset in conf/"
        )
    if not re.fullmatch(r"[~+]*[\w./@:$-]+", key):
        return f"{override}: {key} is not the name of a field"
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}", "()")):
        return f"{override}: a bracket is not closed (in a text: '{key}={quoted(value)}')"
    if value.lstrip().startswith(("{", "[")):
        spelt = re.sub(r"""(["'])([^"']*)\1(\s*:)""", r"\2\3", value)
        hint = f": write '{key}={spelt}'" if spelt != value else f" ({reason})"
        return f"{override}: quotes stand around values of a dict, not around its keys{hint}"
    if "," in value and "Ambiguous" in reason:
        kind = field_types(Config).get(key.lstrip("+"))
        if get_origin(kind) is list:
            return f"{override}: a list is '{key}=[{value}]'"
        if str not in (kind, *get_args(kind)):
            return f"{override}: {sweep_instead([override])}"
        return f"{override}: a text with commas is '{key}={quoted(value)}'"
    spelt = quoted(value).replace("'", '"') if "'" not in value and '"' not in value else value
    note = " (~ is your home in paths)" if value.startswith("~") else ""
    return f"{override}: put the value in quotes: '{key}={spelt}'{note}"


def explain_composing(line: str) -> str:
    """What to write in place of an override that does not fit the configuration: `line` is Hydra's
    word about it."""
    quoted_part = re.search(r"'([^']*)'", line)
    override = quoted_part[1] if quoted_part else ""
    if line.startswith("Ambiguous value"):
        return explain_override(override, "Ambiguous")
    if line.startswith("Sweep parameters"):
        return f"{override}: {sweep_instead([override])}"
    missing = re.match(r"Interpolation key '(.*)' not found", line)
    if missing is not None:
        return f"${{{missing[1]}}}: {_not_a_field(missing[1])}"
    variable = re.search(r"Environment variable '(.*)' not found", line)
    if variable is not None:
        return f"${{oc.env:{variable[1]}}}: the environment has no variable {variable[1]}: set it"
    if line.startswith("Could not delete"):
        return f"~{override}: a field cannot be left out: set it, {override}=..."
    if line.startswith("Could not override"):
        return f"{override}: {_not_a_field(override)}"
    return line


def _not_a_field(name: str) -> str:
    similar_names = similar(name, Config)
    return "is not a field" + (
        f": did you mean {' or '.join(similar_names)}?" if similar_names else ""
    )
