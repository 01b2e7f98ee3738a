"""`moss-data synthesize` against a real server whose model knows the toy world, and errs.

Its errors are drawn from the requests, so the figures are the same in every run.
`python -m tools.bench.synthesis` takes many more clips.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build_shards
from data_pipeline.schema import parse_sample
from data_pipeline.shards import check_source, read_samples
from data_pipeline.synthesis.config import ROLES
from data_pipeline.toy.world import Story
from tools.bench.endpoint import ToyEndpoint
from tools.bench.synthesis import (
    arguments,
    judge,
    outcomes,
    render,
    stories,
    synthesize,
    teacher,
)
from tools.bench.teacher import Teacher, of_story, spoken
from tools.data.__main__ import main
from tools.preloaded import Command

CLIPS, FEW, SEED = 8, 2, 2


class Watching(Teacher):
    """One that notes what it is shown: `now` and the number of frames."""

    looks: list[tuple[int, int]]

    def reply(self, kind: str, data: dict[str, Any], shown: Any, vote: str) -> Any:
        if kind == "say":
            self.looks.append((data["now"], len(shown)))
        return super().reply(kind, data, shown, vote)


class Toy:
    """Clips, their stories, and servers of them."""

    def __init__(self, folder: Path) -> None:
        self.told: list[Story] = stories(CLIPS, SEED)
        self.videos, self.few = folder / "videos", folder / "few"
        render(self.videos, self.told)
        self.few.mkdir()
        for file in sorted(self.videos.iterdir())[:FEW]:
            shutil.copy2(file, self.few)
        self.pictures = teacher(self.videos, self.told, 0.0).pictures

    def server(
        self, wrong: float = 0.1, failing: float = 0.05, hang: float = 2.5, **more: Any
    ) -> ToyEndpoint:
        model = Watching(self.told, self.pictures, wrong, SEED)
        model.looks = []
        return ToyEndpoint(model, failing, hang, **more)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def made(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ToyEndpoint]:
    """What is made of all clips, and the server that it was made with."""
    out = tmp_path_factory.mktemp("made") / "out"
    with toy.server() as server:
        assert synthesize(toy.videos, out, server.url) == 0
        assert synthesize(toy.videos, out, "http://127.0.0.1:9/v1") == 0, "asked again"
    return out, server


def shards(out: Path) -> dict[str, bytes]:
    """The bytes of all that is made of replies."""
    files = [*(out / "shards").glob("*.tar"), out / "records.jsonl", out / "rejected.jsonl"]
    assert len(files) > 2
    return {file.name: file.read_bytes() for file in files}


def test_right_samples_are_kept_and_wrong_ones_are_not(
    toy: Toy, made: tuple[Path, ToyEndpoint]
) -> None:
    out, server = made
    judged = judge(outcomes(out), toy.told)
    assert judged.right >= 40
    assert judged.wrong >= 10
    assert judged.kept_share >= 0.95, judged.missed
    assert judged.wrong_share <= 0.01
    served = server.served
    assert {"500", "429", "cut"} <= set(served.failures), "the server did not fail"
    assert 0.02 < 1 - served.failures[""] / served.requests < 0.08


def test_the_model_that_checks_sees_no_later_frame(made: tuple[Path, ToyEndpoint]) -> None:
    model = made[1].teacher
    assert isinstance(model, Watching)
    assert len(model.looks) > 300
    assert all(frames == now + 1 for now, frames in model.looks)


class Credulous(Teacher):
    """One that writes wrong conversations alone, that no timeline makes doubt them, and that says
    what it has not said yet a second late."""

    def reply(self, kind: str, data: dict[str, Any], shown: Any, vote: str) -> Any:
        self._wrong = 1.0 if kind == "write" else 0.0
        reply = super().reply(kind, data, shown, vote)
        if kind == "say" and not reply["speak"] and data["now"]:
            before = data | {"now": data["now"] - 1}
            late = super().reply(kind, before, shown[:-1], vote)
            return reply if late["text"] in [said["text"] for said in data["said"]] else late
        return reply | {"right": True} if kind == "audit" else reply


def test_a_look_at_the_frames_alone_finds_wrong_answers_and_wrong_seconds(
    toy: Toy, tmp_path: Path
) -> None:
    """What it cannot find is an answer that is missing, where no second of silence is looked at."""
    model = Credulous(toy.told, toy.pictures, 0.0, SEED)
    with ToyEndpoint(model) as server:
        synthesize(toy.few, tmp_path / "out", server.url, "--lead", "1", "--silences", "20")
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert {"unseen", "known_before", "not_silent"} <= {json.loads(x)["reason"] for x in lines}
    assert judge(outcomes(tmp_path / "out"), toy.told).kept_wrong == 0


def test_samples_say_what_is_true_when_it_is_seen(toy: Toy, made: tuple[Path, ToyEndpoint]) -> None:
    roles = set()
    assert check_source(made[0] / "shards").samples >= 40
    for key, members in read_samples(made[0] / "shards"):
        data = json.loads(members["json"])
        sample, story = parse_sample(key, data), toy.told[int(key[:5])]
        assert members[sample.media[0].file] == (toy.videos / f"{key[:5]}.mp4").read_bytes()
        roles.add(data["task"])
        # The conversation again, turn by turn: seconds are counted by the frames.
        second, asked, said = -1, [], {}
        for message in sample.messages:
            if message.role == "user" and message.content:
                asked.append({"second": second + 1, "text": message.content})
            for piece in message.content.split("<|video|>")[1:]:
                second += 1
                said[second] = piece.replace("<|silence|>", "")
        facts = of_story(story)
        told = spoken(facts, asked, len(story.states))
        begun = {t for t, text in said.items() if text and not (said.get(t - 1) and t not in told)}
        assert begun == set(told), key
        assert second == len(story.states) - 1
        assert all(told[t].startswith(said[t].strip()) for t in told)
        assert bool(told) == (data["task"] != "never")
    assert roles == set(ROLES)


def test_records_are_the_same_samples_in_streamos_form(
    made: tuple[Path, ToyEndpoint], tmp_path: Path
) -> None:
    build_shards(made[0] / "records.jsonl", tmp_path / "again")
    # Their importer says 30 words a second, so texts are compared and not their distribution.
    ours, theirs = (
        [[turn["content"] for turn in json.loads(members["json"])["messages"]
          if turn["role"] == "user"] for _, members in read_samples(folder)]
        for folder in (made[0] / "shards", tmp_path / "again/realtime")
    )  # fmt: skip
    assert ours == theirs


def test_the_page_counts_by_reason_and_shows_examples(made: tuple[Path, ToyEndpoint]) -> None:
    page = (made[0] / "report.html").read_text()
    lines = (made[0] / "rejected.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons
    for reason in set(reasons):
        assert f">{reason}</td><td>{reasons.count(reason)}</td>" in page
        assert f"{reason}: " in page
    assert page.count("data:image/jpeg") > 50
    assert all(f">{role}</td>" in page for role in ROLES)


def test_a_killed_run_goes_on_to_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    with toy.server() as server:
        synthesize(toy.few, tmp_path / "whole", server.url)
        needed = server.served.requests
    half, over = threading.Event(), threading.Event()
    killed = tmp_path / "killed"

    def on_request(number: int) -> None:
        if number >= needed // 2:
            half.set()
            over.wait()  # the rest is not answered before the kill

    with toy.server(on_request=on_request) as server:
        command = Command("tools.data", arguments(toy.few, killed, server.url))
        try:
            assert half.wait(300)
        finally:
            os.kill(command.pid, signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL
            over.set()
        assert not (killed / "shards").exists()
        before, server.on_request = server.served.requests, lambda number: None
        assert synthesize(toy.few, killed, server.url) == 0
        assert server.served.requests - before < 0.7 * needed, "paid twice"
    assert shards(killed) == shards(tmp_path / "whole")


def test_the_budget_stops_it_and_what_is_done_is_kept(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clips are one after the other here, so that one is finished."""
    out, prices = tmp_path / "out", ["--price-in", "1", "--price-out", "1", "--concurrency", "1"]
    prices += ["--lead", "1", "--image-tokens", "20", "--max-tokens", "64"]
    with toy.server(wrong=0.0, failing=0.0) as server:

        def run(*budget: str) -> int:
            return synthesize(toy.few, out, server.url, *prices, *budget)

        assert run("--budget", "0.013") == 130
        assert "the budget is reached" in capsys.readouterr().err
        used = server.served.requests
        spent = cost(out)
        assert 0.011 < spent <= 0.013
        assert run("--budget", "0.013") == 130
        assert server.served.requests == used
        assert cost(out) == spent
        partial = len(list(read_samples(out / "shards")))
        assert run("--budget", "1") == 0
    assert 0 < partial < len(list(read_samples(out / "shards")))


