"""Which checkpoint a run starts from, and whether it fits the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moss_train.checkpoint_dir import checkpoints_folder, find, flaw, read_run, steps_in
from moss_train.config import AdapterConfig, Config, ConfigError, flatten, to_dict
from moss_train.convert.folders import why_no_checkpoint
from moss_train.log import log
from moss_train.sources import order_changes
from moss_train.trained_tokenizer import check_llama, check_start, check_tokenizer

# What a resumed run must have as before, beside the model's sizes.
STAGE = ("name", "train", "also", "prompt")
ROPE = "cross_attention_rope"
NUMBERS = ("dtype", "tokens_before_first_frame")


def find_resume(config: Config, damaged: Mapping[Path, str] | None = None) -> Path | None:
    """The checkpoint that this run continues, None for a new one; checks `init_from` too.

    damaged: checkpoints whose contents are known to be wrong, and what is wrong of them.

    Raises:
        ConfigError: a named checkpoint is missing or damaged, or does not fit the configuration; or
            the run folder has checkpoints, and none of them is whole.
        StorageError: the storage does not answer.
    """
    checkpoint = _chosen(config, damaged or {})
    named = f"data.tokenizer={config.data.tokenizer}"
    if checkpoint is not None:
        saved = read_run(checkpoint)
        check_architecture(config, saved["config"], checkpoint)
        check_adapter(config, saved["config"], checkpoint, resume=True)
        check_stage(config, saved["config"], checkpoint)
        check_order(config, saved, checkpoint)
        check_length(config, saved, checkpoint)
        mend = f"give that one, or start a new run with init_from={checkpoint}"
        check_tokenizer(saved, checkpoint, config.data.tokenizer, named, mend)
    elif config.init_from is not None:
        source = _must_find("init_from", config.init_from)
        saved = read_run(source)
        check_architecture(config, saved["config"], source)
        check_adapter(config, saved["config"], source, resume=False)
        _warn_of_first_frames(config, saved["config"], source)
        check_start(saved, source, config.data.tokenizer, named, config.data.new_tokenizer)
    elif config.model.init.from_llama is not None:
        llama = Path(config.model.init.from_llama)
        check_llama(llama, config.data.tokenizer, named, config.data.new_tokenizer)
    return checkpoint


def _chosen(config: Config, damaged: Mapping[Path, str]) -> Path | None:
    """The checkpoint that `trainer.resume` means: auto is the newest of the run's own, none is
    None. Raises ConfigError where that cannot be continued."""
    resume = config.trainer.resume
    own = checkpoint = find(Path(config.run.dir), damaged)
    if own is None and resume == "auto" and not config.trainer.start_over:
        _check_new(Path(config.run.dir), damaged)
    if resume != "auto":
        checkpoint = None if resume == "none" else _must_find("trainer.resume", resume)
    if own is not None and (
        checkpoint is None or read_run(own)["step"] > read_run(checkpoint)["step"]
    ):
        # Later steps of another course of training would be taken for this one's.
        raise ConfigError(
            [f"trainer.resume={resume}: {own} is ahead of that: choose another run.dir"]
        )
    if checkpoint is not None:
        saved = read_run(checkpoint)
        if checkpoint != own and saved["step"] >= config.steps:
            raise ConfigError(
                [
                    f"trainer.resume={checkpoint}: is at step {saved['step']}, and the run has "
                    f"{config.steps} steps: raise trainer.steps"
                ]
            )
        if saved.get("weights_only"):
            raise ConfigError(
                [f"trainer.resume={checkpoint}: holds weights alone: start from it with init_from"]
            )
    return checkpoint


def changed_fields(config: Config, saved: dict) -> Iterator[str]:
    """A line for each field that `saved` (the checkpoint's configuration) has otherwise."""
    before = dict(flatten(_fields(saved)))
    for name, value in flatten(_fields(to_dict(config))):
        if name not in ("run.dir", "trainer.resume") and before.get(name, value) != value:
            yield f"{name}={value} (was {before[name]})"


def _fields(plain: dict) -> dict:
    """The configuration with a part `data.sources[NAME]` for each source, in place of a list; the
    multipliers, whose keys are patterns, are one value."""
    data = dict(plain["data"])
    for field in ("sources", "eval_sources"):
        data |= {f"{field}[{source['name']}]": source for source in data.pop(field, [])}
    optimizer = {**plain["optimizer"]}
    optimizer["lr_multipliers"] = str(optimizer.get("lr_multipliers"))
    return {**plain, "data": data, "optimizer": optimizer}


def _check_new(run: Path, damaged: Mapping[Path, str]) -> None:
    """Raises ConfigError where a run would begin again in a folder of damaged checkpoints."""
    problems = [
        f"checkpoint {path}: is damaged: {damaged.get(path) or flaw(path)}"
        for path in steps_in(checkpoints_folder(run))
    ]
    if problems:
        raise ConfigError(
            [
                *problems,
                f"run.dir={run}: none of its checkpoints can be loaded: bring one back, or begin "
                "at step 1 with trainer.start_over=true, which renames them to .damaged_*",
            ]
        )


def _must_find(field: str, value: str) -> Path:
    path = find(Path(value))
    if path is None:
        raise ConfigError([f"{field}={value}: {why_no_checkpoint(Path(value))}"])
    return path


def check_architecture(config: Config, saved: dict, checkpoint: Path) -> None:
    """Raises ConfigError where `saved` (the checkpoint's configuration) has another model."""
    mine, theirs = to_dict(config)["model"], saved["model"]
    # No parameter shows it, but keys and queries are made for it.
    rope = {name: mine[name] for name in (ROPE,) if name in theirs}
    problems = list(_differences(rope, theirs, "model", (), checkpoint))
    for part, ignored in (
        ("vision", ("frames_per_chunk", "recompute", "kept_frames")),
        ("projector", ()),
        ("text", ()),
    ):
        problems += _differences(mine[part], theirs[part], f"model.{part}", ignored, checkpoint)
    if problems:
        raise ConfigError(problems)


def _warn_of_first_frames(config: Config, saved: dict, checkpoint: Path) -> None:
    """New weights may learn it either way; until they have, the loss is higher."""
    name = "tokens_before_first_frame"
    current, before = getattr(config.model, name), saved["model"].get(name)
    if before not in (None, current):
        log.warning("model.%s=%s: %s was trained with %s", name, current, checkpoint, before)


def check_stage(config: Config, saved: dict, checkpoint: Path) -> None:
    """Raises ConfigError where the checkpoint is of another stage: it is in the middle of that."""
    mine = to_dict(config)
    problems = [
        *_differences(
            {name: mine["stage"][name] for name in STAGE}, saved["stage"], "stage", (), checkpoint
        ),
        *_differences(
            {name: mine["model"][name] for name in NUMBERS}, saved["model"], "model", (), checkpoint
        ),
    ]
    if problems:
        end = f"a new run may start from its weights (init_from={checkpoint}, another run.dir)"
        raise ConfigError([*problems, f"trainer.resume={config.trainer.resume}: {end}"])


def _differences(
    mine: dict, theirs: dict, name: str, ignored: Iterable[str], checkpoint: Path
) -> Iterator[str]:
    for key, value in mine.items():
        if key not in ignored and theirs.get(key) != value:
            yield f"{name}.{key}={value}: the checkpoint {checkpoint} has {theirs.get(key)}"


def check_adapter(config: Config, saved: dict, checkpoint: Path, resume: bool) -> None:
    """Raises ConfigError where the adapters of a checkpoint and of this run cannot go together.

    A resumed run keeps its adapters. A new one may take the same, add some to a checkpoint without
    any, or have none: then those of the checkpoint are merged.
    """
    mine, theirs = asdict(config.adapter), saved.get("adapter", asdict(AdapterConfig()))
    without = [adapter["name"] for adapter in (mine, theirs)].count("none")
    if without == 2 or mine == theirs or (without == 1 and not resume):
        return
    different = [f"{key}={value}" for key, value in mine.items() if theirs[key] != value]
    raise ConfigError(
        [f"adapter ({', '.join(different)}): the checkpoint {checkpoint} has another one: {theirs}"]
    )


def check_order(config: Config, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises ConfigError where a run would not go on with the data of `saved` (the checkpoint's
    run.json) and `trainer.resume_data=exact` wants it to.
    """
    changes = order_changes(config, saved)
    if changes and config.trainer.resume_data == "exact":
        raise ConfigError(
            [
                f"trainer.resume_data=exact: {checkpoint} has other data: {'; '.join(changes)}: "
                "give what it has, or take trainer.resume_data=fresh: what has changed begins anew"
            ]
        )


def check_length(config: Config, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises ConfigError where a run is as long as its samples, and its first steps, of another
    global batch, have read more or fewer of them than as many steps of this one would."""
    done, samples, batch = saved["step"], saved["samples"], config.data.global_batch
    if config.trainer.steps is not None or samples == done * batch:
        return
    length = "data.samples" if config.data.samples is not None else "stage.samples"
    steps = done + max(0, config.samples - samples) // batch
    raise ConfigError(
        [
            f"data.global_batch={batch}: the {done} steps of {checkpoint}, of another batch size, "
            f"have read {samples} of {length}={config.samples} samples: write "
            f"trainer.steps={steps}, which reads the remaining ones"
        ]
    )
