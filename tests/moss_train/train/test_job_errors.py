"""Data and numbers that go wrong, a full disk: counted where it does no harm, else named."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from data_pipeline.index import prepare_index
from data_pipeline.shards import write_shards
from data_pipeline.toy.build import ToyConfig, make_sample
from moss_train.train.json_lines import read
from moss_train.train.save import Save, SaveError
from tests.moss_train.train.runs import audit, metrics, saved_steps, steps
from tests.torchrun import run_ranks


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Folders of 40 pictures: `few` has two that are no JPEG, in `many` it is every other one."""
    out = tmp_path_factory.mktemp("broken")
    config = ToyConfig(train=40, heldout=1)
    for name, every in (("few", 20), ("many", 2)):
        samples = [make_sample("sft/train/image", config, number) for number in range(40)]
        for sample in samples[::every]:
            (picture,) = [member for member in sample if member.endswith(".jpg")]
            sample[picture] = b"no picture at all"
        write_shards(samples, out / name, 20)
        prepare_index(out / name)
    return out


@pytest.fixture(scope="module")
def outcomes(small, broken, run_jobs, tmp_path_factory):
    """Each job, in its run folder."""
    runs = tmp_path_factory.mktemp("errors")

    def task(name, *overrides, **options):
        run = f"run.dir={runs / name}"
        return {"name": name, "overrides": [*small, *overrides, run], **options}

    def pictures(name):
        source = f"{{name: {name}, path: {broken / name}, modality: image}}"
        mixture = "stage.mixture={text: 0, image: 1, video: 0}"
        return [f"data.sources=[{source}]", mixture, "trainer.steps=20", "data.max_bad_ratio=0.2"]

    full = ["trainer.checkpoint_every=2", "trainer.steps=6"]
    # Less than what is reserved at first; less than the weights.
    none, some = (3, 200_000), (3, 10_000_000)
    # Nothing at all in steps 2 to 4.
    (runs / "no_latest" / "checkpoints" / "latest").mkdir(parents=True)
    (runs / "no_latest" / "checkpoints" / ".removing_step_00000001").touch()  # nor is it a folder
    result = run_jobs(
        1,
        task("few", *pictures("few")),
        task("many", *pictures("many")),
        task("nan", "optimizer.lr=1e38", "stage.warmup_ratio=0", "trainer.steps=20"),
        task("full", *full, file_limit=none),
        task("full_weights", *full, file_limit=some),
        task("full_async", *full, "trainer.async_save=true", file_limit=some),
        task(
            "nothing",
            "trainer.checkpoint_every=2",
            "trainer.steps=6",
            "trainer.profile=3..4",
            "logger.tensorboard=true",
            file_limit=(2, 1, 5),
            poison={"3": "loss"},
        ),
        task("no_latest", "trainer.checkpoint_every=2", "trainer.steps=2"),
        task("full_again", *full, f"trainer.resume={runs / 'full'}"),
    )
    return result, runs


def test_a_few_broken_samples_are_counted(outcomes):
    result, runs = outcomes
    assert result.load("few")["error"] is None
    assert steps(runs / "few") == list(range(1, 21))
    skipped = sum(row["skipped_samples"] for row in metrics(runs / "few"))
    assert 2 <= skipped <= 6  # 80 samples are two passes; each stream reads ahead
    assert "skipped few/" in result.stderr()


def test_too_many_broken_samples_end_the_job(outcomes):
    result, runs = outcomes
    error = result.load("many")["error"]
    found = re.fullmatch(
        r"RuntimeError: step (\d+): (\d+) of the last (\d+) samples could not be used \((.*)%, "
        r"data.max_bad_ratio=20.0%; undecodable_image \d+\): see the warnings above",
        error,
    )
    assert found, error
    step, bad, total, percent = (float(number) for number in found.groups())
    assert bad >= 10
    assert total == bad + 4 * step
    assert percent == pytest.approx(100 * bad / total, abs=0.05)
    assert percent > 20
    assert steps(runs / "many") == list(range(1, int(step)))


def test_the_share_of_bad_samples_is_that_of_the_last_ones():
    from moss_train.train.data import BadSamples

    bad = BadSamples(0.1)
    for _ in range(1000):
        bad.add(1, good=100, bad={"bad_json": 1})
    for _ in range(9):  # the share of the last 10,000: 9 x 50 + 91 of them, below a tenth
        bad.add(1, good=50, bad={"bad_json": 50})

    def only_bad_ones() -> None:
        for _ in range(11):
            bad.add(1, good=0, bad={"bad_json": 100})

    with pytest.raises(RuntimeError) as caught:
        only_bad_ones()
    found = re.match(
        r"step 1: (\d+) of the last (\d+) samples could not be used", str(caught.value)
    )
    assert found
    unreadable, tried = int(found[1]), int(found[2])
    assert 10_000 <= tried < 10_000 + 101
    assert 0.1 * tried < unreadable < 0.1 * tried + 100
    few = BadSamples(0.0)
    few.add(2, good=10, bad={"bad_json": 9})
    with pytest.raises(RuntimeError, match=r"step 2: 10 of the last 21 samples"):
        few.add(2, good=1, bad={"bad_json": 1})


