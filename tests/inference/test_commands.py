"""The three commands, on a real video file: what they say, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from inference import feed, offline_infer, realtime_offline_infer, realtime_streaming_infer
from inference.sources import FileSource
from tests.inference.tiny import save_tiny
from tests.samples import graded_video
from tests.torchrun import run_ranks

SECONDS = 6
QUIET = "--silence_bias=4"
ASK, WATCH, STREAM = offline_infer, realtime_offline_infer, realtime_streaming_infer


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sft"), moss_stage="sft")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds, a frame every tenth of a second, brighter and brighter."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    graded_video(path, [i / 5 for i in range(SECONDS * 5)])
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(module: Any, *args: object) -> tuple[int, str, str]:
        try:
            code = module.main([str(arg) for arg in args])
        except SystemExit as stopped:
            code = stopped.code  # type: ignore[assignment]
        out, err = capsys.readouterr()
        return code, out, err

    return command


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def stream(tiny: Path, clip: Path | str, *more: object) -> list[object]:
    return ["--checkpoint", tiny, "--video_path", clip, "--device", "cpu", QUIET, *more]


def test_a_stream_is_watched_second_by_second(run: Run, tiny: Path, clip: Path) -> None:
    args = stream(tiny, clip, "--speed", 0, "--jsonl", "-", "--pace", 5, "--max_new_tokens", 9)
    code, out, _ = run(realtime_streaming_infer, *args, "--ask", "2:Who is it?")
    assert code == 0
    told = events(out)
    frames = [e for e in told if e["type"] == "input_frame.processed"]
    assert [e["frame_at"] for e in frames] == list(range(SECONDS))
    asked = next(e for e in told if e["type"] == "conversation.item.created")
    assert (asked["text"], asked["t_media"]) == ("Who is it?", 1.0)
    after = told[told.index(asked) + 1 :]
    frame = next(e for e in after if e["type"] == "input_frame.processed")
    assert frame["frame_at"] == 2.0
    # It has been decided on by then, as in training: it is no step together with the frame.
    assert {"session.state", "response.created"} & {e["type"] for e in after[: after.index(frame)]}
    between, other, _ = run(realtime_streaming_infer, *args, "--ask", "1.5:Who is it?")
    order = [e["type"] for e in events(other) if e["type"].startswith(("input_frame", "conv"))]
    assert (between, order.index("conversation.item.created")) == (0, 2)
    again, same, _ = run(realtime_streaming_infer, *args, "--ask", "2:Who is it?")
    texts = [
        [e["text"] for e in lines if e["type"] == "response.done"] for lines in (told, events(same))
    ]
    assert again == 0
    assert texts[0] == texts[1] != []


@pytest.mark.parametrize("speed", [0, 20])
def test_questions_of_one_second_are_asked_one_after_the_other_before_its_frame(
    run: Run, tiny: Path, clip: Path, speed: int
) -> None:
    args = stream(tiny, clip, "--speed", speed, "--jsonl", "-", "--max_new_tokens", 3)
    asks = [word for text in ("0:A", "0:B", "2:C", "2:D") for word in ("--ask", text)]
    code, out, _ = run(realtime_streaming_infer, *args, *asks)
    assert code == 0
    kinds = ("input_frame.processed", "conversation.item.created")
    told = [e.get("text", e.get("frame_at")) for e in events(out) if e["type"] in kinds]
    assert told == ["A", "B", 0.0, 1.0, "C", "D", 2.0, 3.0, 4.0, 5.0]


def test_a_seed_that_is_not_given_is_drawn_and_told(run: Run, sft: Path) -> None:
    def ask(*more: object) -> tuple[str, str]:
        args = ("--checkpoint", sft, "--device", "cpu", "--temperature", 2, "--max_new_tokens", 20)
        code, out, err = run(offline_infer, *args, "--prompt", "Tell me.", *more)
        assert code == 0
        return out, err

    (first, told), (second, _) = ask(), ask()
    assert first != second
    seed = next(line for line in told.splitlines() if "draws the same again" in line).split()[1]
    assert ask("--seed", seed)[0] == first


def test_the_view_shows_silence_and_responses_with_their_time(
    run: Run, tiny: Path, clip: Path, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    code, out, err = run(
        realtime_streaming_infer,
        *stream(tiny, clip, "--speed", 0, "--pace", 5, "--max_new_tokens", 9, "--jsonl", log),
        "--prompt", "Tell me.", "--ask", "3:Who is it?",
    )  # fmt: skip
    assert code == 0
    told = events(log.read_text())
    assert "00:02  > Who is it?" in out
    for event in told:
        if event["type"] == "response.created":
            assert f"{int(event['t_media']) // 60:02d}:{int(event['t_media']):02d}  " in out
    silent = [int(e["t_media"]) for e in told if e.get("decision") == "silence"]
    assert silent
    assert "·  lag" in out
    assert "tokens/s" in out
    assert f"{SECONDS} frames" in err
    assert "frame to decision" in err


class Paced:
    """A session, its log, and a clock that goes by what is waited for, and as frames are taken."""

    def __init__(self) -> None:
        self.now, self.came, self.log = 100.0, list[tuple[float, float]](), self

    def monotonic(self) -> float:
        return self.now

    def wait_closed(self, seconds: float) -> bool:
        self.now += max(0.0, seconds)
        return False

    def put_frame(self, picture: Any, second: float, prompt: str | None) -> None:
        self.came.append((second, self.now - 100.0))
        self.now += 0.03

    def emit(self, type: str, **data: Any) -> None:
        pass

    def end(self) -> None:
        pass


def test_frames_keep_the_pace_of_the_wall_clock(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty times as fast as the clock: six frames, the last after 5 / 20 s."""
    session: Any = Paced()
    monkeypatch.setattr(feed, "time", session)
    feed.Feeder(session, FileSource(str(clip)), feed.Schedule(1.0, 20.0, [])).run()
    assert [second for second, _ in session.came] == list(range(SECONDS))
    assert [at for _, at in session.came] == pytest.approx([n / 20 for n in range(SECONDS)])


