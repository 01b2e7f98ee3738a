"""Sets as they are published: COCO's captions, VQA's questions, WebVid, MSR-VTT, moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.build import BuildOptions, build_shards
from data_pipeline.importers import records
from data_pipeline.importers.forms import SourceOptions
from data_pipeline.shards import ShardError
from tests.data_pipeline.importers.realtime import FRAME, SILENCE, run, said, write
from tests.samples import write_tar

ASKED = "Describe what happens, as it happens."
IMAGES = [
    {"license": 3, "file_name": name, "height": 8, "width": 12, "id": number,
     "coco_url": f"http://images.cocodataset.org/train2017/{name}"}
    for name, number in (("000000000009.jpg", 9), ("000000000025.jpg", 25))
]  # fmt: skip
CAPTIONS = {
    "info": {"year": 2017},
    "licenses": [{"id": 3}],
    "images": IMAGES,
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe."},
        {"image_id": 9, "id": 2, "caption": "Bins of food."},
        {"image_id": 10, "id": 3, "caption": "Nobody's."},
    ],
}
QUESTIONS: dict[str, Any] = {
    "info": {},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {},
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "What is in it?", "question_id": 9000},
        {"image_id": 9, "question": "Who eats it?", "question_id": 9001},
    ],
}
ANSWERS = {
    "info": {},
    "license": {},
    "data_subtype": "train2014",
    "data_type": "mscoco",
    "annotations": [
        {"question_type": "what", "multiple_choice_answer": "food", "image_id": 9,
         "answers": [{"answer": "bins", "answer_confidence": "yes", "answer_id": 1}],
         "answer_type": "other", "question_id": 9000},
    ],
}  # fmt: skip


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files are read whole, or as those that are too large for that."""
    if request.param == "large":
        monkeypatch.setattr(records, "_LARGE", 8)
        monkeypatch.setattr(records, "_CHUNK", 16)
    return str(request.param)


def picture(path: Path, color: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), color).save(path)
    return path.read_bytes()


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def reasons(source: Path) -> list[str]:
    """What the last import said of the records that it rejected."""
    out = max((source.parent.parent).glob("out-*"), key=lambda path: int(path.name[4:]))
    return [json.loads(line)["detail"] for line in (out / "rejected.jsonl").open()]


def test_cocos_captions_have_their_pictures(size: str, tmp_path: Path) -> None:
    red = picture(tmp_path / "coco/train2017/000000000009.jpg")
    blue = picture(tmp_path / "coco/train2017/000000000025.jpg", "blue")
    source = written(tmp_path / "coco/annotations/captions_train2017.json", CAPTIONS)
    for root in ("coco", "coco/train2017"):
        samples, summary = run(source, media_dir=str(tmp_path / root))
        assert [said(sample) for sample in samples] == [
            ["<|image|>", "A giraffe."], ["<|image|>", "Bins of food."],
        ]  # fmt: skip
        assert [sample["members"]["0.jpg"] for sample in samples] == [blue, red]
        assert [sample["kind"] for sample in samples] == ["caption", "caption"]
        assert summary.rejected == {"missing_file": 1}
    assert reasons(source) == ["annotations[2].image_id: 10 is the id of none of the images"]
    boxes = [{"bbox": [0, 0, 4, 4], "category_id": 1, "image_id": 9, "id": 1}]
    source = written(tmp_path / "coco/instances_train2017.json", CAPTIONS | {"annotations": boxes})
    with pytest.raises(ShardError, match=r"instances_train2017\.json: annotations\[0\] has no "
                                         "`caption`, but bbox, category_id"):  # fmt: skip
        run(source)