def test_losses_that_are_no_numbers_end_the_job(outcomes):
    result, runs = outcomes
    error = result.load("nan")["error"]
    step = len(steps(runs / "nan"))
    assert re.match(
        rf"RuntimeError: step {step}: 5 steps in a row were left out, the last since the loss is "
        r"not finite, and there is no checkpoint: lower optimizer.lr, or look at the samples that",
        error,
    )
    assert saved_steps(runs / "nan") == []
    assert metrics(runs / "nan")[-1]["skipped_steps"] == 5


@pytest.mark.parametrize("name", ["full", "full_weights", "full_async"])
def test_a_full_disk_is_a_warning_and_at_the_end_an_error_and_harms_no_checkpoint(outcomes, name):
    from moss_train.checkpoint_dir import find

    result, runs = outcomes
    said = r"\.writing_step_0000000%d could not be written \(\d+\.\d GB are free there\): "
    warned = f"WARNING {runs / name}/checkpoints/{said % 4}.*: training goes on, the last"
    assert re.search(warned, result.stderr())
    error = result.load(name)["error"]
    assert re.match(f"SaveError: {runs / name}/checkpoints/{said % 6}", error)
    assert steps(runs / name) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (runs / name / "checkpoints").iterdir() if path.is_dir()] == [
        "step_00000002"
    ]
    assert find(runs / name) == runs / name / "checkpoints" / "step_00000002"
    if name == "full":
        assert result.load("full_again")["error"] is None
        assert steps(runs / "full_again") == [3, 4, 5, 6]


def test_a_checkpoint_is_whole_without_the_name_of_the_newest(outcomes):
    """Where that cannot be written, or something old cannot be removed, a line says so."""
    result, runs = outcomes
    assert result.load("no_latest")["error"] is None
    folder = runs / "no_latest" / "checkpoints"
    assert saved_steps(runs / "no_latest") == [2]
    said = rf"{folder}/latest cannot be written \(.*: the checkpoint is whole"
    assert re.search(said, result.stderr())
    assert f"{folder}/.removing_step_00000001 cannot be removed" in result.stderr()


def test_where_nothing_can_be_written_training_goes_on_and_the_lines_come_later(outcomes):
    result, runs = outcomes
    run = runs / "nothing"
    assert result.load("nothing")["error"] is None
    assert steps(run) == list(range(1, 7))
    assert sorted(audit(run)) == list(range(1, 7))
    assert [row["step"] for row in read(run / "bad_steps.jsonl")] == [3]
    assert [row["event"] for row in read(run / "history.jsonl")] == ["start", "end"]
    assert saved_steps(run)[-1] == 6
    said = result.stderr()
    assert f"{run}/metrics.jsonl can be written again: 3 line(s) have waited" in said
    assert not [path for path in run.rglob("*") if path.name.endswith(".partial")]


def test_a_save_finds_a_folder_that_was_moved_or_left_half_written_or_says_what_is_wrong(
    groups, tmp_path
):
    """A save that fails is a warning on all ranks: none may meet an error alone."""
    folder = tmp_path / "run/checkpoints"
    left = folder / ".writing_step_00000003"
    with pytest.raises(SaveError, match=r"checkpoints/.* could not be written: .*No such file"):
        Save(folder, 3).open()  # the run's folder is gone, as with the storage that it was on
    assert not folder.parent.exists()
    folder.parent.mkdir()
    for _ in range(2):  # without the folder; with what is left of a save that failed
        Save(folder, 3).open()
        assert [path.name for path in left.iterdir()] == [".reserve"]
        (left / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SaveError, match=r"gone/.writing_step_00000003 could not be written: .*Not"):
        Save(tmp_path / "file/gone", 3).open()


def test_a_file_that_rank_0_alone_cannot_write_is_a_failed_save_of_all_ranks(tmp_path):
    """Another program may take the space that was kept for it, in the moment between."""
    files = [".metadata", "metadata.json"]
    if Version(version("megatron-core")) < Version("0.19"):
        files.append("common.pt")
    result = run_ranks("tests/workers/failing_save.py", 2, *files, out=tmp_path)
    folder = tmp_path / "checkpoints"
    for step, obstacle in enumerate(files):
        said = rf"{folder}/\.writing_step_0000000{step} could not be written.*{obstacle}.*"
        both = result.load_all(obstacle)
        assert len(both) == 2
        assert both[0] == both[1]
        assert re.fullmatch(said, both[0])
    assert result.load_all("none") == ["", ""]
    saved = f"step_0000000{len(files)}"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [saved]
