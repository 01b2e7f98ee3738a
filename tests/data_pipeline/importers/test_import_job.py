"""An import as a job: workers, kills, manifests, limits, servers, re-encoding."""

from __future__ import annotations

import io
import json
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import psutil
import pytest
from PIL import Image

from data_pipeline.build import BuildOptions, TooManyRejectedError, build_shards, main
from data_pipeline.importers.media import MediaOptions
from data_pipeline.shards import ShardError, check_source
from data_pipeline.stores import StoreOptions
from data_pipeline.video import frames_at, probe_video
from tests.data_pipeline.importers.jobs import blocked, command, contents, has_shards, make_records
from tests.samples import graded_video, imported
from tests.waiting import PATIENCE, running, until

REPO = Path(__file__).resolve().parents[3]


def test_names_and_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    source = make_records(tmp_path / "in", 400)
    outs = {workers: tmp_path / f"out{workers}" for workers in (0, 1, 3)}
    for workers, out in outs.items():
        options = BuildOptions(samples_per_shard=50, shard_size=0.9, workers=workers)
        summary = build_shards(source, out, options)
        # 134 of 400 numbers are multiples of 3; of the 40 that end with 5, 13 are, too.
        assert summary.imported == {"text": 134, "image": 400 - 134 - 27}
        assert summary.rejected == {"missing_file": 27}
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[3])
    names = {name for name in contents(outs[0]) if name.startswith("text")}
    assert names == {f"text/shard-00000{i}.tar" for i in range(3)}
    # Noise of 43 kB: 0.9 MB are full with 21 pictures, before there are 50.
    assert 0.9e6 / 21 < (tmp_path / "in/a.png").stat().st_size < 0.88e6 / 20
    assert len(list((outs[0] / "image").glob("*.tar"))) == 12
    assert check_source(outs[0] / "image").samples == 239


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    source = make_records(tmp_path / "in", 12)
    build_shards(source, tmp_path / "out")
    with pytest.raises(ShardError, match="samples_per_shard 1000, now 7: give the same"):
        build_shards(source, tmp_path / "out", BuildOptions(samples_per_shard=7))
    with source.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ShardError, match=r"source_files '1 files, .*', now '1 files"):
        build_shards(source, tmp_path / "out")
    (tmp_path / "out/build.json").unlink()
    with pytest.raises(ShardError, match="already holds shards: choose another folder"):
        build_shards(source, tmp_path / "out")


def test_a_worker_that_is_killed_ends_the_import_which_then_goes_on(tmp_path: Path) -> None:
    source, out = make_records(tmp_path / "in", 600), tmp_path / "out"
    arguments = command(source, out, "--workers", 1, "--samples-per-shard", 20)
    with (
        blocked(source.parent / "own400.png"),
        running(arguments, cwd=REPO, stderr=subprocess.PIPE, text=True) as job,
    ):
        until(partial(has_shards, out, 1))
        (worker,) = psutil.Process(job.pid).children()
        worker.kill()
        said = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode == 1
    assert "a worker was killed (out of memory?): the same command goes on" in said
    assert build_shards(source, out, BuildOptions(samples_per_shard=20)).records == 600


def test_text_that_no_file_can_hold_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "odd \udcff.jsonl").write_text(
        '{"text": "\\ud800 half"}\n{"text": "whole \u00e9"}\n'
    )
    (path,) = tmp_path.glob("*.jsonl")
    assert build_shards(path, tmp_path / "out").imported == {"text": 1}
    ((key, sample),) = imported(tmp_path / "out").items()
    assert key == "odd__-000001"
    assert sample["origin"] == "odd \\udcff.jsonl"
    assert sample["messages"][1]["content"] == "whole é"
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "bad_text"


def test_two_imports_into_one_folder_do_not_run_at_once(tmp_path: Path) -> None:
    source, out = make_records(tmp_path / "in", 600), tmp_path / "out"
    with (
        blocked(source.parent / "own400.png"),
        running(command(source, out, "--workers", 0), cwd=REPO),
    ):
        until((out / "shards.jsonl").exists)
        with pytest.raises(ShardError, match="another import into it is running"):
            build_shards(source, out)
    assert build_shards(source, out).records == 600


@pytest.mark.parametrize(("limit", "code"), [("0.2", 0), ("0.05", 1), ("4", 0), ("3", 1), ("0", 1)])
def test_rejected_records_are_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, code: int
) -> None:
    source = make_records(tmp_path / "in", 60)  # 5, 25, 35, 55 are missing
    arguments = [str(source), str(tmp_path / "out"), "--workers", "0"]
    assert main([*arguments, "--max-rejected", limit]) == code
    if code:
        assert "records rejected (missing_file" in capsys.readouterr().err
        assert main([*arguments, "--max-rejected", "0.5"]) == 0  # allowed more, it goes on
    assert "60 records: 56 imported, 4 rejected" in capsys.readouterr().out
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == [5, 25, 35, 55]


