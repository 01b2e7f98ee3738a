"""What is cut, skipped and masked is counted over all ranks and resumes, shown, and warned of."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.batch import IGNORED_LABEL
from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.schema import SampleError
from data_pipeline.shards import read_samples
from data_pipeline.tokens import load_tokenizer
from moss_train.log import log
from moss_train.train.metrics import read_metrics
from moss_train.train.unlearned import Totals, UnlearnedWarnings
from tests.moss_train.train.runs import audit
from tests.pages import open_page

LENGTH = 22
COUNTED = ("truncated_samples", "truncated_labels", "labels", "turns", "masked_turns")


def by_hand(toy: Path) -> dict[str, Counter[str]]:
    """What a cut at LENGTH tokens does to each training sample: labels of the whole one, counted
    here; {} for one without a label before the cut."""
    config = EncodeConfig(str(toy / "tokenizer"), 10_000, 56, 1, 1.0, 1, 4, "pretrain")
    encoder = SampleEncoder(config, load_tokenizer(config.tokenizer))
    found = {}
    for key, parts in read_samples(toy / "pt2/train/text"):
        labels = encoder.encode(f"toy-text/{key}", parts).labels.tolist()
        kept = sum(label != IGNORED_LABEL for label in labels[:LENGTH])
        lost = sum(label != IGNORED_LABEL for label in labels[LENGTH:])
        cut = int(len(labels) > LENGTH)
        counts = {"truncated_samples": cut, "truncated_labels": lost, "labels": kept, "turns": 1}
        found[f"toy-text/{key}"] = Counter(counts) if kept else Counter()
    return found


def test_cut_samples_are_counted_over_ranks_and_resumes(small, toy, run_jobs, tmp_path):
    held = f"data.eval_sources=[{{name: seen, path: {toy}/pt2/train/text, modality: text}}]"
    options = [
        *small, "parallel=dp2", "data.workers=1", f"data.sequence_length={LENGTH}", held,
        "data.max_bad_ratio=1", "data.eval_samples=20", "trainer.eval_every=4",
        "stage.mixture={text: 1, image: 0, video: 0}",
    ]  # fmt: skip

    def task(name: str, run: str, steps: int) -> dict:
        overrides = [*options, f"trainer.steps={steps}", f"run.dir={tmp_path / run}"]
        return {"name": name, "overrides": overrides, "page": name == "whole"}

    done = run_jobs(
        2, task("whole", "whole", 6), task("begun", "parts", 3), task("resumed", "parts", 6)
    )
    assert [done.load(name)["error"] for name in ("whole", "begun", "resumed")] == [None] * 3

    expected = by_hand(toy)
    assert any(counts["truncated_labels"] for counts in expected.values())
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for row, other in zip(whole, parts, strict=True):
        keys = audit(tmp_path / "whole")[row["step"]]
        sums = sum((expected[key] for key in keys), Counter[str]())
        assert {name: row[name] for name in COUNTED} == {name: sums[name] for name in COUNTED}
        assert row["samples"] == len(keys) == 4
        for name in (*COUNTED, "skipped_samples", "skipped_reasons"):
            assert other[name] == row[name]

    skipped = sum((Counter(row["skipped_reasons"]) for row in whole), Counter[str]())
    assert skipped == {"cut_before_answer": sum(row["skipped_samples"] for row in whole)}
    assert skipped.total() > 0
    measured = whole[3]["validation"]
    first = list(expected.values())[:20]
    assert measured["truncated_labels"] == sum(counts["truncated_labels"] for counts in first)
    assert measured["samples"] == sum(bool(counts) for counts in first)
    assert measured["skipped_reasons"] == {"cut_before_answer": 20 - measured["samples"]}

    cut = sum(row["truncated_samples"] for row in whole)
    page = open_page(tmp_path / "whole/report.html")
    assert page.row("samples cut") == [str(cut), "24", f"{100 * cut / 24:.2f}"]
    assert f"{cut} of 24 ({cut / 24:.1%}) samples were longer than the sequence" in page.text
    said = done.stderr()
    assert "WARNING" in said
    assert "raise data.sequence_length" in said
    assert "validation: " in said


def row(step: int, **counts: object) -> dict:
    usual = {"samples": 40, "labels": 1000, "turns": 80, "truncated_samples": 0}
    return {"step": step, **usual, "truncated_labels": 0, "masked_turns": 0} | counts


def test_a_warning_comes_once_and_only_over_one_percent(caplog):
    watch = UnlearnedWarnings([row(1, truncated_samples=1)], steps=9)
    with caplog.at_level(logging.WARNING, log.name):
        watch.add(row(2, masked_turns=2))  # 80 samples: too few to say
        assert caplog.messages == []
        watch.add(row(3))  # 1 sample and 2 turns of 120 and 240: less than one percent
        assert caplog.messages == []
        watch.add(row(4, truncated_samples=1, truncated_labels=3, masked_turns=1))
        watch.add(row(5, truncated_samples=9, masked_turns=80, skipped_samples=5))
        watch.add(row(6, truncated_samples=9, masked_turns=80, skipped_samples=5))
    assert caplog.messages == [
        "2 of 160 (1.2%) samples were longer than the sequence length and cut, with 3 of 4,003 "
        "(0.1%) labels: raise data.sequence_length",
        "5 of 205 (2.4%) samples were skipped: unknown 5",
        "83 of 400 (20.8%) of the assistant's turns have no loss, as the data say (learn: false)",
    ]


def test_lines_of_earlier_versions_count_what_they_have():
    totals = Totals.of([{"step": 1, "samples": 8, "skipped_samples": 2, "loss": 1.0}])
    assert totals.shares()["samples skipped"] == (2, 10)
    assert totals.shares()["labels cut away"] == (0, 0)


def test_masked_turns_are_counted(toy):
    config = EncodeConfig(str(toy / "tokenizer"), 100, 56, 1, 1.0, 1, 4, "chat")
    encoder = SampleEncoder(config, load_tokenizer(config.tokenizer))
    turns = (
        '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "learn": false}, '
        '{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}'
    )
    sample = {"json": f'{{"kind": "chat", "messages": [{turns}]}}'.encode()}
    unlearned = encoder.encode("key", sample).unlearned
    assert (unlearned.turns, unlearned.masked_turns) == (2, 1)
    assert (unlearned.truncated_samples, unlearned.truncated_labels) == (0, 0)
    short = SampleEncoder(replace(config, sequence_length=3), load_tokenizer(config.tokenizer))
    with pytest.raises(SampleError, match=r"cut_before_answer.*after 3 tokens.*sequence_length"):
        short.encode("key", sample)


def test_a_gradient_that_stays_0_is_told(caplog):
    """Runs whose weights a rate had destroyed went on to their end, the loss always the same."""
    watch = UnlearnedWarnings([], steps=99)
    norms = [0.0] * 9 + [1.0] + [0.0] * 12 + [None] * 12 + [0.0] * 12
    with caplog.at_level(logging.WARNING, log.name):
        for step, norm in enumerate(norms, 1):
            watch.add(row(step, grad_norm=norm))
    (line,) = caplog.messages
    assert line.startswith("step 20: the gradient has been 0 for 10 steps: nothing is learned: ")