def test_what_is_asked_after_the_end_is_asked_at_the_end(run: Run, tiny: Path, clip: Path) -> None:
    late = ["--ask", "2:45:00:Late?", "--ask", "5.5:And now?", "--ask", "99:Later?"]
    for speed in (0, 20):
        args = stream(tiny, clip, "--speed", speed, "--jsonl", "-", "--max_new_tokens", 3)
        code, out, err = run(realtime_streaming_infer, *args, *late)
        assert code == 0
        told = events(out)
        (ended,) = [e for e in told if e["type"] == "source.ended"]
        assert (ended["frame_at"], ended["questions"]) == (5.0, 3)
        asked = [e["text"] for e in told if e["type"] == "conversation.item.created"]
        assert asked == ["And now?", "Later?", "Late?"]
        assert "asked at 2:45:00 (9900 s): Late?" in err


@pytest.fixture(scope="module")
def site(clip: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_on_the_network_is_a_file(run: Run, tiny: Path, site: str) -> None:
    args = stream(tiny, f"{site}/clip.mp4", "--jsonl", "-", "--max_new_tokens", 3, "--speed", 0)
    code, out, _ = run(realtime_streaming_infer, *args)
    assert code == 0
    seen = [e["frame_at"] for e in events(out) if e["type"].startswith("input_frame")]
    assert seen == list(range(SECONDS))
    code, out, err = run(realtime_streaming_infer, *stream(tiny, f"{site}/none.mp4"))
    assert code == 1
    assert "none.mp4: cannot be read: Server returned 404 Not Found" in err
    assert "loading" not in err


def test_what_a_watching_model_has_forgotten_is_told(run: Run, tiny: Path, clip: Path) -> None:
    common = ["--checkpoint", tiny, "--video_path", clip, "--window", 2, "--max_new_tokens", 2]
    code, _, err = run(realtime_offline_infer, *common, "--video_minlen", 3, "--video_maxlen", 3)
    assert code == 0
    assert "forgotten (--window, --max_context): the first 1 frames, 0 tokens" in err
    code, _, err = run(realtime_offline_infer, *common)
    assert (code, "forgotten" in err) == (0, False)


def test_both_offline_commands_answer(run: Run, sft: Path, tiny: Path, clip: Path) -> None:
    common = ["--video_path", clip, "--prompt", "What is it?", "--max_new_tokens", 5]
    for module, checkpoint in ((offline_infer, sft), (realtime_offline_infer, tiny)):
        code, out, err = run(module, "--checkpoint", checkpoint, *common, "--jsonl", "-")
        assert code == 0
        done = next(e for e in events(out) if e["type"] == "response.done")
        code, plain, _ = run(module, "--checkpoint", checkpoint, *common)
        assert (code, plain) == (0, done["text"] + "\n")
        assert f"{done['usage']['output_tokens']} tokens, the first after" in err


@pytest.mark.parametrize(
    ("module", "args", "code", "message"),
    [
        (STREAM, "--checkpoint {sft} --video_path {clip}", 2, "of the form chat"),
        (WATCH, "--checkpoint {sft} --video_path {clip}", 2, "of the form chat"),
        (ASK, "--checkpoint {tiny} --video_path {clip}", 2, "of the form realtime"),
        (ASK, "--checkpoint none --video_path {clip}", 2, "there is no none/config.json"),
        (ASK, "--video_path {clip}", 2, "--checkpoint: give the folder"),
        (ASK, "--checkpoint {sft} --video_path no.mp4", 1, "no.mp4: there is no such file"),
        (ASK, "--checkpoint {sft} --video_path {broken}", 1, "undecodable_video"),
        (ASK, "--checkpoint {sft} --image_path {broken}", 1, "undecodable_image"),
        (ASK, "--checkpoint {sft}", 2, "give --video_path, --image_path or --prompt"),
        (ASK, "--checkpoint {sft} --image_path a --video_path b", 2, "give one of them"),
        (ASK, "--checkpoint {sft} --prompt Hi --temperature -1", 2, "temperature=-1.0: must be"),
        (ASK, "--checkpoint {sft} --prompt Hi --sinks 300", 2, "sinks=300: must be less than"),
        (ASK, "--checkpoint {sft} --video_path b --video_minlen 20", 2, "--video_minlen 20"),
        (
            ASK,
            "--checkpoint {sft} --video_path {clip} --window 1 --video_maxlen 2",
            1,
            "2 pictures and frames, and the model sees window=1 at once (--window)",
        ),
        (STREAM, "--checkpoint {tiny} --video_path no.mp4", 1, "no such file"),
        (STREAM, "--checkpoint {tiny} --video_path {clip} --fps 0", 2, "argument --fps: 0: must"),
        (STREAM, "--checkpoint {tiny} --video_path {clip} --pace 0", 2, "argument --pace: 0: must"),
        (STREAM, "--checkpoint {tiny} --video_path {clip} --ask what", 2, "write SECOND:TEXT"),
        (STREAM, "--checkpoint {tiny} --video_path 7 --speed 0", 1, "error"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    run: Run,
    sft: Path,
    tiny: Path,
    clip: Path,
    tmp_path: Path,
    module: Any,
    args: str,
    code: int,
    message: str,
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    given = args.format(sft=sft, tiny=tiny, clip=clip, broken=broken)
    exit_code, out, err = run(module, *given.split())
    assert exit_code == code
    lines = [line for line in (out + err).splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in out + err


def test_a_stage_of_another_name_is_known_by_its_prompt_form(
    run: Run, clip: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, moss_stage="cooking", moss_prompt_form="realtime")
    code, _, err = run(STREAM, *stream(folder, clip, "--speed", 0, "--pace", 2))
    assert code == 0
    assert "prompt_form" not in err


def test_world_size_without_a_rank_is_refused_at_once(
    run: Run, tiny: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = run(STREAM, *stream(tiny, clip, "--speed", 0))
    assert code == 2
    assert "error: WORLD_SIZE=2, but RANK is not set: start with torchrun" in err.splitlines()[-1]


def test_two_ranks_say_what_one_process_says(run: Run, tiny: Path, clip: Path) -> None:
    """They share the model under torchrun; rank 0 alone speaks."""
    args = stream(tiny, clip, "--speed", 0, "--jsonl", "-", "--pace", 5)
    _, alone, _ = run(realtime_streaming_infer, *args)
    ranks = run_ranks("inference/realtime_streaming_infer.py", 2, *map(str, args))
    lines = [line for line in ranks.stdout(0).splitlines() if line.startswith("{")]
    said = [
        [e.get("text") for e in told if e["type"] in ("response.done", "input_frame.processed")]
        for told in (events(alone), events("\n".join(lines)))
    ]
    assert said[0] == said[1]
    assert "{" not in ranks.stdout(1)
    shutil.rmtree(ranks.out)