def cost(out: Path) -> float:
    """At a price of 1 for 10^6 tokens, from the page."""
    page = (out / "report.html").read_text()
    words = page.split(" tokens of prompts, ")
    return (int(words[0].split(">")[-1]) + int(words[1].split()[0])) / 1e6


def test_an_estimate_sends_nothing_and_is_near(
    toy: Toy, made: tuple[Path, ToyEndpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    out, server = made
    options = ["--model", "toy", "--estimate", "--price-in", "2", "--image-tokens", "20"]
    assert main(["synthesize", str(toy.videos), str(out), *options]) == 0
    text = capsys.readouterr().out
    assert f"{CLIPS} videos" in text
    number = int(next(line for line in text.splitlines() if line.startswith("all")).split()[1])
    assert 0.5 < number / server.served.requests < 2


def test_wrong_options_are_refused_before_anything_is_sent(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("check: {lead: 0}\n")
    for more, error in (
        (["--config", str(tmp_path / "c.yaml")], "lead=0: must be greater than 0"),
        ([], "endpoint.model: is missing"),
        (["--model", "m", "--url", "host"], "endpoint.url=host: must be http"),
        (["--model", "m", "--prompts", str(tmp_path / "c.yaml")], "needs a task"),
    ):
        assert main(["synthesize", str(toy.few), str(tmp_path / "out"), *more]) == 2
        assert error in capsys.readouterr().err
    options = ["--model", "m", "--url", "http://127.0.0.1:9/v1", "--backoff", "0"]
    assert main(["synthesize", str(toy.few), str(tmp_path / "out"), *options]) == 1
    assert "start the server or correct the URL" in capsys.readouterr().err


def test_a_video_whose_name_is_not_utf8_is_done_once(toy: Toy, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    name = os.fsdecode(os.fsencode(videos) + b"/caf\xe9.mp4")
    shutil.copy2(min(toy.few.iterdir()), name)
    with toy.server() as server:
        assert synthesize(videos, out, server.url) == 0
    assert synthesize(videos, out, "http://127.0.0.1:9/v1") == 0, "asked again"
    lines = (out / "records.jsonl").read_text().splitlines()
    assert {json.loads(line)["video_path"] for line in lines} == {name}
    assert len(list(read_samples(out / "shards"))) == len(lines)
