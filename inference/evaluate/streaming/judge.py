"""Asks a judge behind an OpenAI-compatible server; keeps replies by their requests' hash."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from data_pipeline.synthesis.config import EndpointConfig
from data_pipeline.synthesis.endpoint import Endpoint, EndpointError, RequestFailed
from data_pipeline.synthesis.prompts import Request
from data_pipeline.synthesis.store import Store
from inference.evaluate.streaming.items import NoJudge, Verdict
from inference.evaluate.streaming.templates import Templates

_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "match": {
        "type": "object",
        "properties": {
            "pred": {"enum": ["yes", "no"]},
            "score": {"type": "number", "minimum": 0, "maximum": 5},
        },
        "required": ["pred", "score"],
    },
    "coverage": {
        "type": "object",
        "properties": {"score": {"enum": [1, 2, 3]}},
        "required": ["score"],
    },
}


class JudgeFailed(Exception):
    """The judge's server does not answer, or not in the form that was asked for."""


class EndpointJudge:
    """Judges answers. Kind `match`: whether an answer is right, and how good it is, 0 to 5. Kind
    `coverage`: how much of the reference it covers, 0 to 2.

    May be called from many threads; the endpoint's `concurrency` limits requests at a time.
    """

    def __init__(self, config: EndpointConfig, templates: Templates, folder: Path) -> None:
        """`folder` gets replies.sqlite. Raises ShardError where another process works on it."""
        self._config, self._templates = config, templates
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._store: Store
        self._endpoint: Endpoint
        self._run(self._open(folder))
        self._sent: dict[str, asyncio.Task[Any]] = {}  # under way
        self._failed = ""  # why no request can succeed

    def __call__(self, kind: str, question: str, reference: str, answer: str) -> Verdict:
        """The verdict on an answer. Raises JudgeFailed."""
        reply = self._run(self._ask(self._request(kind, question, reference, answer)))
        if kind == "coverage":
            return Verdict(reply["score"] == 3, float(reply["score"] - 1))
        return Verdict(reply["pred"] == "yes", float(int(reply["score"])))

    async def _open(self, folder: Path) -> None:
        """Opens the database in the loop's thread: a connection of SQLite belongs to one thread."""
        self._store = Store(folder)
        self._endpoint = Endpoint(self._config, self._store.waste)

    async def _ask(self, request: Request) -> Any:
        stored = self._store.reply(request.key)
        if stored is not None:
            return stored
        if request.key not in self._sent:
            self._sent[request.key] = asyncio.ensure_future(self._send(request))
        try:
            return await asyncio.shield(self._sent[request.key])
        finally:
            self._sent.pop(request.key, None)

    async def _send(self, request: Request) -> Any:
        if self._failed:
            raise JudgeFailed(self._failed)
        try:
            reply, tokens = await self._endpoint.ask(request)
        except EndpointError as error:
            self._failed = f"the judge: {error}"
            raise JudgeFailed(self._failed) from None
        except RequestFailed as error:
            raise JudgeFailed(f"the judge: {error}") from None
        self._store.keep(request.key, request.kind, reply, tokens)
        return reply

    def _request(self, kind: str, question: str, reference: str, answer: str) -> Request:
        config, schema = self._config, _SCHEMAS[kind]
        system = self._templates("judge.system")
        text = self._templates(f"judge.{kind}", question, reference, answer)
        identity = [config.model, system, text, schema, config.temperature]
        key = hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()
        content = ({"type": "text", "text": text},)
        return Request(
            kind, config.url, config.model, system, content, schema, Draft202012Validator(schema),
            config.temperature, config.max_tokens, 0, key, len(text) // 4,
        )  # fmt: skip

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _close(self) -> None:
        await self._endpoint.close()
        self._store.close()

    def close(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def no_judge(kind: str, question: str, reference: str, answer: str) -> Verdict:
    """Stands for the judge where none is configured. Raises NoJudge."""
    raise NoJudge
