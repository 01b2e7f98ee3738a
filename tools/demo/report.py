"""python -m tools.demo.report runs/demo pt1 pt2 sft realtime_sft

The demo's report: one HTML file with the table of scores, losses and decision timelines.
"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from torch import Tensor

from data_pipeline.encode import SampleEncoder
from data_pipeline.tokens import load_tokenizer
from moss_train.config import from_dict
from moss_train.evaluate.items import Item, read_shards
from moss_train.evaluate.score import Score, Timeline
from moss_train.evaluate.suite import cells, table
from moss_train.train.data import encode_config
from moss_train.train.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
tr:nth-child(even) { background: #f3f3f3 }
img { max-width: 100% }
"""


def write_report(out: Path, stages: Sequence[str], seconds: Mapping[str, float]) -> Path:
    """Writes OUT/{losses,timeline-N}.png and OUT/report.html; returns the latter.

    Reads each stage's run folder `OUT/STAGE` with its metrics and evaluation.json.
    """
    results = {stage: json.loads((out / stage / "evaluation.json").read_text()) for stage in stages}
    pictures = [plot_losses(out, stages, out / "losses.png")]
    for stage in stages:
        pictures += _timelines(out / stage, results[stage], out)
    scores = [Score(**score) for stage in stages for score in results[stage]["scores"]]
    print(table(scores))
    body = "".join(
        f'<p><img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></p>'
        for path in pictures
    )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    report = out / "report.html"
    report.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>moss_train: demo</title>"
        f"<style>{_STYLE}</style><h1>Four stages on the toy world</h1>"
        "<p>Held-out worlds. <b>Blind</b> is the same model without its frames, <b>chance</b> "
        "draws from a question's possible answers, says the most frequent token always, or speaks "
        f"as often as the data do.</p>{_html_table(scores)}{body}"
        f"<p>{html.escape(times)}; {sum(seconds.values()) / 60:.1f} minutes in all.</p></html>\n"
    )
    return report


def _html_table(scores: Sequence[Score]) -> str:
    head = "".join(f"<th>{name}" for name in ("source", "score", "model", "blind", "chance", "of"))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells(score)) for score in scores
    )
    return f"<table><tr>{head}{rows}</table>"


def plot_losses(out: Path, stages: Sequence[str], path: Path) -> Path:
    """The loss of all stages over the steps, one after the other."""
    figure, axis = plt.subplots(figsize=(11, 3.2), layout="constrained")
    start = 0
    for stage in stages:
        rows = read_metrics(out / stage)
        steps, losses = [start + row["step"] for row in rows], [row["loss"] for row in rows]
        axis.plot(steps, losses, alpha=0.25, color=f"C{stages.index(stage)}")
        axis.plot(steps, _smooth(losses), label=stage, color=f"C{stages.index(stage)}")
        start += rows[-1]["step"] if rows else 0
        axis.axvline(start, color="0.8", linewidth=0.8)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    return _save(figure, path)


def _smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    mean, smoothed = values[0] if values else 0.0, []
    for value in values:
        mean += share * (value - mean)
        smoothed.append(mean)
    return smoothed


def _timelines(run: Path, result: Mapping[str, Any], out: Path) -> list[Path]:
    """Pictures of a narration and of a stream that is asked, where there are such."""
    timelines = {t["key"]: Timeline(**t) for t in result["timelines"]}
    if not timelines:
        return []
    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    encoder = SampleEncoder(encode_config(config), load_tokenizer(config.data.tokenizer))
    source = next(iter(timelines)).rpartition("/")[0]
    folder = Path(config.data.root) / config.stage.name / "heldout/video"
    chosen: dict[bool, Item] = {}
    for item in read_shards(folder, source, encoder, limit=20):
        if item.encoded.key in timelines and len(item.speech) > 1 - bool(item.options):
            chosen.setdefault(bool(item.options), item)
    return [
        plot_timeline(item, timelines[item.encoded.key], out / f"timeline-{number}.png")
        for number, item in enumerate(chosen.values(), 1)
    ]


def plot_timeline(item: Item, timeline: Timeline, path: Path) -> Path:
    """A clip's frames second by second, over what was to be said and what was said."""
    frames = item.encoded.frames[:, 0]
    figure, axes = plt.subplots(
        2, 1, figsize=(1.1 * len(frames) + 1, 3.6), height_ratios=(1, 1.6), layout="constrained"
    )
    axes[0].imshow(contact_sheet(frames), aspect="equal")
    axes[0].set(xticks=[], yticks=[], title=_title(item))
    lanes = (("to be said", timeline.wanted, "0.5"), ("said", timeline.spoken, "C0"))
    for lane, (name, sentences, colour) in enumerate(lanes):
        for number, (second, text) in enumerate(sentences):
            axes[1].axvspan(
                second, second + 1, 1 - (lane + 1) / 2, 1 - lane / 2, color=colour, alpha=0.35
            )
            height = 1.85 - lane - 0.28 * (number % 3)
            axes[1].text(second + 0.05, height, text, va="top", fontsize=8)
        axes[1].text(-0.1, 1.5 - lane, name, ha="right", va="center")
    axes[1].set(
        xlim=(0, len(frames)), ylim=(0, 2), yticks=[], xticks=range(len(frames)), xlabel="second"
    )
    axes[1].axhline(1, color="0.7", linewidth=0.8)
    return _save(figure, path)


def _title(item: Item) -> str:
    asked = [message.content for message in item.sample.messages if message.role == "user"]
    frames = [m.content.count("<|video|>") for m in item.sample.messages if m.role == "assistant"]
    when = f" (asked after second {frames[0] - 1})" if item.options else ""
    return f"{item.encoded.key}: {asked[-1]}{when}"


def contact_sheet(frames: Tensor) -> Any:
    """Frames `[F, 3, h, w]` in a row, a dark line between them: `[h, F x (w + 1), 3]`."""
    padded = frames.new_zeros(*frames.shape[:3], frames.shape[3] + 1)
    padded[..., :-1] = frames
    return padded.permute(2, 0, 3, 1).flatten(1, 2).numpy()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    out, *stages = sys.argv[1:]
    times = json.loads((Path(out) / "times.json").read_text())
    report = write_report(Path(out), stages, times)
    print(f"{report} ({sum(times.values()) / 60:.1f} minutes in all)")
