"""Benchmarks of the toy world in the layouts of real ones: JSONL, PNG and MP4 files, and for
lmms-eval a YAML file and functions for each; and the same questions in our own form."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.toy.build import ToyConfig, build_toy
from moss_train.evaluate.items import _samples

UTILS = '''
"""Functions of the local tasks."""
from PIL import Image

def image(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def video(doc):
    return [doc["video"]]

def text(doc):
    return doc["question"]

def with_options(doc):
    return doc["question"] + " " + " / ".join(doc["options"])

def process_results(doc, results):
    said, wanted = (" ".join(x.lower().split()).rstrip(".") for x in (results[0], doc["answer"]))
    return {"exact": float(said == wanted)}
'''
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{medium}
doc_to_text: !function utils.{text}
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 64
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""


@dataclass(frozen=True)
class Local:
    """tasks: folder for `--include`. own: a JSONL file for the own evaluator, by task."""

    tasks: Path
    own: dict[str, Path]
    answers: dict[str, list[str]]


def write_tasks(folder: Path, count: int) -> Local:
    """`toy_image_mc`, `toy_image_open` and `toy_video_mc`, of `count` questions each."""
    world, tasks = folder / "world", folder / "tasks"
    build_toy(world, ToyConfig(train=1, heldout=6 * count, stages=("sft",)), workers=1)
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    own, answers = {}, {}
    for name, modality, first in (
        ("toy_image_mc", "image", 0),
        ("toy_image_open", "image", count),
        ("toy_video_mc", "video", 0),
    ):
        found = _questions(world / "sft/heldout" / modality)[first : first + count]
        assert len(found) == count
        media = folder / name
        media.mkdir()
        text = "with_options" if name == "toy_image_mc" else "text"
        docs = [_write(media, number, *question) for number, question in enumerate(found)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (tasks / f"{name}.yaml").write_text(
            YAML.format(name=name, data=data, medium=modality, text=text)
        )
        own[name] = folder / f"own_{name}.jsonl"
        lines = [_own(doc, modality, folder, text == "text") for doc in docs]
        own[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers[name] = [doc["answer"] for doc in docs]
    return Local(tasks, own, answers)


def _questions(folder: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Questions with options, one medium and no earlier turn."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        for _, parts in _samples(shard):
            sample = json.loads(parts["json"])
            single = len(sample["media"]) == 1 and len(sample["messages"]) == 2
            if single and sample.get("options"):
                found.append((sample, parts[sample["media"][0]["file"]]))
    return found


def _write(folder: Path, number: int, sample: dict[str, Any], data: bytes) -> dict[str, Any]:
    question, answer = (message["content"] for message in sample["messages"])
    assert question.startswith("<|")
    kind = "image" if question.startswith("<|image|>") else "video"
    path = folder / f"{kind} {number}.{'png' if kind == 'image' else 'mp4'}"
    if kind == "image":
        Image.open(io.BytesIO(data)).save(path)
    else:
        path.write_bytes(data)
    return {
        "id": number,
        kind: str(path),
        "question": question.partition("|>")[2],
        "options": sample["options"],
        "answer": answer,
    }


def _own(doc: dict[str, Any], kind: str, folder: Path, is_open: bool) -> dict[str, Any]:
    file = str(Path(doc[kind]).relative_to(folder))
    asked = doc["question"] + ("" if is_open else " " + " / ".join(doc["options"]))
    return {
        "kind": "chat",
        "messages": [
            {"role": "user", "content": f"<|{kind}|>{asked}"},
            {"role": "assistant", "content": doc["answer"]},
        ],
        "media": [{"type": kind, "file": file}],
    }