def test_a_share_of_rejected_records_stops_early(tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "x"}\n' + "{\n" * 5000)
    with pytest.raises(TooManyRejectedError, match=r"999 of 1000 records rejected \(bad_json 999"):
        build_shards(source, tmp_path / "out", BuildOptions(max_rejected=0.5))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server of tmp_path/in."""
    handler = partial(_Quiet, directory=str(tmp_path / "in"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_records_and_media_come_from_a_web_server(tmp_path: Path, server: str) -> None:
    source = make_records(tmp_path / "in", 40)
    here, there = tmp_path / "here", tmp_path / "there"
    build_shards(source, here)
    build_shards(f"{server}/records.jsonl", there, BuildOptions(workers=2))
    rejected = {"rejected.jsonl"}  # whose details name the path that was tried
    assert contents(there).keys() == contents(here).keys() >= rejected
    assert contents(there).items() - contents(here).items() == {
        ("rejected.jsonl", contents(there)["rejected.jsonl"])
    }
    tried = json.loads((there / "rejected.jsonl").read_text().splitlines()[0])["detail"]
    assert tried == f"{server}/gone.png: No such file or directory"
    absolute = json.loads(source.read_text().splitlines()[1])
    absolute["images"] = [f"{server}/a.png"]
    (tmp_path / "local.jsonl").write_text(json.dumps(absolute) + "\n")
    assert build_shards(tmp_path / "local.jsonl", tmp_path / "mixed").imported == {"image": 1}

    (tmp_path / "in/pics/deep").mkdir(parents=True)
    (tmp_path / "in/a.png").rename(tmp_path / "in/pics/deep/a b.png")
    (tmp_path / "in/pics/deep/a b.txt").write_text("Noise")
    assert build_shards(f"{server}/pics", tmp_path / "listed").imported == {"image": 1}
    with pytest.raises(ShardError, match=r"nothing.jsonl does not exist"):
        build_shards(f"{server}/nothing.jsonl", tmp_path / "no")


def test_a_server_that_falls_silent_costs_one_record(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.files._RETRY_AFTER", (0.1,))
    source = tmp_path / "in"
    source.mkdir()
    for name in ("good", "silent"):
        Image.new("RGB", (8, 8), "red").save(source / f"{name}.png")
    done, waited = threading.Event(), list[bool]()

    class Silent(_Quiet):
        def do_GET(self) -> None:
            if self.path == "/silent.png":
                waited.append(done.wait(300))
            else:
                super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(source))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("silent", "good"):
            record = {
                "messages": [
                    {"role": "user", "content": "<image>What?"},
                    {"role": "assistant", "content": "Red."},
                ],
                "images": [f"{url}/{name}.png"],
            }
            with (tmp_path / "records.jsonl").open("a") as lines:
                lines.write(json.dumps(record) + "\n")
        # As many seconds as the server may need for the good one, on a busy machine.
        options = BuildOptions(stores=StoreOptions(timeout=3.0))
        summary = build_shards(tmp_path / "records.jsonl", tmp_path / "out", options)
        assert waited == [], "the import has ended while the server was silent"
        done.set()
        server.shutdown()
    assert summary.imported == {"image": 1}
    assert summary.rejected == {"unreadable_file": 1}
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"] == "silent.png: the server does not answer"


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_store_without_its_package_says_which_to_install(tmp_path: Path) -> None:
    with pytest.raises(
        ShardError, match=r"gs://bucket/a.jsonl: .* pip install 'moss-train\[gcs\]'"
    ):
        build_shards("gs://bucket/a.jsonl", tmp_path / "out")


def test_larger_media_are_shrunk_and_the_others_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.new("RGB", (300, 100), "red").save(source / "a_wide.png")
    Image.new("RGB", (40, 64), "red").save(source / "b_small.png")
    even, uneven = [i / 10 for i in range(30)], [0.0, 0.3, 1.0, 1.9, 2.05, 2.4]
    graded_video(source / "c_even.mp4", even)
    graded_video(source / "d_uneven.mp4", uneven, size=(64, 48))
    for path in sorted(source.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    media = MediaOptions(max_side=64, video_fps=2)
    assert build_shards(source, out, BuildOptions(media=media)).imported == {"image": 2, "video": 2}
    made = {sample["origin"]: sample["members"] for sample in imported(out).values()}

    assert set(made["a_wide.png"]) == {"0.jpg"}
    with Image.open(io.BytesIO(made["a_wide.png"]["0.jpg"])) as wide:
        assert (wide.format, wide.size) == ("JPEG", (64, 21))
        red, green, blue = wide.getpixel((30, 10))  # type: ignore[misc]
        assert red > 240
        assert max(green, blue) < 12
    assert made["b_small.png"] == {"0.png": (source / "b_small.png").read_bytes()}

    clip = made["c_even.mp4"]["0.mp4"]
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 42)
        assert stream.average_rate == 2
    assert probe_video(clip).frames == 6
    # At 0, 0.5, ... s the frames 0, 5, ... of the original were on screen.
    assert brightness(clip, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]) == [0, 5, 10, 15, 20, 25]

    slow = made["d_uneven.mp4"]["0.mp4"]  # 2.5 frames a second on average: thinned out, not shrunk
    assert brightness(slow, [0.0, 0.5, 1.0, 1.5, 2.0]) == [0, 1, 2, 2, 3]


def test_a_smaller_video_keeps_every_frame_at_its_time(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    stamps = [round(i / 29.97, 3) for i in range(30)]
    graded_video(source / "clip.mp4", stamps)
    (source / "clip.txt").write_text("A clip")
    build_shards(source, out, BuildOptions(media=MediaOptions(max_side=48)))
    ((clip,),) = (sample["members"].values() for sample in imported(out).values())
    info = probe_video(clip)
    assert info.frames == 30
    assert abs(info.last - 29 / 29.97) < 0.01
    assert brightness(clip, [stamp + 0.01 for stamp in stamps]) == list(range(30))


def brightness(data: bytes, times: list[float]) -> list[int]:
    return [round(frame.float().mean().item() / 8) for frame in frames_at(data, times)]
