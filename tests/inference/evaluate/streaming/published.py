"""Small benchmarks in the forms that are published, and what is true in them.

All are about one video of 31 s, whose frame of second s has brightness 8 s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inference.evaluate.streaming.items import Item
from tests.samples import graded_video

SECONDS = 31
LETTERS = "ABCD"
OPTIONS = ["a red cup", "a blue cup", "a plate", "nothing"]
CHOICE_TASKS = ("EPM", "ASI", "HLD", "OCR", "ACR", "ATR", "STU", "FPD", "OJR")
STEPS = ["pull up the hair", "put on the extensions", "comb"]
STEP_SPANS = [(3, 6), (8, 12), (15, 20)]
DONE_AT = [5, 9, 14]  # an action of OVO-Bench's REC
CLUE = 12
ALERT = (10.0, 14.0)


def write_ovobench(folder: Path) -> Path:
    """Two items of each task with options (right: A and C), one of REC, SSR, CRR."""
    entries: list[dict[str, Any]] = []
    for task in CHOICE_TASKS:
        for right in (0, 2):
            entries.append({
                "id": len(entries), "task": task, "video": "COIN/a.mp4",
                "realtime": 7 + right * 0.7, "question": "What is there?",
                "answer": OPTIONS[right], "options": OPTIONS, "gt": right,
            })  # fmt: skip
    counts = [(4, 0), (5, 1), (10, 2), (15, 3), (20, 3)]
    entries.append({
        "id": 100, "task": "REC", "video": "COIN/a.mp4", "activity": "jump",
        "start_times": [4, 8, 13], "end_times": DONE_AT,
        "test_info": [{"realtime": t, "count": n} for t, n in counts],
    })  # fmt: skip
    steps = [(4, 0, 1), (6, 0, 1), (5, 1, 0), (9, 1, 1), (14, 2, 0), (16, 2, 1), (20, 2, 1)]
    entries.append({
        "id": 101, "task": "SSR", "video": "COIN/a.mp4", "tutorial": "Hair", "all_steps": STEPS,
        "start_time": [s for s, _ in STEP_SPANS], "end_time": [e for _, e in STEP_SPANS],
        "test_info": [{"realtime": t, "step": STEPS[i], "type": kind} for t, i, kind in steps],
    })  # fmt: skip
    asked = [(5, 0), (9, 0), (13, 1), (20, 1)]
    entries.append({
        "id": 102, "task": "CRR", "video": "COIN/a.mp4", "question": "What does she do?",
        "answer": "She leaves.", "ask_time": 5, "clue_time": CLUE,
        "test_info": [{"realtime": t, "type": kind} for t, kind in asked],
    })  # fmt: skip
    _video(folder / "COIN" / "a.mp4")
    return _write(folder / "ovo_bench_new.json", entries)


def write_streamingbench(folder: Path) -> Path:
    """real: C, A; omni: B; sqa: A, C, B; proactive: `3` at 12, asked at 5; `goal` at 21, at 20."""

    def entry(*questions: dict[str, Any]) -> dict[str, Any]:
        return {
            "time": "[0:00:00 - 0:00:31]", "questions": list(questions), "video_categories": "x",
            "video_path": "./videos/sample_1_real.mp4",
        }  # fmt: skip

    def ask(kind: str, second: int, right: str, lettered: bool = True) -> dict[str, Any]:
        options = [f"{letter}. {o}" for letter, o in zip(LETTERS, OPTIONS, strict=True)]
        return {
            "task_type": kind, "question": f"What is there at {second}?", "answer": right,
            "time_stamp": f"00:00:{second:02d}", "options": options if lettered else OPTIONS,
        }  # fmt: skip

    def alert(second: int, right: int, output: str) -> dict[str, Any]:
        return {
            "task_type": "Proactive Output", "question": f'When it is so, output "{output}".',
            "time_stamp": f"00:00:{second:02d}", "ground_truth_time_stamp": f"00:00:{right}",
            "ground_truth_output": output, "required_ability": "working memory",
        }  # fmt: skip

    files: dict[str, list[Any]] = {
        "real": [entry(ask("Counting", 6, "C")), entry(ask("Counting", 9, "A"))],
        "omni": [entry(ask("Scene Understanding", 8, "B"))],
        "sqa": [[entry(ask("Sequential Question Answering", s, right, lettered=False))
                 for s, right in ((6, "A"), (12, "C"), (20, "B"))]],
        "proactive": [entry(alert(5, 12, "3")), entry(alert(20, 21, "goal"))],
    }  # fmt: skip
    for name, entries in files.items():
        _write(folder / f"questions_{name}.json", entries)
    _video(folder / "sample_1_real.mp4")
    return folder


def write_omnimmi(folder: Path) -> Path:
    """One item of AP, SI, SG, MD (of two turns), two of PA and PT."""
    turns = [
        {"question": "What is cooked?", "answer": "eggs", "timestamp": "0.0 -- 8.0"},
        {"question": "What comes after ##ANSWER##?", "answer": "salt", "timestamp": "8.0 -- 16.5"},
    ]
    talk = [{"human": "Is that so?"}, {"assistant": "It is."}, {"human": "Well, well."}]
    files: dict[str, list[dict[str, Any]]] = {
        "action_prediction": [{
            "video": "a.mp4", "question": "What comes next?", "answer": "stir",
            "vocab": ["stir", "cut"],
        }],
        "speaker_identification": [{
            "video": "a.mp4", "question": "Who speaks?", "answer": "the cook", "timestamp": 8,
        }],
        "dynamic_state_grounding": [{"video": "a.mp4", "qa": turns}],
        "multiturn_dependency_reasoning": [{"video": "a.mp4", "qa": turns}],
        "proactive_alerting": 2 * [{
            "video": "a.mp4", "question": "Tell me when the door opens.", "answer": list(ALERT),
        }],
        "proactive_turntaking": 2 * [{"video": "a.mp4", "conversation": talk}],
    }  # fmt: skip
    for name, entries in files.items():
        _write(folder / f"{name}.json", entries)
    _video(folder / "videos" / "a.mp4")
    return folder


def write_proactivevideoqa(folder: Path) -> Path:
    """A question with answers due in 10 to 14 and in 20 to 24."""
    answers = [
        {"content": "the door opens", "related_timespan": [10, 12], "reply_timespan": [10, 14]},
        {"content": "a dog comes in", "related_timespan": [20, 22], "reply_timespan": [20, 24]},
    ]
    entries = [{
        "video": "a.mp4", "question_id": "ego_1", "duration": 31.0, "answer": answers,
        "conversation": [{"role": "user", "content": "What happens at the door?", "time": 0}],
    }]  # fmt: skip
    _video(folder / "EGO" / "videos" / "a.mp4")
    _write(folder / "EGO" / "anno.json", entries)
    return folder


def write_events(folder: Path) -> Path:
    """Three events, and a question in the middle."""
    entries = [{
        "video": "a.mp4", "question": "Tell me what happens.",
        "events": [{"second": 4, "says": ["the door opens", "a door opens"]},
                   {"second": 12, "says": ["a dog comes in"]},
                   {"second": 20, "says": ["the light goes out"]}],
        "interruptions": [{"second": 16, "text": "What colour is the dog?", "says": ["brown"]}],
    }]  # fmt: skip
    _video(folder / "a.mp4")
    return _write(folder / "events.json", entries)


WRITERS = {
    "ovobench": write_ovobench, "streamingbench": write_streamingbench, "omnimmi": write_omnimmi,
    "proactivevideoqa": write_proactivevideoqa, "events": write_events,
}  # fmt: skip


def script(item: Item) -> list[tuple[float, str]]:
    """(second, text): what is to be said in push mode, and when."""
    truth, kind = item.truth, item.row.split()[0]
    task = truth.get("task")
    if kind == "ovobench" and task in CHOICE_TASKS:
        return [(item.prompts[0].second, f"{truth['answer']}.")]
    if task == "REC":
        return [(float(second), f"That is {n + 1}.") for n, second in enumerate(DONE_AT)]
    if task == "SSR":
        return [(float(s), step) for step, (s, _) in zip(STEPS, STEP_SPANS, strict=True)]
    if task == "CRR":
        return [(float(CLUE), "She leaves.")]
    if task == "PA":
        return [(ALERT[0], "It opens."), (ALERT[1], "It is open.")]
    if task == "PT":
        return []
    if "output" in truth:
        return [(truth["right"], f"It is {truth['output']}.")]
    if "questions" in truth:
        return [(question["second"], f"({question['answer']})") for question in truth["questions"]]
    if "turns" in truth:
        seconds = [ask.second if ask.second >= 0 else SECONDS + ask.second for ask in item.prompts]
        answers = [turn["answer"] for turn in truth["turns"]]
        return list(zip(seconds, answers, strict=True))
    if "answers" in truth:
        return [(answer["span"][0], answer["text"]) for answer in truth["answers"]]
    if "events" in truth:
        told = [*truth["events"], *truth["interruptions"]]
        return sorted((event["second"], event["says"][0]) for event in told)
    raise AssertionError(item.row)


def perceived(item: Item, question: str, at: float) -> str:
    """What is right to answer about a clip, by the official protocols, at second `at`."""
    truth, kind = item.truth, item.row.split()[0]
    task = truth.get("task")
    if kind == "ovobench" and task in CHOICE_TASKS:
        return str(truth["answer"])
    if task == "REC":
        return f"{sum(second <= at for second in DONE_AT)} times"
    if task == "SSR":
        step = next(i for i, step in enumerate(STEPS) if step in question)
        return "Yes" if STEP_SPANS[step][0] <= at <= STEP_SPANS[step][1] else "No"
    if task == "CRR":
        return "Yes" if at >= CLUE else "No"
    if task == "PT":
        return ""
    if "output" in truth:
        if "right time" not in question:
            return f"It is {truth['output']}."
        return "Yes." if at >= truth["right"] else "no"
    if "questions" in truth:
        own = [q for q in truth["questions"] if q["question"] in question]
        return str(own[-1]["answer"])
    if task in ("SG", "MD"):
        return "salt" if "after" in question else "eggs"
    return str(truth["turns"][0]["answer"])


def _video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    graded_video(path, [float(second) for second in range(SECONDS)])


def _write(path: Path, entries: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path
