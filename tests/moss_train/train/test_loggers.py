"""wandb (offline: real files, read as wandb writes them) and TensorBoard (its own reader)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moss_train.config import Config, ConfigError, LoggerConfig, RunConfig, TrainerConfig
from moss_train.train.loggers import open_loggers
from moss_train.train.metrics import GROUPS, MetricsWriter
from tests.moss_train.train.test_metrics import step_metrics
from tests.waiting import until

CONF = Path(__file__).parents[3] / "conf" / "logger"
BLOCK = 32768


def config(run_dir: Path, **logger: object) -> Config:
    made = Config(run=RunConfig(str(run_dir)), trainer=TrainerConfig(steps=9))
    made.data.tokenizer, made.data.global_batch = "", 8
    made.logger = LoggerConfig(**logger)  # type: ignore[arg-type]
    return made


def checkpoint(run_dir: Path, step: int) -> Path | None:
    """What a run that goes on after `step` starts from."""
    if not step:
        return None
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    saved = {"step": step, "samples": 0, "layout": {}, "config": {}}
    (path / "run.json").write_text(json.dumps(saved))
    return path


def run_steps(
    made: Config, first: int, last: int, loss: float = 2.5, back: tuple[int, float] | None = None
) -> None:
    """A process of the run; `back`: after its last step it goes back after a step, and on with
    another loss."""
    folder = Path(made.run.dir)
    with open_loggers(made, checkpoint(folder, first - 1)) as loggers:
        writer = MetricsWriter(folder, loggers, first - 1)
        for step in range(first, last + 1):
            writer.write(step_metrics(step, loss))
        if back is not None:
            writer.rewind(back[0])
            for step in range(back[0] + 1, last + 1):
                writer.write(step_metrics(step, back[1]))


def records(file: Path) -> Iterator[bytes]:
    """Records of a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with chunks of checksum
    (4), length (2), kind (1: whole; 2, 3, 4: first, middle, last of a record) and content."""
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if at + 7 + length > len(content):  # it is being written
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_records(run_dir: Path) -> list:
    """Records of all offline files of a run that has ended, oldest file first."""
    from wandb.proto import wandb_internal_pb2 as protocol

    read = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        found: list = []

        def whole(file=file, found=found) -> bool:
            found.clear()
            for content in records(file):
                found.append(protocol.Record())  # type: ignore[attr-defined]
                found[-1].ParseFromString(content)
            return bool(found) and found[-1].HasField("exit")

        until(whole)  # wandb's own process writes the last records when `finish` has returned
        read += found
    return read


def wandb_rows(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """wandb's step and the values of each row."""
    history = [record.history for record in wandb_records(run_dir) if record.HasField("history")]
    return [
        (row.step.num, {_name(i): json.loads(i.value_json) for i in row.item}) for row in history
    ]


def _name(item) -> str:
    return item.key or "/".join(item.nested_key)


def tensorboard(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def test_wandb_offline_has_every_step_once_after_resumes_and_steps_back(tmp_path, caplog):
    made = config(tmp_path, wandb=True, wandb_mode="offline", project="a-project")
    run_steps(made, 1, 4)
    # The first process had no checkpoint after step 2. Later, steps 5 and 6 were bad.
    run_steps(made, 3, 6, loss=1.0, back=(4, 0.5))
    rows = wandb_rows(tmp_path)
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for _, row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss/loss"] for _, row in rows] == [2.5, 2.5, 1.0, 1.0, 0.5, 0.5]
    assert rows[0][1]["speed/frames_per_s"] == 32.0
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert {(run.run_id, run.project) for run in runs} == {(run_id, "a-project")}
    saved = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert saved["data"]["global_batch"] == 8
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1  # one upload is the whole run


def test_tensorboard_has_every_step_once_after_resumes_and_steps_back(tmp_path):
    made = config(tmp_path, tensorboard=True)
    run_steps(made, 1, 4)
    run_steps(made, 3, 6, loss=1.0, back=(4, 0.5))
    events = tensorboard(tmp_path)
    tags = {f"{group}/{name}" for group, names in GROUPS.items() for name in names}
    tags -= {"speed/mfu", "speed/hfu"}  # of GPUs whose peak is known only
    tags -= {"loss/weighted_loss"}  # of balanced states only
    assert set(events.Tags()["scalars"]) == tags | {"data/epochs/toy", "data/skipped/bad_json"}
    losses = [(event.step, event.value) for event in events.Scalars("loss/loss")]
    assert losses == [(1, 2.5), (2, 2.5), (3, 1.0), (4, 1.0), (5, 0.5), (6, 0.5)]
    assert events.Scalars("speed/tokens_per_s")[0].value == 1500.0


def test_loggers_show_what_validation_measured_and_what_was_not_finite(tmp_path):
    losses = {"loss": 1.5, "source": {"a": 1.5, "b": None}, "accuracy": {"source": {"a": 0.5}}}
    made = config(tmp_path, tensorboard=True)
    with open_loggers(made, None) as loggers:
        writer = MetricsWriter(tmp_path, loggers)
        writer.write(replace(step_metrics(1, math.nan), validation=losses))
    events = tensorboard(tmp_path)
    found = {tag for tag in events.Tags()["scalars"] if tag.startswith("validation/")}
    assert found == {"validation/loss", "validation/source/a", "validation/accuracy/source/a"}
    assert math.isnan(events.Scalars("loss/loss")[0].value)


def test_a_run_that_is_done_and_other_ranks_open_no_loggers(tmp_path, monkeypatch):
    made = config(tmp_path, wandb=True, tensorboard=True, wandb_mode="offline")
    with open_loggers(made, checkpoint(tmp_path, 9)) as loggers:
        assert loggers == []
    monkeypatch.setenv("RANK", "1")
    with open_loggers(made, None) as loggers:
        assert loggers == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_job_that_fails_before_its_first_step_leaves_what_was_there(tmp_path):
    made = config(tmp_path / "new", wandb=True, tensorboard=True, wandb_mode="offline")
    with pytest.raises(RuntimeError), open_loggers(made, None):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["offline", "dryrun"])
def test_the_environment_s_mode_counts_where_the_configuration_has_none(
    tmp_path, monkeypatch, mode
):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert config(tmp_path, wandb=True).logger.mode == "offline"
    assert config(tmp_path, wandb=True, wandb_mode="online").logger.mode == "online"


@pytest.mark.parametrize("by_environment", [True, False])
def test_disabled_is_without_wandb(tmp_path, monkeypatch, by_environment):
    monkeypatch.setenv("WANDB_MODE", "disabled" if by_environment else "online")
    made = config(tmp_path, wandb=True, wandb_mode=None if by_environment else "disabled")
    with open_loggers(made, None) as loggers:
        assert loggers == []


def test_wandb_that_cannot_start_is_one_line_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")  # wandb refuses it without asking its server
    made = config(tmp_path / "new", wandb=True)
    with pytest.raises(ConfigError) as caught, open_loggers(made, None):
        pass
    assert not (tmp_path / "new").exists()
    (line,) = caught.value.problems
    assert line.startswith("logger.wandb=true: wandb cannot start: ")
    assert "logger.wandb_mode=offline" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["none", "wandb", "tensorboard"])
def test_the_logger_group_has_every_field_and_switches_one_sink(name):
    chosen = OmegaConf.load(CONF / f"{name}.yaml")
    expected = asdict(LoggerConfig()) | ({} if name == "none" else {name: True})
    assert OmegaConf.to_container(chosen) == expected
