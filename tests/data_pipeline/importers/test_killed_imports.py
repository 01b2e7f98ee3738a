"""Imports that are killed with -9 lose nothing and double nothing when they are started again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.build import BuildOptions, build_shards, main
from data_pipeline.shards import ShardError
from tests.data_pipeline.importers.jobs import (
    blocked,
    command,
    contents,
    has_ended,
    has_shards,
    make_records,
)
from tests.samples import imported
from tests.torchrun import REPO
from tests.waiting import running, until


def import_and_kill(source: Path, out: Path, shards: int, *options: object) -> None:
    """An import that is killed once it has as many shards."""
    words = command(source, out, *options)
    with running(words, cwd=REPO, start_new_session=True, stderr=subprocess.DEVNULL) as job:
        until(partial(has_shards, out, shards))
    until(partial(has_ended, job.pid))


def test_a_killed_import_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_records(tmp_path / "in", 1200)
    options = ["--samples-per-shard", 50, "--workers", 2]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([str(source), str(whole), *map(str, options)]) == 0

    finished: dict[Path, int] = {}
    for number, wanted in ((400, 5), (800, 11)):
        with blocked(source.parent / f"own{number}.png"):
            import_and_kill(source, out, wanted, *options)
        for shard, when in finished.items():
            assert shard.stat().st_mtime_ns == when, f"{shard.name} was made twice"
        # Behind the last end of a line is nothing, or what the kill has cut off.
        whole_lines = (out / "shards.jsonl").read_text().split("\n")[:-1]
        known = [json.loads(line) for line in whole_lines]
        paths = [out / line["group"] / line["shard"] for line in known]
        finished = {path: path.stat().st_mtime_ns for path in paths}
        assert wanted - 1 <= len(finished) < 20  # the last may have a name and no line yet
    capsys.readouterr()
    assert main([str(source), str(out), *map(str, options)]) == 0
    said = capsys.readouterr().out
    assert contents(out) == contents(whole) | {"shards.jsonl": contents(out)["shards.jsonl"]}
    assert "1200 records: 1120 imported, 80 rejected" in said
    for shard, when in finished.items():
        assert shard.stat().st_mtime_ns == when
    assert main([str(source), str(out), *map(str, options)]) == 0
    again = capsys.readouterr()
    assert "finished already" in again.err
    assert again.out == said


def test_a_kill_between_the_windows_of_a_record_loses_none_and_doubles_none(folder: Path) -> None:
    """Each record is a commentary of 9 s in windows of 2 s, each shard ends within one."""
    lines = []
    for number in range(8):
        clip = f"own{number}.mp4" if number in (3, 6) else "a.mp4"
        shutil.copyfile(folder / "a.mp4", folder / clip) if clip != "a.mp4" else None
        words = [
            {"start": second, "end": second + 0.5, "text": f"r{number}s{second}"}
            for second in range(9)
        ]
        lines.append(json.dumps({"video": clip, "words": words if number != 1 else ["?"]}))
    source = folder / "words.jsonl"
    source.write_text("".join(f"{line}\n" for line in lines))
    options = ["--window", 2, "--samples-per-shard", 2, "--form", "speech"]
    whole, out = folder.parent / "whole", folder.parent / "out"
    assert main([str(source), str(whole), *map(str, options), "--workers", "0"]) == 0
    for number, wanted in ((3, 2), (6, 5)):
        with blocked(folder / f"own{number}.mp4"):
            import_and_kill(source, out, wanted, *options, "--workers", 1)
    assert main([str(source), str(out), *map(str, options), "--workers", "0"]) == 0
    assert contents(out) == contents(whole)
    samples = imported(out)
    windows = {key.rpartition("-")[0] for key in samples if key.count("-") > 1}
    assert len(windows) == 7
    told = [
        word
        for sample in samples.values()
        for message in sample["messages"]
        if message["role"] == "assistant"
        for word in re.findall(r"r\ds\d", message["content"])
    ]
    assert sorted(told) == [
        f"r{number}s{s}" for number in range(8) if number != 1 for s in range(9)
    ]


def test_a_finished_shard_that_is_gone_is_missed(tmp_path: Path) -> None:
    """What goes on from it would count its records as imported, and not have them."""
    source = make_records(tmp_path / "in", 600)
    options = ["--samples-per-shard", "50", "--workers", "0"]
    out = tmp_path / "out"
    with blocked(source.parent / "own400.png"):
        import_and_kill(source, out, 5, *options)
    known = [json.loads(line) for line in (out / "shards.jsonl").read_text().splitlines()]
    first = out / known[0]["group"] / known[0]["shard"]
    aside = first.rename(tmp_path / "aside")
    with pytest.raises(ShardError, match=f"{first} is gone, .*: bring it back"):
        build_shards(source, out, BuildOptions(samples_per_shard=50))
    aside.rename(first)
    summary = build_shards(source, out, BuildOptions(samples_per_shard=50))
    assert summary.imported.total() == len(imported(out)) == 560
