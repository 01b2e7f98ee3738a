"""Hydra's part: conf/ and overrides become a typed `Config`, on a command line or in Python."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_pipeline.commands import WRONG_USAGE, print_all_signs, report_error
from moss_train.config import RENAMED, Config, ConfigError, from_hydra
from moss_train.field_errors import cause_of, explain_field
from moss_train.overrides import (
    as_typed,
    explain_composing,
    explain_override,
    explain_own_file,
    flags_first,
    sweep_instead,
)
from moss_train.presets import conf_dir
from moss_train.processes import age_s

ROOT = "config"  # conf/config.yaml
VERSION = "1.3"  # of Hydra's behaviour
# What composing raises; Hydra has ValueErrors for what is not of its grammar's types.
COMPOSING = (HydraException, OmegaConfBaseException, ValueError, YAMLError, UserWarning)


def load_config(
    stage: str | None = None, /, *, overrides: Sequence[str] = (), **fields: Any
) -> Config:
    """The configuration that a command line with the same choices has.

        load_config("pt1", model="toy", parallel="single", trainer={"steps": 20})
        load_config("sft", model="toy", **{"model.text.num_layers": 4, "run.dir": "runs/sft"})

    Args:
        stage: a file of conf/stage: pt1, pt2, sft or realtime_sft (default: pt1).
        overrides: as on the command line: `["trainer.steps=20", "logger=tensorboard"]`.
        fields: a preset of conf/ for a group (`model="toy"`), and values of fields, as a dict or
            under their dotted names. They come after `overrides`.

    Raises:
        ConfigError: names what is unknown or has the wrong type, and what is allowed.
    """
    chosen = {} if stage is None else {"stage": stage}
    overridden = as_typed([*_overrides(chosen), *overrides, *_overrides(fields)], conf_dir())
    _store_schema()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base=VERSION):
            raw = hydra.compose(ROOT, overridden)
        OmegaConf.resolve(raw)
    except COMPOSING as error:
        raise ConfigError([explain(error)]) from None
    return from_hydra(raw)


def run_command_line(job: Callable[[DictConfig], None], name: str) -> int:
    """Composes what sys.argv says and runs `job`; `name` stands in the help. The exit code."""
    print_all_signs()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors: `explain` says them in one line
    _store_schema()

    composed, unresolved = False, list[Exception]()

    def compose_and_run(raw: DictConfig) -> None:
        nonlocal composed
        try:
            _check_whole(raw)
            _refuse_own_sweep()
            OmegaConf.resolve(raw)
        except COMPOSING as error:  # Hydra writes lines of its own about what is raised here
            return unresolved.append(error)
        composed = True
        job(raw)

    compose_and_run.__module__ = name  # Hydra's help takes the name of the program from there
    decorate = hydra.main(version_base=VERSION, config_path=str(conf_dir()), config_name=ROOT)
    try:
        sys.argv[1:] = flags_first(as_typed(sys.argv[1:], conf_dir()))
        with warnings.catch_warnings(), _composed_once():
            _refuse_missing_folders()
            decorate(compose_and_run)()
        if unresolved:
            raise unresolved[0]
    except COMPOSING as error:
        if composed:
            raise
        if os.environ.get("RANK", "0") == "0":
            lines = error.problems if isinstance(error, ConfigError) else [explain(error)]
            for line in lines:
                report_error(name, line)
        return WRONG_USAGE
    return 0


@cache
def _store_schema() -> None:
    """Tells Hydra the fields and their types, once a process: that takes a tenth of composing."""
    ConfigStore.instance().store(name="schema", node=Config)


@contextmanager
def _composed_once() -> Iterator[None]:
    """Hydra would compose everything, a quarter of a second, to read whether `hydra.mode` asks for
    a sweep, which `as_typed` refuses, and then again to run. Without an answer it runs."""
    asks = Hydra.get_mode
    Hydra.get_mode = lambda self, config_name, overrides: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = asks  # type: ignore[method-assign]


def _refuse_missing_folders() -> None:
    """Makes Hydra's warning of a `hydra.searchpath` that is not there an error. It looks at other
    sources then, too: that of a plugin of megatron-energon's, which nobody has asked for, logs a
    traceback where it has no settings."""
    warnings.filterwarnings("error", r"provider=hydra\.searchpath", UserWarning)
    warnings.filterwarnings("ignore", "provider=msc-universal", UserWarning)
    logging.getLogger("multistorageclient.contrib.hydra").setLevel(logging.CRITICAL)


def _check_whole(raw: DictConfig) -> None:
    """Raises ConfigError where a file of one's own does not begin with all that conf/ has."""
    absent = [entry.name for entry in fields(Config) if entry.name not in raw]
    if absent:
        raise ConfigError(
            [
                f"--config-name: has no {', '.join(absent)}: the file must begin with "
                "`defaults: [config, _self_]`, its own values behind it"
            ]
        )


