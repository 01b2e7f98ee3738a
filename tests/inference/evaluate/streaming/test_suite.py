"""A model that watches for real: what it says is what it says elsewhere, and is asked once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import inference
from data_pipeline.commands import DONE, FAILED
from data_pipeline.video import frames_at
from inference.engine.load import load_engine
from inference.evaluate.results import BenchmarkError, Results
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.items import Emission, Item, TimedPrompt
from inference.evaluate.streaming.jobs import Speakers
from inference.evaluate.streaming.protocols import watch
from inference.evaluate.streaming.remote import RemoteSpeaker, check_server
from inference.evaluate.streaming.selection import select
from inference.evaluate.streaming.speaker import (
    ModelSpeaker,
    Speaker,
    SpeakerFailed,
    SpeakingConfig,
)
from inference.evaluate.streaming.suite import evaluate
from inference.evaluate.streaming.toy import write_toy_events
from inference.serve.limits import Limits
from inference.session.handle import SessionClosed
from tests.inference.evaluate.streaming.policies import exact_judge
from tests.inference.evaluate.streaming.published import write_ovobench
from tests.inference.serve.serving import serving
from tests.inference.tiny import save_tiny
from tests.torchrun import REPO
from tests.waiting import until
from tools.evaluate.streaming import main

SPEAKING = SpeakingConfig(silence_bias=3.0, pace=4, max_new_tokens=9)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[inference.Model]:
    with inference.load(tiny, device="cpu", max_sessions=2, max_tokens=512, window=16) as opened:
        yield opened


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ovobench(tmp_path_factory.mktemp("ovobench"))


def run(
    questions: Path, out: Path, speakers: Speakers, **options: Any
) -> tuple[Results, StreamingConfig]:
    options = {"tasks": ("EPM", "CRR"), "limit": 1, "speaking": SPEAKING, "sessions": 2, **options}
    config = StreamingConfig(benchmarks=(f"ovobench={questions}",), **options)
    return evaluate(select(config), speakers, exact_judge, "tiny", out, config), config


def said(out: Path, protocol: str) -> dict[str, dict[str, Any]]:
    lines = (out / "said" / f"ovobench {protocol}.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def test_the_driver_hears_what_a_watched_video_says(
    model: inference.Model, questions: Path, tmp_path: Path
) -> None:
    results, config = run(questions, tmp_path, lambda bias: ModelSpeaker(model, SPEAKING))
    assert results.exit_code == DONE
    video = questions.parent / "COIN" / "a.mp4"
    sampling = inference.Sampling(silence_bias=3.0)
    (selection,) = select(config)
    heard = 0
    for item in selection.items:
        (ask,) = item.prompts
        # Asked between two frames; what is said to that is no earlier than the question.
        between = {ask.second - 0.5: ask.text} if ask.second else {0.0: ask.text}
        events = model.watch(video, ask=between, sampling=sampling, pace=4, max_new_tokens=9)
        told: list[tuple[float, str]] = []
        earliest = 0.0
        for event in events:
            if event.type == "conversation.item.created":
                earliest = ask.second
            elif event.type == "response.created":
                told.append((max(event.t_media, earliest), ""))
            elif event.type == "response.output_text.delta":
                told[-1] = (told[-1][0], told[-1][1] + event.data["delta"])
        record = said(tmp_path, "push")[item.id]
        # The item ends earlier than the video, and its last response is then said to its end.
        ours = [(e["second"], e["text"]) for e in record["said"]]
        assert ours[:-1] == [one for one in told if one[1].strip()][: len(ours) - 1]
        heard += len(ours)
        assert all("".join(text for _, text in e["pieces"]) == e["text"] for e in record["said"])
        assert [e["turn"] for e in record["said"]] == [int(s >= ask.second) for s, _ in ours]
    assert heard > 3
    reply = said(tmp_path, "official")["0"]["replies"][0]
    frames = frames_at(video.read_bytes(), [float(second) for second in range(7)])
    assert reply["answer"] == model.chat(reply["question"], video=list(frames), max_new_tokens=9)


def test_a_server_says_what_the_export_says_and_its_death_is_no_wrong_answer(
    model: inference.Model,
    tiny: Path,
    questions: Path,
    tmp_path: Path,
) -> None:
    def asked(name: str, speakers: Speakers) -> Results:
        return run(questions, tmp_path / name, speakers)[0]

    here = asked("here", lambda bias: ModelSpeaker(model, SPEAKING))
    engine = load_engine(tiny, device="cpu", max_sessions=2, max_tokens=512, window=16)
    with serving(engine, Limits(fps=1000.0)) as server:
        address = server.http
        check_server(address)
        there = asked("there", lambda bias: RemoteSpeaker(address, SPEAKING))
        # As one that was started anew with another export at the same address.
        other = asked("other", lambda bias: RemoteSpeaker(address, SPEAKING, "", "1b9c"))
    assert other.exit_code == FAILED
    assert all((row.count, row.missing) == (0, row.of) for row in other.rows)
    assert there.rows == here.rows
    for protocol in ("push", "official"):
        assert said(tmp_path / "there", protocol) == said(tmp_path / "here", protocol)
    replies = [one for record in said(tmp_path / "there", "official").values()
               for one in record["replies"]]  # fmt: skip
    assert len({reply["answer"] for reply in replies}) > 1
    with pytest.raises(BenchmarkError, match="no server of ours answers there"):
        check_server(address)
    gone = asked("gone", lambda bias: RemoteSpeaker(address, SPEAKING))
    assert gone.exit_code == FAILED
    assert all((row.count, row.missing) == (0, row.of) for row in gone.rows)


def test_a_question_waits_for_what_a_slow_server_says_to_the_one_before(
    tiny: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randint(256, (4, 3, 56, 56), dtype=torch.uint8, generator=generator)
    item = Item("talk", "row", tmp_path, ())

    def talk(speaker: Speaker) -> list[Emission]:
        with speaker.watch(item) as watching:
            watching.frame(0.0, pictures[0], "What is it?")
            watching.ask(0.3, "And what else?")
            watching.ask(0.6, "Is that all?")
            early = watching.emissions()
            for number in (1, 2, 3):
                watching.frame(float(number), pictures[number])
            watching.ask(4.0, "And now?")
            return [*early, *watching.end()]

    with inference.load(tiny, device="cpu", max_sessions=1, max_tokens=512, window=16) as opened:
        here = talk(ModelSpeaker(opened, SPEAKING))
    engine = load_engine(tiny, device="cpu", max_sessions=1, max_tokens=512, window=16)
    step = engine.step

    def slowly(steps: Any) -> Any:
        time.sleep(0.05)  # what is said comes later than that a frame or question was taken in
        return step(steps)

    engine.step = slowly  # type: ignore[method-assign]
    with serving(engine, Limits(fps=1000.0)) as server:
        assert talk(RemoteSpeaker(server.http, SPEAKING)) == here
    assert len({e.turn for e in here}) > 2
    assert any(e.cut for e in here)


def test_what_was_said_is_not_asked_again_after_a_failure(
    model: inference.Model, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Failing(ModelSpeaker):
        def answer(self, item: Any, question: str, frames: Any, at: float) -> str:
            asked.append(f"{item.id}@{at:g}")
            if self._model is doomed and len(asked) == 3:
                self._model.runner.close("the power is gone")
            return super().answer(item, question, frames, at)

    with inference.load(model.name, device="cpu", max_sessions=1, max_tokens=512) as doomed:
        results, _ = run(
            questions,
            tmp_path,
            lambda bias: Failing(doomed, SPEAKING),
            protocol="official",
            sessions=1,
        )
    assert asked == ["0@7", "102@5", "102@9"]
    assert results.exit_code == FAILED
    assert "stopped: the power is gone" in capsys.readouterr().err
    assert {row.row: (row.count, row.of) for row in results.rows}["ovobench EPM"] == (1, 1)
    assert {row.row: row.missing for row in results.rows}["ovobench CRR"] == 4  # of one item
    asked.clear()
    results, _ = run(
        questions, tmp_path, lambda bias: Failing(model, SPEAKING), protocol="official", limit=None
    )
    assert results.exit_code == DONE
    assert sorted(asked) == ["102@13", "102@20", "102@5", "102@9", "1@9"]


def test_a_killed_command_goes_on_with_the_same_items(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy = write_toy_events(tmp_path / "toy", 3)
    command = [
        "--suite", "streaming", "--checkpoint", str(tiny), "--out", str(out), "--device", "cpu",
        "--benchmark", f"events={toy}", "--biases", "3", "100", "--pace", "4",
        "--max-new-tokens", "9", "--silence-bias", "3",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.evaluate", *command], cwd=REPO, stderr=subprocess.DEVNULL
    )
    first = out / "said" / "events push.jsonl"
    until(lambda: process.poll() is not None or (first.is_file() and b"\n" in first.read_bytes()))
    process.kill()
    process.wait()
    kept = first.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert main(command) == DONE
    assert first.read_bytes().startswith(kept)
    results = json.loads((out / "results.json").read_text())
    rows = {row["row"]: row for row in results["rows"]}
    events = rows["events"]["count"]
    assert events == sum(len(entry["events"]) for entry in json.loads(toy.read_text()))
    assert rows["events, bias 100"]["settings"]["words a minute"] == 0
    assert rows["events, bias 3"]["settings"]["words a minute"] > 0
    # What is asked again, with the bias of the first round, gets the same answers.
    again = (out / "said" / "events push bias 3.jsonl").read_text().splitlines()
    assert sorted(again) == sorted(first.read_text().splitlines())
    assert "<svg" in (out / "curve.svg").read_text()


def test_a_question_that_does_not_fit_is_no_unreadable_video(
    model: inference.Model, questions: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "export", moss_stage="sft")
    with inference.load(folder, device="cpu", max_sessions=2, max_tokens=512, window=2) as opened:
        results, _ = run(
            questions, tmp_path, lambda bias: ModelSpeaker(opened, SPEAKING), protocol="official"
        )
    records = said(tmp_path, "official").values()
    assert [("window=2 at once" in record["failed"]) for record in records] == [True, True]
    assert not any(row.skipped for row in results.rows)
    video = questions.parent / "COIN" / "a.mp4"
    item = Item("long", "row", video, (TimedPrompt(1.0, "why " * 300),))
    with pytest.raises(SpeakerFailed, match="tokens: at most 256 are taken"):
        watch(ModelSpeaker(model, SPEAKING), item, 1.0)


def test_more_questions_than_may_wait_fail_alone(
    model: inference.Model, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the wall clock they do not wait for the model, which here takes no step before the end."""
    engine, runner = model.runner.engine, model.runner
    step = engine.step

    def held(steps: Any) -> Any:
        until(lambda: any(running.closing for running in runner._running))
        return step(steps)

    monkeypatch.setattr(engine, "step", held)
    talk = SpeakingConfig(clock="wall", fps=5.0)
    asks = tuple(TimedPrompt(0.1, f"what {number}") for number in range(20))
    item = Item("many", "row", questions.parent / "COIN" / "a.mp4", asks)
    with pytest.raises(SpeakerFailed, match="16 prompts wait") as failed:
        watch(ModelSpeaker(model, talk), item, 5.0)
    assert not failed.value.fatal


