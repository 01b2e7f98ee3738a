"""Runs lmms-eval; keeps each answer when it comes, and leaves failures out of its scores.

    LMMS_PYTHON inference/evaluate/harness/lmms_runner.py SETTINGS.json LMMS_EVAL_ARGUMENTS...

The interpreter of lmms-eval's environment runs this file, so it imports nothing of ours. It changes
lmms-eval (`benchmarks.LMMS_VERSION`) in these places:

- an answer is written to a journal when it comes, and read from there by a later run;
- a video is named as a proper `file:` URL, with the frames that the run is to show;
- an item whose media are missing, which would end the process, and one whose request failed, which
  would count as a wrong answer, have no score. Their answers in the samples begin with a mark;
- an answer that its task wants to ask a judge about, where the user has given no key for one, has
  no score: it would count as wrong, once the task has asked in vain;
- the score of each answer is kept where a task keeps only how the model answered.

SETTINGS.json: `journal`, `media` (files that this writes), `fps`, `max_frames`, `max_tokens`,
`key_env` (the environment variable of the server's key).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

_PR_SET_PDEATHSIG = 1  # of prctl(2)
FAILED, SKIPPED = "[LMMS_EVAL_REQUEST_FAILED", "[MOSS_SKIPPED]"
LEFT_OUT = "moss_left_out"  # field of a sample that has no score: why
NO_JUDGE, NO_KEY = "no judge", "none"
_scoring = threading.local()  # `now`: whether this thread scores an answer


class Journal:
    """Answers by the hash of their requests, in a file of JSON lines. A line that a kill has cut
    off is ignored."""

    def __init__(self, path: str) -> None:
        self.path, self.known = path, dict[str, list[Any]]()
        self._lock = threading.Lock()
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8") as file:
            text = file.read()
        for line in text.split("\n"):
            try:
                key, *answer = json.loads(line)
                self.known[key] = answer
            except (ValueError, TypeError):
                continue
        if text and not text.endswith("\n"):
            self._write("")

    def add(self, key: str, answer: list[Any]) -> None:
        self.known[key] = answer
        self._write(json.dumps([key, *answer]))

    def _write(self, line: str) -> None:
        with self._lock, open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class Completions:
    """Replaces the client's `chat.completions`: sets this project's options, and takes an answer
    that has come before from the journal."""

    def __init__(self, inner: Any, settings: dict[str, Any]) -> None:
        self._inner, self._settings = inner, settings
        self._journal = Journal(settings["journal"])

    def create(self, **request: Any) -> Any:
        frames = {"fps": self._settings["fps"], "max_frames": self._settings["max_frames"]}
        request["extra_body"] = {"media_io_kwargs": {"video": frames}}
        request["max_tokens"] = min(request["max_tokens"], self._settings["max_tokens"])
        stamps = []
        for part in (part for message in request["messages"] for part in message["content"]):
            if part["type"] == "video_url":
                url = part["video_url"]["url"] = file_url(part["video_url"]["url"])
                stamps += stamp(url)
        words = "\n".join([json.dumps(request, sort_keys=True), *stamps])
        key = hashlib.sha256(words.encode()).hexdigest()
        if key not in self._journal.known:
            reply = self._inner.create(**request)
            used = reply.usage
            counts = [used.prompt_tokens, used.completion_tokens] if used else [0, 0]
            self._journal.add(key, [reply.choices[0].message.content, *counts])
        text, prompt_tokens, completion_tokens = self._journal.known[key]
        usage = SimpleNamespace(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        message = SimpleNamespace(content=text)
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)


def file_url(url: str) -> str:
    """Quotes the path of a `file:` URL, which lmms-eval leaves as it is; other URLs unchanged."""
    return Path(url[7:]).as_uri() if url.startswith("file:///") else url


def stamp(url: str) -> list[str]:
    """Size and time of change of a `file:` URL's file: another video of its name is asked about
    anew. Of other URLs, and of files that are not here, nothing."""
    path = unquote(urlsplit(url).path)
    if not url.startswith("file:///") or not os.path.exists(path):
        return []
    found = os.stat(path)
    return [f"{found.st_size} {found.st_mtime_ns}"]


def missing(messages: list[dict[str, Any]]) -> list[str]:
    """Paths of a question's videos that do not exist."""
    return [path for path in videos(messages) if not os.path.exists(path)]


def videos(messages: list[dict[str, Any]]) -> list[str]:
    """Paths of a question's videos."""
    parts = [part for message in messages for part in message["content"]]
    urls = [str(part["url"]) for part in parts if part["type"] == "video"]
    return [
        unquote(urlsplit(u).path) if u.startswith("file://") else u
        for u in urls
        if "://" not in u[5:]
    ]


def pictures(messages: list[dict[str, Any]]) -> list[str]:
    """Digests of a question's pictures: questions about the same ones belong together."""
    parts = [part for message in messages for part in message["content"]]
    found = [part["url"] for part in parts if part["type"] == "image"]
    return [
        hashlib.blake2b(one.tobytes(), digest_size=8).hexdigest()
        for one in found
        if hasattr(one, "tobytes")
    ]


