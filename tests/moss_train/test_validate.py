"""A wrong configuration ends the job before it starts, with a line for everything wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moss_train.config import Config
from moss_train.validate import _paths
from tests.moss_train.train.runs import ENTRY
from tests.torchrun import OUT, REPO, run_ranks

# What is wrong -> the ranks of the job, its overrides, the lines that it is refused with.
CASES: dict[str, tuple[int, list[str], list[str]]] = {
    "heads": (
        3, ["parallel.tensor=3"],
        ["model.text.num_heads=8: must be a multiple of parallel.tensor=3",
         "model.text.num_kv_heads=4: must be a multiple of parallel.tensor=3",
         "model.text.vocab_size=512: must be a multiple of parallel.tensor=3",
         "the embedding's rows=520: must be a multiple of parallel.tensor=3"],
    ),
    "vision heads": (
        8, ["parallel.tensor=8", "parallel.vision_tensor=true", "model.text.num_kv_heads=8"],
        ["model.vision.num_heads=4: must be a multiple of parallel.tensor=8"],
    ),
    "stages": (
        3, ["parallel.pipeline=3"],
        ["model.text.num_layers=8: must be a multiple of parallel.pipeline=3 x parallel.virtual=1"],
    ),
    "virtual stages": (
        2, ["parallel.pipeline=2", "parallel.virtual=3"],
        ["model.text.num_layers=8: must be a multiple of parallel.pipeline=2 x parallel.virtual=3"],
    ),
    "virtual stages of one": (
        1, ["parallel.virtual=2"], ["parallel.virtual=2: needs parallel.pipeline of 2 or more"],
    ),
    "ranks": (
        3, ["parallel=tp2"],
        ["parallel.tensor=2 x parallel.pipeline=1: a replica takes 2 ranks, and the job has 3: "
         "start a multiple of 2"],
    ),
    "checkpoints are elsewhere": (
        1, ["run.dir=TMP/linked"],
        ["run.dir=TMP/linked: TMP/linked/checkpoints leads to /scratch/gone, which is not there: "
         "make it, or give another one"],
    ),
    "checkpoints are a file": (
        1, ["run.dir=TMP/filed"],
        ["run.dir=TMP/filed: TMP/filed/checkpoints is not a folder: give another one"],
    ),
    "paths of empty variables": (
        1, ["run.dir=${oc.env:NOTHING}", "init_from=${oc.env:NOTHING}"],
        ["init_from=: is empty (an empty variable?): give a path",
         "run.dir=: is empty (an empty variable?): give a path"],
    ),
    "batch": (
        4, ["data.global_batch=6", "data.micro_batch=2"],
        ["data.global_batch=6: must be a multiple of the 4 data-parallel replicas"],
    ),
    "batch of virtual stages": (
        4, ["parallel=pp2_vp2", "data.global_batch=2"],
        ["data.global_batch=2: gives 1 samples a replica, which with parallel.virtual=2 must be at "
         "least parallel.pipeline=2: a microbatch for each stage"],
    ),
    "sequence parallel alone": (
        1, ["parallel.sequence=true"],
        ["parallel.sequence=True: needs parallel.tensor of 2 or more"],
    ),
    "padding": (
        2, ["parallel=tp2_sp", "data.pad_multiple=5"],
        ["data.pad_multiple=5: must be a multiple of parallel.tensor=2"],
    ),
    "a name that is too long": (
        1, [f"init_from=TMP/{'a' * 300}"],
        [f"init_from=TMP/{'a' * 300}: TMP/{'a' * 300}/checkpoints: File name too long"],
    ),
    "a folder behind two fields": (
        1, [f"data.root=TMP/{'a' * 256}"],
        [f"data.tokenizer=TMP/{'a' * 256}/tokenizer: TMP/{'a' * 256}/tokenizer: "
         "File name too long"],
    ),
    "stage": (
        1, ["stage=pt9"], ["stage=pt9: choose one of pt1, pt2, realtime_sft, sft"],
    ),
    "model": (
        1, ["model=12b"], ["model=12b: choose one of 11b, 90b, tiny, toy"],
    ),
    "unknown field": (
        1, ["trainer.step=5"], ["trainer.step: is not a field: did you mean trainer.steps?"],
    ),
    "unknown new field": (
        1, ["+trainer.step=5"], ["trainer.step: is not a field: did you mean trainer.steps?"],
    ),
    "renamed field": (
        1, ["model.blind_rows=zero"],
        ["model.blind_rows: is called model.tokens_before_first_frame now: use that name"],
    ),
    "renamed new field": (
        1, ["+model.blind_rows=zero"],
        ["model.blind_rows: is called model.tokens_before_first_frame now: use that name"],
    ),
    "unknown group": (
        1, ["optimiser=adamw"], ["optimiser: is not a field: did you mean optimizer?"],
    ),
    "type": (
        1, ["trainer.steps=many"],
        ["trainer.steps=many: must be a whole number or null"],
    ),
    "type of a mixture": (
        1, ["stage.mixture.image=lots"],
        ["stage.mixture.image=lots: must be a number"],
    ),
    "modality": (
        1, ["stage.mixture={sound: 3}"],
        ["stage.mixture.sound: is not a field: choose one of text, image, video"],
    ),
    "unset": (
        1, ["data=shards", "stage.mixture={text: 1, image: 0, video: 0}"],
        ["data.tokenizer is not set: give it a value, data.tokenizer=..."],
    ),
    "no source": (
        1, ["data.sources=[]", "stage.mixture={text: 0, image: 79, video: 21}"],
        ["stage.mixture.image=79: no data.sources has modality image: add one, or set the share to "
         "0",
         "stage.mixture.video=21: no data.sources has modality video: add one, or set the share to "
         "0"],
    ),
    "no shards": (
        1, ["data.root=TMP", "stage.mixture={text: 0, image: 1, video: 0}",
            "data.tokenizer=TOY/tokenizer"],
        ["data.sources[toy-image].path=TMP/pt1/train/image: TMP/pt1/train/image does not exist: "
         "build the shards or correct the path"],
    ),
    "tokenizer": (
        1, ["data.tokenizer=TMP"],
        ["data.tokenizer=TMP: tokenizer: TMP/tokenizer.json does not exist: give a folder with a "
         "tokenizer.json"],
    ),
    "vocabulary": (
        1, ["model=tiny"],
        ["data.tokenizer=TOY/tokenizer: has 513 tokens, the embedding has 328 rows "
         "(model.text.vocab_size + extra_embedding_rows)"],
    ),
    "nothing positive": (
        1, ["data.global_batch=0", "trainer.steps=-1", "trainer.keep_last=0", "optimizer.lr=0",
            "data.workers=-1"],
        ["data.global_batch=0: must be greater than 0",
         "data.workers=-1: must be 0 (no worker processes) or more",
         "optimizer.lr=0.0: must be greater than 0",
         "trainer.steps=-1: must be greater than 0",
         "trainer.keep_last=0: must be greater than 0"],
    ),
    "shares": (
        1, ["stage.warmup_ratio=2", "data.max_bad_ratio=-0.5", "stage.swap_probability=1.5"],
        ["stage.warmup_ratio=2.0: must be between 0 and 1",
         "stage.swap_probability=1.5: must be between 0 and 1",
         "data.max_bad_ratio=-0.5: must be between 0 and 1"],
    ),
    "choices": (
        1, ["model.attention=fast", "model.dtype=fp16", "parallel.recompute=some",
            "stage.schedule=step", "hardware.device=tpu", "model.projector.pool=sum"],
        ["stage.schedule=step: choose one of cosine, linear, wsd, constant",
         "model.projector.pool=sum: choose one of none, average, max, bilinear, channel_fusion",
         "model.attention=fast: choose one of auto, sdpa, flex, flash, te",
         "model.dtype=fp16: choose one of bf16, fp32",
         "parallel.recompute=some: choose one of none, selective, full",
         "hardware.device=tpu: choose one of auto, cuda, cpu, npu"],
    ),
    "attention without a mask": (
        1, ["model.attention=flash", "model.dtype=fp32", "model.vision.full_attention=false",
            "hardware.device=cpu"],
        ["model.attention=flash: runs on cuda, not on cpu: use auto or sdpa",
         "model.attention=flash: computes in bf16 or fp16, not in fp32: use auto or sdpa",
         "model.attention=flash: takes no mask, which model.vision.full_attention=false needs: use "
         "auto or sdpa"],
    ),
    "attention on a CPU": (
        1, ["model.attention=flex", "hardware.device=auto"],
        ["model.attention=flex: runs on cuda, not on cpu: use auto or sdpa"],
    ),
    "layer numbers": (
        1, ["model.text.cross_attention_layers=[1,8]", "model.vision.intermediate_layers=[4]"],
        ["model.text.cross_attention_layers=[8]: layers are numbered 0..7 "
         "(model.text.num_layers=8)",
         "model.vision.intermediate_layers=[4]: layers are numbered 0..3 "
         "(model.vision.num_layers=4)"],
    ),
    "tiles": (
        1, ["data.max_tiles=5"],
        ["data.max_tiles=5: the vision tower has embeddings for 4 tiles (model.vision.max_tiles)"],
    ),
    "frames": (
        1, ["stage.video_max_frames=2"],
        ["stage.video_max_frames=2: must be at least stage.video_min_frames=3"],
    ),
    "pool": (
        1, ["model.projector.stride=3"],
        ["the patch grid=4: must be a multiple of projector.stride=3"],
    ),
    "resume": (
        1, ["trainer.resume=TMP"],
        ["trainer.resume=TMP: no complete checkpoint there: give a run folder"],
    ),
    "init_from": (
        1, ["init_from=TMP"],
        ["init_from=TMP: no complete checkpoint there: give a run folder"],
    ),
    "multiplier": (
        1, ["optimizer.lr_multipliers={vision.*: 0}", "stage.warmup_steps=-1"],
        ["stage.warmup_steps=-1: must be 0 or more",
         "optimizer.lr_multipliers[vision.*]=0: must be a finite number greater than 0 "
         "(stage.train says what is frozen)"],
    ),
    "no numbers": (
        1, ["optimizer.lr=nan", "optimizer.clip_grad=-1", "stage.video_fps=inf",
            "stage.mixture.text=-5", "optimizer.lr_multipliers={vision.*: nan}"],
        ["stage.mixture.text=-5.0: must be 0 or more",
         "stage.video_fps=inf: must be a finite number, greater than 0",
         "optimizer.lr=nan: must be a finite number, greater than 0",
         "optimizer.clip_grad=-1.0: must be 0 (no clipping) or more",
         "optimizer.lr_multipliers[vision.*]=nan: must be a finite number greater than 0 "
         "(stage.train says what is frozen)"],
    ),
    "nought is not unset": (
        1, ["data.samples=0", "data.sequence_length=0", "hardware.threads=0"],
        ["data.samples=0: must be greater than 0",
         "data.sequence_length=0: must be greater than 1",
         "hardware.threads=0: must be greater than 0 and at most 4096"],
    ),
    "less than a step": (
        1, ["data.samples=3"], ["data.samples=3: must be at least data.global_batch=16: one step"],
    ),
    "sources": (
        1, ["data.sources=[{name: a, path: x, modality: vidoe}, {name: a, path: x, modality: text, "
            "weight: 0}, {name: org/chat, path: x, modality: text, weight: -1}]",
            "data.eval_sources=[{name: '', path: x, modality: sound}]"],
        ["data.sources[a].modality=vidoe: choose one of text, image, video",
         "data.sources[a].weight=0.0: must be greater than 0",
         "data.sources[org/chat].weight=-1.0: must be greater than 0",
         "data.eval_sources[].modality=sound: choose one of text, image, video",
         "data.sources[a].name=a: 2 of them have it: choose different names",
         "data.sources[org/chat].name=org/chat: must be a name without /, such as org-chat",
         "data.eval_sources[].name=: must be a name without /, such as my-data"],
    ),
    "suites": (
        1, ["trainer.eval_suites=[{name: a/b, path: x, samples: 0, scores: most}, "
            "{name: c, path: x, controls: [blind, deaf]}]"],
        ["trainer.eval_suites[a/b].samples=0: must be greater than 0",
         "trainer.eval_suites[a/b].scores=most: choose one of all, likelihood",
         "trainer.eval_suites[c].controls=['blind', 'deaf']: choose some of blind, one_frame, "
         "shuffled",
         "trainer.eval_suites[a/b].name=a/b: must be a name without /, such as a-b"],
    ),
    "suites that are not there": (
        1, ["trainer.eval_suites=[{name: a, path: nowhere}]"],
        ["trainer.eval_suites[a].path=nowhere: nowhere does not exist: build the shards or correct "
         "the path"],
    ),
    "no suites": (
        1, ["trainer.eval_suites_every=5"],
        ["trainer.eval_suites_every=5: trainer.eval_suites is empty"],
    ),
    "rotary positions": (
        1, ["model.text.hidden_size=136", "model.text.rope_scaling.high_freq_factor=1"],
        ["model.text.hidden_size=136: gives heads of 17 with num_heads=8: rotary positions want an "
         "even number",
         "model.text.rope_scaling.low_freq_factor=1.0: must be less than high_freq_factor=1.0"],
    ),
    "layers twice": (
        1, ["model.text.cross_attention_layers=[1,1,4]"],
        ["model.text.cross_attention_layers=[1]: name each layer once"],
    ),
    "no cuda": (
        1, ["hardware.device=cuda"],
        ["hardware.device=cuda: this machine has no CUDA: use cpu, or auto"],
    ),
    "who computes FlexAttention": (
        1, ["model.flex_backend=flash", "model.dtype=fp32"],
        ["model.flex_backend=flash: needs model.attention=flex (it is auto)",
         "model.flex_backend=flash: needs model.dtype=bf16 (it is fp32)",
         "model.flex_backend=flash: flash-attn-4 is not installed (pip install --pre "
         "flash-attn-4)"],
    ),
    "an adapter that there is not": (
        1, ["adapter.rank=8", "adapter.target=[decoder.layers.*.linear_qkv]"],
        ["adapter.rank=8: there is no adapter: give adapter=lora, too, or leave it at 16",
         "adapter.target=['decoder.layers.*.linear_qkv']: there is no adapter: give adapter=lora, "
         "too, or leave it at ['decoder.layers.*']"],
    ),
    "fields without a part": (
        1, ["loss.focal_gamma=3", "logger.wandb_mode=offline", "logger.project=mine"],
        ["loss.focal_gamma=3.0: has no part in loss=weighted: give loss=state_balanced, "
         "too, or leave it at 2.0",
         "logger.project=mine: wandb is off: give logger=wandb, too, or leave it at null",
         "logger.wandb_mode=offline: wandb is off: give logger=wandb, too, or leave it at null"],
    ),
    "variables of a shell": (
        1, ["run.dir=$SCRATCH/x", "init_from='runs/a '"],
        ["init_from='runs/a ': begins or ends with a blank: remove it",
         "run.dir=$SCRATCH/x: no shell has put the variable in: write ${oc.env:SCRATCH} for "
         "$SCRATCH"],
    ),
    "a field that is itself": (
        1, ["optimizer.lr=${optimizer.lr}"],
        ["optimizer.lr=${optimizer.lr}: refers to itself: give a value"],
    ),
    "a list in quotes": (
        1, ["stage.train='[vision.*]'"],
        ["stage.train=[vision.*]: must be a list in brackets, [..., ...]: no quotes may stand "
         "around it"],
    ),
    "wandb mode": (
        1, ["logger.wandb_mode=dryrun"],
        ["logger.wandb_mode=dryrun: choose one of online, offline, disabled"],
    ),
    "patterns": (
        1, ["stage.train=[adapter.*]"],
        ["stage.train=['adapter.*']: matches no parameter of the model"],
    ),
    "more patterns": (
        1, ["stage.also=[visoin.*]"],
        ["stage.also=['visoin.*']: matches no parameter of the model"],
    ),
}  # fmt: skip
# Refused by what the model has, so after the process group has started.
LATE = ("patterns", "more patterns")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    for name in ("linked", "filed"):
        (folder / name).mkdir()
    (folder / "linked" / "checkpoints").symlink_to("/scratch/gone")
    (folder / "filed" / "checkpoints").touch()
    return folder


@pytest.fixture(scope="module")
def answers(toy, folder) -> dict[str, dict]:
    """All cases in one process."""
    cases = []
    for ranks, overrides, _ in CASES.values():
        filled = [o.replace("TMP", str(folder)).replace("TOY", str(toy)) for o in overrides]
        base = [f"run.dir={folder / 'run'}", "hardware=cpu", f"data.root={toy}"]
        cases.append((ranks, [*base, *filled]))
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run(
        [sys.executable, "tests/workers/refuse.py", str(folder / "cases.json")],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), OUT: str(folder), "NOTHING": ""},
        check=True,
        timeout=300,
    )
    found = json.loads((folder / "answers.rank0.json").read_text())
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_everything_wrong_gets_a_line(answers, toy, folder, name):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    answer = answers[name]
    expected = [
        line.replace("TMP", str(folder)).replace("TOY", str(toy)) for line in CASES[name][2]
    ]
    said = [line.removeprefix("moss-train: error: ") for line in answer["said"].splitlines()]
    assert said == expected
    assert answer["code"] == 2
    assert answer["began"] == (name in LATE)
    assert answer["left"] == []


def test_a_folder_with_a_dollar_in_its_name_is_taken(tmp_path):
    config = Config()
    config.run.dir = str(tmp_path / "a$b")
    (line,) = _paths(config)
    assert line.endswith("write ${oc.env:b} for $b")
    (tmp_path / "a$b").mkdir()
    assert not [*_paths(config)]


def test_only_rank_0_prints_what_is_wrong(folder, toy):
    overrides = ["hardware=cpu", f"data.root={toy}", "data.global_batch=5", "stage=sft"]
    out = folder / "ranks"
    options = [*overrides, f"run.dir={out}/run"]
    result = run_ranks(ENTRY, 2, *options, out=out, check=False, preloaded=False)
    assert result.returncode == 1
    said = result.stderr(0).splitlines()
    assert len(said) == 1
    assert "data.global_batch=5: must be a multiple of the 2 data-parallel" in said[0]
    assert result.stderr(1) == ""
    assert "exitcode  : 2" in result.launcher()
    assert not (out / "run").exists()