def test_karpathys_splits_have_the_sentences_in_their_pictures(size: str, tmp_path: Path) -> None:
    red = picture(tmp_path / "coco/val2014/COCO_val2014_000000391895.jpg")
    sentences = [{"tokens": ["a", "man"], "raw": "A man.", "imgid": 0, "sentid": 7},
                 {"tokens": ["a", "bike"], "raw": "A bike.", "imgid": 0, "sentid": 8}]  # fmt: skip
    image = {"filepath": "val2014", "sentids": [7, 8], "filename": "COCO_val2014_000000391895.jpg",
             "imgid": 0, "split": "test", "sentences": sentences, "cocoid": 391895}  # fmt: skip
    lost = {"filename": "x.jpg", "split": "train"}
    source = written(tmp_path / "s/dataset_coco.json", {"images": [image, lost], "dataset": "coco"})
    samples, summary = run(source, media_dir=str(tmp_path / "coco"))
    assert [said(sample) for sample in samples] == [
        ["<|image|>", "A man."], ["<|image|>", "A bike."],
    ]  # fmt: skip
    assert [sample["members"] for sample in samples] == [{"0.jpg": red}] * 2
    assert summary.notes == {"unused field split": 2}
    assert summary.rejected == {"missing_caption": 1}


def test_flickrs_captions_are_tables(tmp_path: Path) -> None:
    red = picture(tmp_path / "flickr/Images/1000268201_693b08cb0e.jpg")
    (tmp_path / "flickr/captions.txt").write_text(
        'image,caption\n1000268201_693b08cb0e.jpg,"A child , in a pink dress ."\n'
    )
    root = str(tmp_path / "flickr/Images")
    (sample,), _ = run(tmp_path / "flickr/captions.txt", media_dir=root)
    assert said(sample) == ["<|image|>", "A child , in a pink dress ."]
    assert sample["members"] == {"0.jpg": red}
    (tmp_path / "flickr/results.csv").write_text(
        "image_name| comment_number| comment\n"
        '1000268201_693b08cb0e.jpg| 0| A child , in a "pink" dress .\n'
        "1000268201_693b08cb0e.jpg| 4   A dog runs .\n"
    )
    (sample,), summary = run(tmp_path / "flickr/results.csv", media_dir=root,
                             media_column="image_name", caption_column="comment")  # fmt: skip
    assert said(sample) == ["<|image|>", 'A child , in a "pink" dress .']
    assert summary.rejected == {"bad_csv": 1}
    (tmp_path / "flickr/r.txt").write_text('{"text": "one"}\n{"text": "two"}\n')
    samples, _ = run(tmp_path / "flickr/r.txt")
    assert [said(sample)[-1] for sample in samples] == ["one", "two"]


def test_vqas_questions_find_their_answers_and_pictures(size: str, tmp_path: Path) -> None:
    red = picture(tmp_path / "coco/train2014/COCO_train2014_000000000009.jpg")
    where = tmp_path / "vqa"
    source = written(where / "v2_OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    with pytest.raises(ShardError, match="its questions have no answers: they are expected in "
                                         r".*/v2_mscoco_train2014_annotations\.json"):  # fmt: skip
        run(source)
    answers = written(where / "v2_mscoco_train2014_annotations.json", ANSWERS)
    for given in (source, where):  # a folder's answers are no file of records of their own
        (sample,), summary = run(given, media_dir=str(tmp_path / "coco"))
        assert said(sample) == ["<|image|>What is in it?", "food"]
        assert sample["members"] == {"0.jpg": red}
        assert sample["kind"] == "chat"
        assert summary.rejected == {"missing_text": 1}
    with pytest.raises(ShardError, match=r"annotations\.json: annotations\[0\] has a question_id"):
        run(answers)
    source.rename(where / "mine.json")
    with pytest.raises(ShardError, match=r"mine\.json: .* call it \*questions\.json"):
        run(where / "mine.json")