def keep_answers(chat: Any, settings: dict[str, Any]) -> None:
    """Makes lmms-eval's chat class use the journal, and skip questions whose media are missing."""
    generate = chat.generate_until

    def generate_until(self: Any, requests: list[Any]) -> list[Any]:
        if not isinstance(self.client.chat, SimpleNamespace):
            key = os.environ.get(settings["key_env"]) or NO_KEY
            made = Completions(self.client.copy(api_key=key).chat.completions, settings)
            self.client = SimpleNamespace(chat=SimpleNamespace(completions=made))
        answers: dict[int, Any] = {}
        media: dict[str, dict[str, list[str]]] = {"videos": {}, "pictures": {}}
        for number, request in enumerate(requests):
            _, to_messages, _, doc_id, task, split = request.args
            try:
                messages = to_messages(self.task_dict[task][split][doc_id])
                gone = missing(messages)
                media["videos"][str(doc_id)] = videos(messages)
                media["pictures"][str(doc_id)] = pictures(messages)
            except (SystemExit, Exception) as error:  # tasks end the process over a missing file
                gone = [f"{type(error).__name__}: {error}"]
            if gone:
                answers[number] = f"{SKIPPED} no media: {', '.join(gone)}"
        with open(settings["media"], "w", encoding="utf-8") as file:
            json.dump(media, file)
        left = [n for n in range(len(requests)) if n not in answers]
        generated = generate(self, [requests[n] for n in left])
        answers.update(zip(left, generated, strict=True))
        return [answers[n] for n in range(len(requests))]

    chat.generate_until = generate_until


class Unscored:
    """A task whose items get no score."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def process_results(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


class NoJudge(BaseException):
    """A task asks a judge, and there is none. No Exception: tasks catch these, ask again, and at
    last count the answer as wrong."""


def refuse_judges() -> None:
    """Makes scoring an answer raise NoJudge where it asks a server, if no key of one is given."""
    given = os.environ.get("OPENAI_API_KEY", NO_KEY) != NO_KEY
    if given or {"API_TYPE", "OPENAI_API_URL"} & set(os.environ):
        return
    import requests
    from openai.resources.chat.completions import AsyncCompletions
    from openai.resources.chat.completions import Completions as SyncCompletions

    def refusing(ask: Any) -> Any:
        def asked(*values: Any, **named: Any) -> Any:
            if getattr(_scoring, "now", False):
                raise NoJudge
            return ask(*values, **named)

        return asked

    for owner, name in ((requests, "post"), (SyncCompletions, "create"),
                        (AsyncCompletions, "create")):  # fmt: skip
        setattr(owner, name, refusing(getattr(owner, name)))


def keep_score(task: str, metrics: dict[str, Any]) -> None:
    """Adds `score` to what a task keeps for an answer, by the task's own reading of it, where the
    task itself counts only at the end."""
    if task in ("mmbench_en_dev_static", "mmbench_cn_dev_static"):
        import pandas
        from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator as evaluator

        kept = metrics["gpt_eval_score"]
        answers, table = {kept["index"]: kept["answer"]}, pandas.DataFrame([kept])
        kept["score"] = evaluator.eval_sub_data(table, answers, static_only=True)
    elif task == "mmmu_val":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        metrics["mmmu_acc"]["score"] = evaluate_mmmu([metrics["mmmu_acc"]])[1]["acc"]


def score_answers(evaluator: Any) -> None:
    """Makes lmms-eval score only items that were answered, and that it can judge."""
    process = evaluator._process_document_results

    def process_document_results(item: Any, *, task: Any, **more: Any) -> Any:
        texts = [getattr(resp, "text", resp) for request in item[2] for resp in request.resps]
        if any(str(text).startswith((FAILED, SKIPPED)) for text in texts):
            return process(item, task=Unscored(task), **more)
        # Some tasks draw an option where they find none in the answer: the same in each run.
        random.seed(f"{task.config.task} {item[0]}")
        _scoring.now = True
        try:
            done = process(item, task=task, **more)
        except NoJudge:
            done = process(item, task=Unscored(task), **more)
            done.logged_sample[LEFT_OUT] = NO_JUDGE
            return done
        finally:
            _scoring.now = False
        keep_score(task.config.task, done.metrics)
        return done

    evaluator._process_document_results = process_document_results


def end_with_parent() -> None:
    """Ends this process when its parent ends, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Changes lmms-eval, then runs its command."""
    end_with_parent()
    settings = json.loads(Path(sys.argv.pop(1)).read_text())
    from lmms_eval import evaluator
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models.chat.openai import OpenAICompatible

    keep_answers(OpenAICompatible, settings)
    refuse_judges()
    score_answers(evaluator)
    cli_evaluate()


if __name__ == "__main__":
    main()