def test_on_the_wall_clock_a_second_takes_a_second(
    model: inference.Model, questions: Path, tmp_path: Path
) -> None:
    talk = SpeakingConfig(clock="wall", fps=5.0, silence_bias=-100.0, pace=4, max_new_tokens=9)
    options = {"tasks": ("EPM",), "protocol": "push", "context": 1.0, "patience": 0.4}
    began = time.monotonic()
    run(questions, tmp_path, lambda bias: ModelSpeaker(model, talk), speaking=talk, **options)
    spent = time.monotonic() - began
    (record,) = said(tmp_path, "push").values()
    assert record["seconds"] == pytest.approx(8 / 5)  # 6.0 to 7.4
    assert spent >= 1.4
    seconds = [e["second"] for e in record["said"]]
    assert seconds == sorted(seconds) != []
    assert 6.0 <= seconds[0] <= record["said"][-1]["end"] <= 6.0 + spent
    assert all(e["second"] % 0.2 for e in record["said"])  # not those of the frames


def test_the_time_of_day_may_be_set_and_a_servers_may_be_another_one(
    model: inference.Model, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that some of it is text, between whichever of its tokens the frames come.
    talk = SpeakingConfig(clock="wall", fps=2.0, silence_bias=-100.0, max_new_tokens=24)
    item, black = Item("talk", "row", tmp_path, ()), torch.zeros(3, 56, 56, dtype=torch.uint8)

    def watch(speaker: Speaker) -> tuple[float, list[Emission]]:
        began = time.monotonic()
        with speaker.watch(item) as watching:
            watching.frame(0.0, black)
            with monkeypatch.context() as patched:
                patched.setattr(time, "time", lambda now=time.time: now() + 3600)
                watching.frame(0.5, black)
            heard = watching.end()
            return time.monotonic() - began, heard

    spent, _ = watch(ModelSpeaker(model, talk))
    assert spent >= 0.5
    late = SimpleNamespace(time=lambda: time.time() - 3600, monotonic=time.monotonic)
    monkeypatch.setattr("inference.session.events.time", late)
    engine = load_engine(tiny, device="cpu", max_sessions=1, max_tokens=512, window=16)
    with serving(engine, Limits(fps=1000.0)) as server:
        spent, heard = watch(RemoteSpeaker(server.http, talk))
    assert heard
    assert all(0 <= emission.second <= spent for emission in heard)


def test_a_broken_session_is_said_and_not_an_answer(model: inference.Model) -> None:
    with model.session(live=False, clock="media") as session:
        session.close("gone")
        with pytest.raises(SessionClosed, match="gone"):
            session.prompt("Who?")
        session.settle()  # does not wait for ever


def test_settling_waits_for_all_that_is_due(model: inference.Model) -> None:
    import numpy as np

    picture = np.zeros((8, 8, 3), np.uint8)
    talk = inference.Sampling(silence_bias=-100.0)
    with model.session(
        live=False, clock="media", pace=5, max_new_tokens=100, sampling=talk
    ) as session:
        for second in range(3):
            session.put_frame(picture, float(second))
            session.settle()
            assert session.stats()["frames"] == second + 1
            assert session.stats()["tokens"] == 5 * (second + 1)