def test_an_import_notices_that_its_answers_are_others(tmp_path: Path) -> None:
    picture(tmp_path / "coco/train2014/COCO_train2014_000000000009.jpg")
    source = written(tmp_path / "vqa/v2_OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    answers = written(tmp_path / "vqa/v2_mscoco_train2014_annotations.json", ANSWERS)
    options = BuildOptions(source=SourceOptions(media_dir=str(tmp_path / "coco")))
    for given in (source, source.parent):
        out = tmp_path / f"out_{given.stem}"
        build_shards(given, out, options)
        before = answers.read_text()
        answers.write_text(before.replace("food", "bins of food"))
        with pytest.raises(ShardError, match="holds an import with other arguments: source_files"):
            build_shards(given, out, options)
        answers.write_text(before)
        assert build_shards(given, out, options).imported == {"image": 1}


def test_a_list_of_captions_is_a_sample_for_each(tmp_path: Path) -> None:
    """As the parquet files of Flickr30k and COCO on a hub have them."""
    red = picture(tmp_path / "set/red.jpg")
    rows = [
        {"image": {"bytes": red, "path": "red.jpg"}, "caption": ["A dog.", "", "A red dog."]},
        {"image": {"bytes": red, "path": "red.jpg"}, "caption": ["nan"]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set/f.parquet")
    record = {"image": "red.jpg", "sentences": ["One.", "Two."]}
    (tmp_path / "set/s.jsonl").write_text(json.dumps(record))
    (tmp_path / "set/c.csv").write_text("URL,TEXT\nred.jpg,Laion has\n")
    as_json = json.dumps({"captions": ["In a", "shard."]}).encode()
    write_tar(tmp_path / "set/t.tar", {"a.jpg": red, "a.json": as_json})
    found = {}
    for name in ("f.parquet", "s.jsonl", "c.csv", "t.tar"):
        samples, summary = run(tmp_path / "set" / name)
        assert all(sample["members"] == {"0.jpg": red} for sample in samples)
        found[name] = sorted(said(sample)[1] for sample in samples)
        if name == "f.parquet":
            assert summary.rejected == {"missing_caption": 1}
            assert summary.notes == {"caption without a text, left out": 1}
    assert found == {
        "f.parquet": ["A dog.", "A red dog."],
        "s.jsonl": ["One.", "Two."],
        "c.csv": ["Laion has"],
        "t.tar": ["In a", "shard."],
    }


def test_captions_that_are_missing_from_a_list_are_left_out(tmp_path: Path) -> None:
    red = picture(tmp_path / "set/red.jpg")
    record = {"image": "red.jpg", "captions": ["One.", None, "Two."]}
    (tmp_path / "set/s.jsonl").write_text(json.dumps(record))
    lists = {"text": [{"start": 0}], "description": "Of a shard."}  # another's list is none
    write_tar(tmp_path / "set/t.tar", {"a.jpg": red, "a.json": json.dumps(lists).encode()})
    samples, summary = run(tmp_path / "set/s.jsonl")
    assert [said(sample)[1] for sample in samples] == ["One.", "Two."]
    assert summary.notes == {"caption without a text, left out": 1}
    (sample,), _ = run(tmp_path / "set/t.tar")
    assert said(sample)[1] == "Of a shard."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_charades_lines_are_the_moments_of_their_videos(encoding: str, folder: Path) -> None:
    lines = "a 0.0 2.0##a person enters.\nb 0 1##n.\na 1.0 3.0##a person eats \u00e9.\na 3.0\n"
    (folder / "charades_sta_train.txt").write_text(lines, encoding=encoding)
    (sample,), summary = run(folder / "charades_sta_train.txt")
    before = f"{SILENCE}{FRAME}" * 3
    assert said(sample) == [
        ASKED, f"{before}a person enters.{SILENCE}{FRAME}a person eats \u00e9.{SILENCE}",
    ]  # fmt: skip
    assert summary.rejected == {"bad_schema": 1, "missing_file": 1}


def test_questions_of_one_file_are_answered_by_most(size: str, tmp_path: Path) -> None:
    """TextVQA's form; DocVQA's names its pictures by `image`."""
    source = tmp_path / "set/train.json"
    red = picture(tmp_path / "set/train_images/0a1b.jpg")
    picture(tmp_path / "set/train_images/documents/x.png")
    rows = [
        {"question": "Which brand?", "image_id": "0a1b", "answers": ["a", "b", "b"],
         "question_id": 0, "set_name": "train"},
        {"questionId": 1, "question": "When?", "image": "documents/x.png", "answers": ["1999"]},
        {"question": "Which?", "image_id": "0a1b", "choices": ["a", "b"], "answer": 1},
        {"question": "Which?", "image_id": 7, "answer": "a"},
        {"question": "Which?", "image_id": "0a1b", "answers": [""]},
        {"question": "How many?", "image_id": "0a1b", "answer": 3},
    ]  # fmt: skip
    written(source, {"dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows})
    samples, summary = run(source, media_dir=str(tmp_path / "set/train_images"))
    assert [said(sample) for sample in samples] == [
        ["<|image|>Which brand?", "b"], ["<|image|>When?", "1999"],
    ]  # fmt: skip
    assert samples[0]["members"] == {"0.jpg": red}
    assert summary.notes["several answers, of which the most frequent one is taken"] == 1
    assert summary.notes["unused field set_name"] == 1
    assert summary.rejected == {"bad_schema": 2, "missing_text": 2}
    *others, last = reasons(source)
    assert [reason.partition(":")[0] for reason in others] == ["choices", "image_id", "no answer"]
    assert last == "no answer: answer is 3, which is no text"


@pytest.mark.parametrize(
    "choices",
    [{"a0": "a ball", "a1": "a cat"}, {"A": "a ball", "B": "a cat", "C": ""},  # NExT-QA, MMBench
     {"choice_a": "a ball", "choice_b": "a cat"}, {"option 0": "a ball", "option 1": "a cat"},
     {"candidates": ["a ball", "a cat"]}],
)  # fmt: skip
def test_the_letter_of_a_choice_is_no_answer(choices: dict[str, Any], tmp_path: Path) -> None:
    """They were learned: `Which?`, `1`."""
    picture(tmp_path / "set/1.jpg")
    rows = [{"image": "1.jpg", "question": "Which?", "answer": "1", **choices},
            {"image": "1.jpg", "question": "Which?", "answer": "1", "A": "a field of one"},
            {"question": "Which?", "answer": "1", **choices}]  # fmt: skip
    (sample,), summary = run(write(tmp_path / "set/q.jsonl", *rows))
    assert said(sample) == ["<|image|>Which?", "1"]
    assert summary.rejected == {"bad_schema": 2}
    assert [reason.partition(": ")[0] for reason in reasons(tmp_path / "set/q.jsonl")] == (
        [", ".join(name for name in choices if choices[name])] * 2
    )


def test_a_question_stands_behind_its_media_or_where_it_marks_them(folder: Path) -> None:
    for name in ("1", "2"):
        picture(folder / f"{name}.jpg")
    rows = [
        {"video": "a.mp4", "question": "What moves?", "answer": "A bar."},
        {"video_id": "a", "question": "What moves?", "answer": "A bar."},
        {"images": ["1.jpg", "2.jpg"], "question": "Same?", "answer": "Yes."},
        {"images": ["1.jpg", "2.jpg"], "question": "Is <image> as <image>?", "answer": "Yes."},
        {"file_name": "a.mp4", "question": "What moves?", "answers": [{"answer": "A bar."}]},
    ]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, _ = run(folder / "r.jsonl")
    assert [said(sample)[0] for sample in samples] == [
        "<|video|>What moves?", "<|video|>What moves?", "<|image|><|image|>Same?",
        "Is <|image|> as <|image|>?", "<|video|>What moves?",
    ]  # fmt: skip
    record = {"question": "What moves?", "answers": ["A bar."], "image_id": 5}
    shard = {"1.jpg": (folder / "1.jpg").read_bytes(), "1.json": json.dumps(record).encode()}
    write_tar(folder / "s.tar", shard)
    (sample,), _ = run(folder / "s.tar")
    assert said(sample) == ["<|image|>What moves?", "A bar."]


def test_msr_vtts_sentences_and_webvids_rows_have_their_videos(size: str, folder: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    for name in ("TrainValVideo/video0.mp4", "videos/000001_000050/1066674784.mp4"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(clip)
    videos = [{"category": 9, "url": "https://www.youtube.com/watch?v=x", "video_id": "video0",
               "start time": 137.7, "end time": 149.4, "split": "train", "id": 0}]  # fmt: skip
    sentences = [
        {"caption": "a bar moves", "video_id": "video0", "sen_id": 1},
        {"caption": "a bar", "video_id": "video7", "sen_id": 2},
    ]
    source = written(folder / "m.json", {"info": {}, "videos": videos, "sentences": sentences})
    (sample,), summary = run(source, media_dir=str(folder / "TrainValVideo"))
    assert said(sample) == ["<|video|>", "a bar moves"]
    assert sample["members"] == {"0.mp4": clip}
    assert summary.notes["unused field split"] == 1
    assert summary.rejected == {"missing_file": 1}
    (folder / "results.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        "1066674784,https://x.org/1.mp4,PT00H00M10S,000001_000050,Travel blogger\n"
    )
    for root in ("videos", "videos/000001_000050"):
        (sample,), _ = run(folder / "results.csv", media_dir=str(folder / root))
        assert said(sample) == ["<|video|>", "Travel blogger"]
        assert sample["members"] == {"0.mp4": clip}
    # Once fetched, with captions of one's own.
    (folder / "own.csv").write_text(
        "videoid,name,video_path,caption\n7,Travel blogger,a.mp4,A bar moves.\n"
    )
    (sample,), _ = run(folder / "own.csv")
    assert said(sample) == ["<|video|>", "A bar moves."]


def test_captions_of_moments_are_said_when_these_have_ended(size: str, folder: Path) -> None:
    (folder / "v_Q.mp4").write_bytes((folder / "a.mp4").read_bytes())
    moments = {"duration": 10.05, "timestamps": [[0.5, 3.5], [2.0, 10.05], [4, 3]],
               "sentences": ["A woman bends.", " She flips.", "Never."]}  # fmt: skip
    source = written(folder / "t.json", {"v_Q": moments, "v_gone": moments})
    (sample,), summary = run(source)
    watched = FRAME + SILENCE
    bends, flips = f"{FRAME}A woman bends.{SILENCE}", f"{FRAME}She flips.{SILENCE}"
    assert sample["kind"] == "realtime"
    assert said(sample) == [ASKED, SILENCE + watched * 4 + bends + watched * 4 + flips]
    assert sample["media"][0]["times"] == [float(second) for second in range(10)]
    assert summary.notes["caption with a bad time, left out"] == 1
    assert summary.notes["captions whose times overlap"] == 1
    assert summary.rejected == {"missing_file": 1}
    written(source, {"v_Q": moments | {"sentences": ["one"]}, "v_R": moments})
    run(source)
    assert reasons(source)[0].startswith("timestamps has 3 entries, sentences 1")

    place = folder / "raw_videos/training/113/GL.mp4"
    place.parent.mkdir(parents=True)
    place.write_bytes((folder / "a.mp4").read_bytes())
    steps = [{"segment": [2, 4], "id": 0, "sentence": "spread margarine"}]
    cook = {"duration": 10.0, "subset": "training", "recipe_type": "113", "annotations": steps,
            "video_url": "https://www.youtube.com/watch?v=GL"}  # fmt: skip
    source = written(folder / "y.json", {"database": {"GL": cook}})
    for root in ("raw_videos", "raw_videos/training", "raw_videos/training/113"):
        (sample,), _ = run(source, media_dir=str(folder / root))
        assert said(sample) == [ASKED, SILENCE + watched * 4 + f"{FRAME}spread margarine{SILENCE}"]


def test_windows_of_moments_show_what_their_captions_are_about(folder: Path) -> None:
    times, texts = [[1, 2], [6, 7], [5.5, 9]], ["one", "two", "three"]
    source = written(folder / "t.json", {"a": {"timestamps": times, "sentences": texts}})
    samples, _ = run(source, window=6)
    # Each from 2 s before its first moment on, to the end of its last one.
    times = [sample["media"][0]["times"] for sample in samples]
    assert times == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]]
    words = ["".join(said(sample)).replace(FRAME, "").replace(SILENCE, "") for sample in samples]
    assert words == [f"{ASKED}one", f"{ASKED}twothree"]
