"""The front door in Python: `import moss_train`, a configuration, a run, its model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moss_train
from data_pipeline.toy.build import ToyConfig, build_toy
from moss_train.config import ConfigError
from tests.torchrun import OUT, REPO, Result
from tools.preloaded import Command


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("front_door")


@pytest.fixture(scope="module")
def seen(out: Path) -> dict[str, Any]:
    """What tests/workers/front_door.py did in one process, which is not under torchrun."""
    build_toy(out / "toy", ToyConfig(train=12, heldout=1, stages=("pt2",)))
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = Command(
        "tests.workers.front_door",
        [str(out / "toy"), str(out)],
        environment | {OUT: str(out), "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        out / "log",
    )
    assert command.wait(300) == 0, (out / "log").read_text()[-4000:]
    found: dict[str, Any] = Result(0, out, 0.0).load("seen")
    return found


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "hydra", "numpy")
    code = f"import sys, moss_train; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    assert dir(moss_train) == moss_train.__all__
    for name in moss_train.__all__:
        assert callable(getattr(moss_train, name))
    with pytest.raises(AttributeError, match="'moss_train' has no attribute 'trian'"):
        moss_train.trian  # noqa: B018  # type: ignore[attr-defined]


def test_groups_fields_and_overrides_make_a_configuration() -> None:
    dotted: dict[str, Any] = {"model.text.num_layers": 7}
    config = moss_train.load_config(
        "sft",
        model="tiny",
        parallel="tp2",
        trainer={"steps": 20, "eval_every": None, "async_save": True},
        run={"dir": Path("runs/it's") / "a b"},
        optimizer={"lr_multipliers": {"vision.*": 0.1, "a b:c": 2}},
        data={"sources": [{"name": "own", "path": "x,y", "modality": "video"}]},
        overrides=["data.global_batch=8", "trainer.steps=30"],
        stage={"lr": 1e-4},
        **dotted,
    )
    assert config.stage.name == "sft"
    assert (config.model.name, config.model.text.num_layers) == ("tiny", 7)
    assert config.parallel.tensor == 2
    assert (config.steps, config.trainer.eval_every, config.trainer.async_save) == (20, None, True)
    assert config.run.dir == "runs/it's/a b"
    assert config.optimizer.multipliers == {"vision.*": 0.1, "a b:c": 2}
    assert [vars(source) for source in config.data.sources] == [
        {"name": "own", "path": "x,y", "modality": "video", "weight": 1.0}
    ]
    assert config.data.global_batch == 8
    assert config.stage.lr == 1e-4


@pytest.mark.parametrize(
    ("stage", "fields", "said"),
    [
        ("pt3", {}, "stage=pt3: choose one of pt1, pt2, realtime_sft, sft"),
        (None, {"model": "huge"}, "model=huge: choose one of 11b, 90b, tiny, toy"),
        (
            None,
            {"trainer": {"step": 3}},
            "trainer.step: is not a field: did you mean trainer.steps?",
        ),
        (
            None,
            {"trainer.steps": "many"},
            "trainer.steps=many: must be a whole number or null",
        ),
        (
            "sft",
            {"data": "shards"},
            "data.tokenizer is not set: give it a value, data.tokenizer=...",
        ),
    ],
)
def test_a_wrong_choice_is_refused_in_the_line_of_the_command(
    stage: str | None, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        moss_train.load_config(stage, **fields)
    assert caught.value.problems == [said]


def test_what_the_process_cannot_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    config = moss_train.load_config(
        "pt1", model="tiny", parallel="tp2", run={"dir": tmp_path / "run"}
    )
    with pytest.raises(ConfigError, match="a replica takes 2 ranks, and the job has 1"):
        moss_train.train(config)
    config.parallel.tensor = "two"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"parallel\.tensor=two: must be a whole number"):
        moss_train.train(config)
    assert not (tmp_path / "run").exists()


def test_two_runs_of_a_process_are_equal_to_the_bit(seen: dict[str, Any]) -> None:
    first, second = seen["runs"]
    assert len(first) == 3
    assert first == second


def test_a_run_that_is_done_or_refused_leaves_its_folder_as_it_was(seen, out: Path) -> None:
    changed, done = seen["again"].splitlines()[-2:]
    assert changed.endswith("changed since step 3: optimizer.lr=0.5 (was None)")
    assert "nothing to do: step 3 of 3 is done" in done
    assert seen["refused"] == [
        f"stage.train=['nothing.*']: the checkpoint {out}/first/checkpoints/step_00000003 has "
        "['*']",
        "trainer.resume=auto: a new run may start from its weights "
        f"(init_from={out}/first/checkpoints/step_00000003, another run.dir)",
        f"trainer.resume_data=exact: {out}/first/checkpoints/step_00000003 has other data: "
        "shuffle_window 7 (was 100): give what it has, or take trainer.resume_data=fresh: what has "
        "changed begins anew",
        f"trainer.resume=none: {out}/first/checkpoints/step_00000003 is ahead of that: "
        "choose another run.dir",
    ]
    assert seen["untouched"]


def test_training_leaves_the_process_as_it_was(seen: dict[str, Any]) -> None:
    assert seen["draws_after"] == seen["draws"]
    assert seen["threads_kept"]
    assert seen["rank"] is None
    assert seen["group_ended"]
    assert seen["group_ended_after_models"]


def test_garbage_of_before_and_after_a_training_is_collected(seen: dict[str, Any]) -> None:
    assert seen["left"] == [False, False]


def test_what_is_printed_goes_to_stderr_or_nowhere(seen: dict[str, Any]) -> None:
    assert seen["stdout"] == seen["quiet"] == ""
    assert "step 3/3  loss" in seen["lines"]


def test_a_run_is_read_from_its_folder(seen: dict[str, Any], out: Path) -> None:
    run = moss_train.Run.open(out / "first")
    assert [row["loss"] for row in run.metrics] == seen["runs"][0]
    assert run.config.data.root == str(out / "toy")
    assert run.checkpoint == out / "first" / "checkpoints" / "step_00000003"
    figure = run.plot()
    (axes,) = figure.axes
    assert np.array_equal(axes.lines[0].get_ydata(), seen["runs"][0])
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="give the folder of a run"):
        moss_train.Run.open(out / "toy")


def test_models_answer_while_others_train(seen: dict[str, Any]) -> None:
    """Runs of the same numbers have the same model; one opened before a training still works."""
    answer, same = seen["answers"]
    assert answer == same == seen["answer_later"]
    assert answer


def test_an_interrupt_saves_and_returns(seen: dict[str, Any], out: Path) -> None:
    stopped, steps = seen["stopped"]
    assert stopped
    assert 1 <= steps < 400
    assert seen["saved"] == str(out / "long" / "checkpoints" / f"step_{steps:08d}")


def test_a_thread_can_train(seen: dict[str, Any]) -> None:
    assert seen["thread"] == 1


def test_an_export_opens_without_the_code_of_the_folder(seen: dict[str, Any], out: Path) -> None:
    from inference.engine.load import load_model

    assert "modeling_moss_video.py" in seen["export"]
    assert load_model(out / "export", "cpu").config.moss_stage == "pt2"
