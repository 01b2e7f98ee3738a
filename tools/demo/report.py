"""Writes OUT/report.html: the demo in OUT on one page that needs no network."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch import Tensor

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import CommandParser, report_error
from data_pipeline.encode import SampleEncoder
from data_pipeline.page import render
from data_pipeline.tokens import load_tokenizer
from data_pipeline.toy import temporal
from data_pipeline.toy.build import MODALITIES, STAGES
from data_pipeline.toy.stream import NARRATE
from moss_train.config import Config, from_dict
from moss_train.data_config import CONTROLS
from moss_train.evaluate.items import Item, read_shards
from moss_train.evaluate.score import Score, Timeline, expected_answer
from moss_train.evaluate.suite import table
from moss_train.train.curves import PANELS, panel_svgs
from moss_train.train.data import encode_config
from moss_train.train.metrics import read_metrics
from tools.demo.narrate import Sentences, sentences_of, spoken
from tools.demo.parts import BEFORE, RECORD

SUMMED = ("with the right words", temporal.GROUP)  # parts of a score that the short table has
EXAMPLES = 5  # samples of each kind on the page, the first ones


@dataclass(frozen=True)
class Strip:
    """A clip second by second: a picture, and the words of that second in each lane."""

    title: str
    frames: list[str]
    lanes: dict[str, list[str]]


@dataclass(frozen=True)
class Sample:
    """A question about pictures: URLs of these, the right answer and the model's."""

    pictures: list[str]
    asked: str
    wanted: str
    said: str


class Stage:
    """A trained stage of the demo: its run folder, and its held-out items."""

    def __init__(self, run: Path):
        self.name, self.run = run.name, run
        self.config: Config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
        self.result: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
        self.scores = [Score(**score) for score in self.result["scores"]]
        self.rows = read_metrics(run)
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        self.encoder = SampleEncoder(encode_config(self.config), tokenizer)

    def items(self, modality: str, limit: int) -> list[Item]:
        """The first held-out items of a modality."""
        folder = Path(self.config.data.root) / self.name / "heldout" / modality
        source = f"{self.name}/{modality}"
        return list(read_shards(folder, source, self.encoder, limit))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = CommandParser("python -m tools.demo.report", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of tools.demo")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.out))
    except OSError as error:
        what = f"{error.filename}: {error.strerror}: give a folder that tools.demo has finished"
        return report_error(parser.prog, what)
    return 0


def write_report(out: Path) -> Path:
    """Writes OUT/report.html from the run folders of the stages in OUT, their evaluation.json,
    demo.json, and, where they are there, before.json and narration.jsonl."""
    parts = json.loads((out / RECORD).read_text())
    stages = [Stage(out / name) for name in STAGES if (out / name / "evaluation.json").exists()]
    before = out / "before.json"
    earlier = json.loads(before.read_text()) if before.exists() else None
    if len(stages) > 1:  # else the evaluation has just printed it
        print(table([score for stage in stages for score in stage.scores]))
    rows = [row for stage in stages for row in score_table(stage, earlier)]
    page = render(
        "demo.html.jinja",
        Path(__file__).parent,
        title="moss_train: the demo",
        stages=[stage.name for stage in stages],
        steps=sum(stage.rows[-1]["step"] for stage in stages if stage.rows),
        batch=stages[-1].config.data.global_batch,
        minutes=sum(part["seconds"] for part in parts) / 60,
        earlier=earlier,
        before_samples=BEFORE,
        narrated=_narrated(out, stages[-1]),
        scores=[row for row in rows if not row[1].startswith("  ") or row[1].strip() in SUMMED],
        all_scores=rows,
        panels=_curves(stages),
        samples=[(stage.name, s) for stage in stages for s in _samples(stage)],
        strips=_streams(stages[-1]),
        parts=parts,
    )
    path = out / "report.html"
    write_atomically(path, page)
    return path


def score_table(stage: Stage, earlier: Mapping[str, Any] | None) -> Iterator[list[str]]:
    """Lines of the table: source, score, before the training, after it, with what each control
    shows, chance, number."""
    before = {(s["source"], s["metric"]): s["value"] for s in (earlier or {}).get("scores", [])}
    for score in stage.scores:
        under = (getattr(score, control) for control in CONTROLS)
        values = (score.value, *under, score.chance)
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        if earlier is not None:
            value = before.get((score.source, score.metric))
            numbers.insert(0, "" if value is None else f"{value:.3f}")
        # "all sources" is a stage's own.
        source = score.source if "/" in score.source else f"{stage.name}, {score.source}"
        yield [source, score.metric, *numbers, str(score.count)]


def _curves(stages: Sequence[Stage]) -> dict[str, str]:
    found: dict[str, str] = {}
    for stage in stages:
        panels = [replace(p, title=f"{stage.name}: {p.title}") for p in (PANELS[0], PANELS[3])]
        found |= panel_svgs(stage.rows, panels)
    return found


def _samples(stage: Stage) -> list[Sample]:
    """The first answered questions of each modality, with their pictures."""
    answered = {sample["key"]: sample for sample in stage.result.get("samples", [])}
    found = []
    for modality in MODALITIES:
        for item in stage.items(modality, EXAMPLES):
            if item.encoded.key in answered:
                own = answered[item.encoded.key]
                pictures = urls(item.encoded.frames[:, 0])
                found.append(Sample(pictures, own["asked"], own["wanted"], own["said"]))
    return found


def _narrated(out: Path, stage: Stage) -> Strip | None:
    """The strip of the clip that the streaming command has watched."""
    events = out / "narration.jsonl"
    if not events.exists():
        return None
    items = (i for i in stage.items("video", 50) if i.sample.messages[0].content == NARRATE)
    item = next(items)
    truth = sentences_of(item.sample.messages[1].content)
    return strip(item, {"what happens": truth, "the model says": spoken(events)})


def _streams(stage: Stage) -> list[Strip]:
    """The strips of the first held-out streams, as the evaluation played them."""
    timelines = {t["key"]: Timeline(**t) for t in stage.result["timelines"]}
    items = (i for i in stage.items("video", 20) if i.encoded.key in timelines and i.speech)
    found = []
    for item in islice(items, EXAMPLES):
        own = timelines[item.encoded.key]
        expected, lanes = list(own.wanted), dict[str, Sentences]()
        if item.options:
            second, answer = expected_answer(item)
            lanes["asked"] = [(second, item.sample.messages[-2].content)]
            expected.append((second, answer))
        found.append(strip(item, lanes | {"to be said": expected, "the model says": own.spoken}))
    return found


def strip(item: Item, lanes: Mapping[str, Sentences]) -> Strip:
    """The strip of a clip, with each lane's sentences under the second in which they begin."""
    frames = urls(item.encoded.frames[:, 0])
    cells = {
        name: [" ".join(w for s, w in sentences if s == second) for second in range(len(frames))]
        for name, sentences in lanes.items()
    }
    return Strip(item.encoded.key, frames, cells)


def urls(frames: Tensor) -> list[str]:
    """Frames `[F, 3, h, w]`, uint8, as `data:` URLs."""
    found = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG")
        found.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return found


if __name__ == "__main__":
    sys.exit(main())
