"""`moss-eval compare`: tables, and a page with what changed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.commands import FAILED
from inference.evaluate.results import EvaluationRun, mean_row
from tests.data_pipeline.clips import every, number, picture, video
from tests.pages import Page
from tools.evaluate.__main__ import main


def write_run(out: Path, right: list[bool], media: list[Path], suite: str = "clips") -> Path:
    with EvaluationRun(out, out.name, suite, {"frames": 8}) as run:
        file = run.items("row")
        for n, correct in enumerate(right):
            file.add({
                "id": str(n), "row": "row", "score": float(correct), "correct": correct, "at": 2.0,
                "question": f"What is <{n}>?", "answer": f"{out.name} {n}", "reference": "A",
                "media": [str(media[n])],
            })  # fmt: skip
        run.finish([mean_row("row", "accuracy", file.items.values(), len(right))])
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Items 1 to 3 change: about a clip, a picture, and a file that is not there."""
    folder = tmp_path_factory.mktemp("compared")
    clip, image, gone = folder / "c.mp4", folder / "i.png", folder / "gone.mp4"
    video(clip, every(0.5, 10))
    Image.fromarray(picture(77)).save(image)
    media = [clip, clip, image, gone]
    first = write_run(folder / "one", [True, False, False, True], media)
    second = write_run(folder / "two", [True, True, True, False], media)
    return folder, first, second


def test_the_page_shows_what_changed_with_its_frames_and_both_answers(runs, capsys):
    folder, first, second = runs
    assert main(["compare", str(first), str(second), "--out", str(folder / "out")]) == 0
    assert "row  4" in capsys.readouterr().out
    (row,) = json.loads((folder / "out/compare.json").read_text())["differences"][0]["rows"]
    assert (row["first"], row["second"], row["gained"], row["lost"], row["p"]) == (
        0.5,
        0.75,
        2,
        1,
        1,
    )
    page = Page((folder / "out/compare.html").read_text())
    pictures = [Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2]))) for u in page.images]
    assert [number(shown) for shown in pictures] == [0, 4, 9, 77]
    assert page.captions == ["c.mp4, 0.0 s", "c.mp4, 2.0 s", "c.mp4, 4.5 s", "i.png"]
    answers = [[cell for line in table for cell in line] for table in page.tables[-3:]]
    assert [(cells[2], cells[5]) for cells in answers] == [
        (f"one {n}", f"two {n}") for n in (1, 2, 3)
    ]
    assert "What is <1>?" in page.text
    assert "gone.mp4: [Errno 2]" in page.text
    assert "one 0" not in page.text


def test_what_cannot_be_compared_is_named(runs, capsys):
    folder, first, _ = runs
    other = write_run(folder / "other", [True], [folder / "i.png"], suite="pictures")
    assert main(["compare", str(first), str(other)]) == FAILED
    assert "other is of suite pictures" in capsys.readouterr().err
    assert main(["compare", str(first), str(folder / "nothing")]) == FAILED
    assert "results.json: No such file" in capsys.readouterr().err