def _refuse_own_sweep() -> None:
    """Raises ConfigError where a file of one's own asks Hydra for a sweep (`as_typed` refuses that
    of a command line): one run of it would start, with the values that are not swept over."""
    swept = HydraConfig.get().sweeper.get("params")
    if swept:
        named = f"hydra.sweeper.params ({', '.join(swept)})"
        instead = sweep_instead([f"{name}={values}" for name, values in swept.items()])
        raise ConfigError([f"{named}: {instead}"])


def _when_job_started(form: str) -> str:
    """The time, as strftime writes it; in a rank of torchrun, when that was started: ranks that it
    starts again go on in the same run folder."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return time.strftime(form)
    return time.strftime(form, time.localtime(time.time() - age_s(os.getppid())))


OmegaConf.register_new_resolver("job_started", _when_job_started, replace=True)


def explain(error: Exception) -> str:
    """What is wrong with the overrides or with a preset, in one line."""
    line = str(error).splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: choose one of {', '.join(sorted(error.options))}"
    if isinstance(error, MissingConfigException | SearchPathException):
        return explain_own_file(line, sys.argv[1:])
    if isinstance(error, OverrideParseException):
        return explain_override(error.override, line)
    if isinstance(error, UserWarning):
        missing = line.partition("path=")[2].removesuffix(" is not available.")
        return f"hydra.searchpath={missing}: there is no such folder"
    if isinstance(error, YAMLError):
        return f"conf: {' '.join(str(error).split())}"
    if "Recursive interpolation" in line:
        referring = [argument for argument in sys.argv[1:] if "${" in argument]
        return f"{' '.join(referring) or 'conf'}: refers to itself: give a value"
    cause = cause_of(error)
    if cause is None:
        return explain_composing(line)
    if cause.full_key in RENAMED:
        return f"{cause.full_key}: is called {RENAMED[cause.full_key]} now: use that name"
    preset = re.match(r"In '(.*/.*)':", line)
    return (f"conf/{preset[1]}.yaml: " if preset else "") + explain_field(cause, Config)


def _overrides(fields: Mapping[str, Any], prefix: str = "", kind: Any = Config) -> Iterator[str]:
    """`{"trainer": {"steps": 20}}` -> `trainer.steps=20`; a dict stays one where its field is."""
    types = get_type_hints(kind) if is_dataclass(kind) else {}
    for name, value in fields.items():
        inner = types.get(name)
        if isinstance(value, Mapping) and is_dataclass(inner):
            yield from _overrides(value, f"{prefix}{name}.", inner)
        else:
            yield f"{prefix}{name}={_text(value)}"


def _text(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return QuotedString(str(value), Quote.single).with_quotes()
    if isinstance(value, Mapping):
        pairs = (f"{_key(str(key))}: {_text(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _key(name: str) -> str:
    """A key of a dict: the grammar has no quotes there."""
    return "".join(f"\\{sign}" if sign in "\\()[]{}:=, \t" else sign for sign in name)
