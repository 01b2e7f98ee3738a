"""What a job leaves in its run folder, and what it accepts: layouts, overrides, real files."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_pipeline.build import build_shards
from data_pipeline.tokenizer_identity import identify
from tests.moss_train.train.runs import ENTRY, audit, metrics, saved_steps, steps
from tests.pages import open_page
from tests.torchrun import run_ranks
from tests.waiting import until

PROMISED = {
    "step", "loss", "lr", "grad_norm", "samples", "tokens", "frames", "step_time_s",
    "tokens_per_s", "frames_per_s", "model_tflops_per_s_per_rank", "memory_gb", "data_wait_s",
    "skipped_samples",
}  # fmt: skip


def test_all_ranks_write_into_one_run_folder(small, tmp_path):
    """The default folder has the second of the start in its name, and rank 1 starts later."""
    loggers = ["logger=wandb", "logger.wandb_mode=offline", "logger.tensorboard=true"]
    options = [*small, "parallel=dp2", "trainer.steps=3", "trainer.profile=2..3", *loggers]
    done = run_ranks("tests/workers/late.py", 2, str(tmp_path), *options, out=tmp_path / "out")
    # Ranks end together: srun kills the machines that end seconds after the first.
    assert done.load_all("ended") == [True, True]
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"pt2-\d{8}-\d{6}", run.name)
    assert not (tmp_path / "outputs").exists()
    assert saved_steps(run) == [3]

    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.keys() >= PROMISED
        assert all(isinstance(row[key], int | float) for key in PROMISED)
        assert row["samples"] == 4
        assert row["skipped_samples"] == 0
        assert min(row[key] for key in PROMISED - {"skipped_samples"}) > 0
        assert row["data_wait_s"] <= row["step_time_s"]
        assert 0 < sum(row["phase_s"].values()) <= row["step_time_s"]
        assert "mfu" not in row  # a CPU has no peak to compare with
        assert sum(row["epochs"].values()) > 0
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(row["tokens"])
    assert audit(run).keys() == {1, 2, 3}
    read = Counter(key.split("/")[0] for keys in audit(run).values() for key in keys)
    expected = {source: pytest.approx(read[source] / 24) for source in rows[-1]["epochs"]}
    assert rows[-1]["epochs"] == expected  # 24 samples in each source
    assert all(len(keys) == 4 for keys in audit(run).values())

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["steps"] == 3
    assert config["data"]["micro_batch"] == 2
    assert config["run"]["dir"] == f"runs/{run.name}"
    profiled = open_page(run / "profile" / "profile.html")
    assert [table[0][1] for table in profiled.tables] == ["ms", "after"]
    assert len(profiled.tables[0]) > 10  # operators
    assert profiled.text.startswith("Steps 2 to 3") or "Steps 2 to 3" in profiled.text
    trace = gzip.decompress((run / "profile" / "trace.json.gz").read_bytes())
    assert "aten::linear" in {event.get("name") for event in json.loads(trace)["traceEvents"]}
    page = open_page(run / "report.html")
    assert page.row("loss per label")[:2] == [f"{rows[0]['loss']:.4f}", f"{rows[2]['loss']:.4f}"]
    assert "loss per label" in page.captions
    events = list(run.glob("tensorboard/events.out.tfevents.*"))
    assert [path.stat().st_size > 1000 for path in events] == [True]
    offline = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(offline) == 1
    # wandb's own process writes the last records when the job has ended.
    until(lambda: offline[0].stat().st_size > 1000)


def test_overrides_hold_in_every_preset_and_four_ranks_may_share_one_frame(toy, tmp_path):
    options = [
        "stage=sft", "model=tiny", "data=toy", "parallel=tp2_pp2", "hardware=cpu",
        "model.text.vocab_size=512", "model.dtype=bf16", "hardware.threads=1",
        "stage.mixture={text: 0, image: 1, video: 0}", f"data.root={toy}", "data.audit=true",
        "data.global_batch=1", "data.micro_batch=1", "trainer.steps=2", "trainer.seed=7",
    ]  # fmt: skip
    run = tmp_path / "run"
    result = run_ranks(ENTRY, 4, *options, f"run.dir={run}", out=tmp_path)
    assert steps(run) == [1, 2]
    for row in metrics(run):
        assert row["samples"] == row["frames"] == 1
        assert row["frames_per_rank_max"] == 1
        assert row["frames_per_rank_mean"] == 0.25
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["seed"] == 7
    assert "model tiny (bf16), 4 ranks = 1 data x 2 pipeline x 2 tensor, cpu" in result.stderr()
    checkpoint = json.loads((run / "checkpoints/step_00000002/run.json").read_text())
    assert checkpoint["layout"] == {"world": 4, "tensor": 2, "pipeline": 2, "virtual": 1}
    assert checkpoint["config"] == config
    assert checkpoint["tokenizer"] == identify(toy / "tokenizer").to_dict()


def test_the_job_trains_on_imported_files(shared: Path, toy, tmp_path):
    summary = build_shards(shared / "data" / "sharegpt_sample.json", tmp_path / "shards")
    assert summary.imported["image"] > 0
    assert summary.imported["video"] > 0
    found = ", ".join(
        f"{{name: my-{group}, path: {tmp_path}/shards/{group}, modality: {group}}}"
        for group in summary.imported
    )
    shares = ", ".join(f"{m}: {int(m in summary.imported)}" for m in ("text", "image", "video"))
    options = [
        "stage=sft", "model=toy", "data=shards", "parallel=tp2", "hardware=cpu",
        f"data.tokenizer={toy}/tokenizer", f"data.sources=[{found}]", f"stage.mixture={{{shares}}}",
        "data.global_batch=4", "data.sequence_length=1024", "data.workers=1", "data.audit=true",
        "data.shuffle_window=4", "stage.video_max_frames=12", "trainer.steps=3",
        "hardware.threads=1", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    run_ranks(ENTRY, 2, *options, out=tmp_path / "out")
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sum(row["frames"] for row in rows) > 12
    assert sum(row["skipped_samples"] for row in rows) == 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    keys = {key.split("/")[0] for step in audit(tmp_path / "run").values() for key in step}
    assert keys == {f"my-{group}" for group in summary.imported}
