"""`/v1/chat/completions` through OpenAI's own client."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from data_pipeline.images import decode_image
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.processing_moss_video import MossVideoProcessor
from inference.serve import answers
from inference.serve.limits import Limits
from tests.inference.serve.openai_client import openai_client
from tests.inference.serve.serving import Running, data_url, jpeg, serving, standing_still
from tests.samples import graded_video
from tests.waiting import PATIENCE, until

LIMITS = Limits(body_bytes=10**6, pixels=10**6, prompt_chars=500, frames=12, max_tokens=400)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=1024, max_sessions=2)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, LIMITS, stage="sft") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    yield from openai_client(server)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    graded_video(path, [i / 3 for i in range(30)])  # ten seconds
    return path


def with_media(text: str, *parts: tuple[str, str]) -> list[dict[str, Any]]:
    media = [{"type": kind, kind: {"url": url}} for kind, url in parts]
    system = {"role": "system", "content": "Be brief."}
    return [system, {"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    settings = {"model": "moss-video", "max_tokens": 8, **options}
    return client.chat.completions.create(messages=messages, **settings)


def test_an_answer_is_what_transformers_generates(
    client: openai.OpenAI, tiny: Path, clip: Path
) -> None:
    """A picture and a video in one question, prepared by the exported processor."""
    picture = jpeg(5)
    url = data_url(clip.read_bytes(), "video/mp4")
    messages = with_media(
        "What is it?", ("image_url", data_url(picture, "image/jpeg")), ("video_url", url)
    )
    answer = ask(client, messages)
    model = MossVideoForConditionalGeneration.from_pretrained(tiny).eval()
    processor = MossVideoProcessor.from_pretrained(tiny)
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is it?"}]
    turns = [messages[0], {"role": "user", "content": parts}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    image = decode_image(picture).permute(1, 2, 0).numpy()
    inputs = processor(text=text, images=[image], videos=[str(clip)], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    length = inputs["input_ids"].shape[1]
    expected = processor.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
    assert answer.choices[0].message.content == expected != ""
    assert answer.usage.prompt_tokens == length
    assert inputs["pixel_values"].shape[1] == 1 + 10
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 8)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client, with_media("What is it?"), max_tokens=12)
    pieces = list(
        ask(
            client, with_media("What is it?"), max_tokens=12,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])
    choices = [piece.choices[0] for piece in pieces[:-1]]
    said = "".join(choice.delta.content or "" for choice in choices)
    assert said == whole.choices[0].message.content
    assert choices[-1].finish_reason == "length"
    assert len([c for c in choices if c.delta.content]) > 3
    assert len({piece.id for piece in pieces}) == 1


def test_a_streams_pieces_have_the_counts_so_far(
    client: openai.OpenAI, server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = engine.step

    def after_the_server(steps: Any) -> Any:
        """A step, when the server has read what the last one said: it may stand still meanwhile."""
        for _ in range(10):
            server.between_turns(lambda: None)
        return step(steps)

    monkeypatch.setattr(engine, "step", after_the_server)
    options: dict[str, Any] = {"max_tokens": 12, "n": 2, "temperature": 1.0, "seed": 3}
    whole = ask(client, with_media("What is it?"), **options).usage
    both = {"include_usage": True, "continuous_usage_stats": True}
    for asked in (both, {"continuous_usage_stats": True}):
        stream = ask(
            client, with_media("What is it?"), **options, stream=True, stream_options=asked
        )
        usages = [piece.usage for piece in stream]
        assert {usage.prompt_tokens for usage in usages} == {whole.prompt_tokens}
        counts = [usage.completion_tokens for usage in usages]
        assert (counts[0], counts[-1]) == (0, whole.completion_tokens)
        assert counts == sorted(counts)
        assert len(set(counts)) > 3


def test_a_stream_reaches_its_client_through_proxies(
    client: openai.OpenAI, server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not held back, nor ended while nothing is said for long."""
    monkeypatch.setattr(answers, "QUIET", 0.05)
    whole = ask(client, with_media("What?"), max_tokens=6)
    body = {"messages": with_media("What?"), "max_tokens": 6, "stream": True}
    url, lines, said = f"{server.http}/v1/chat/completions", list[str](), ""
    with contextlib.ExitStack() as opened:
        with standing_still(engine):
            asked = httpx.stream("POST", url, json=body, timeout=PATIENCE)
            streamed = opened.enter_context(asked)
            pieces = streamed.iter_lines()
            while lines.count(":") < 3:
                lines.append(next(pieces))
        lines += pieces
    assert streamed.headers["X-Accel-Buffering"] == "no"
    assert streamed.headers["Cache-Control"] == "no-cache"
    for line in lines:
        if line.startswith("data: {"):
            said += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get(
                "content", ""
            )
    assert said == whole.choices[0].message.content


def test_sampling_follows_its_seed(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = ask(client, with_media("What?"), temperature=1.5, seed=seed, top_p=0.9)
        return answer.choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_stop_texts_cut_the_answer(client: openai.OpenAI) -> None:
    whole = ask(client, with_media("What is it?"), max_tokens=40).choices[0].message.content
    stop = whole[10:13]
    cut = ask(client, with_media("What is it?"), max_tokens=40, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


WRONG: list[tuple[dict[str, Any], str, int]] = [
    ({"messages": []}, "messages", 400),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", 400),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", 400),
    ({"messages": with_media("x", ("image_url", "/etc/passwd"))}, "image_url", 400),
    ({"messages": with_media("x", ("image_url", "file:///etc/passwd"))}, "image_url", 400),
    ({"messages": with_media("x", ("video_url", "http://127.0.0.1/x.mp4"))}, "video_url", 400),
    ({"messages": with_media("x" * 501)}, "messages[1]", 413),
    ({"messages": with_media("x", ("image_url", "data:image/png;base64,eHh4"))}, "messages", 400),
    ({"messages": with_media("x", ("video_url", "data:video/mp4;base64,eHh4"))}, "messages", 400),
    ({"messages": with_media("x"), "max_tokens": 401}, "max_tokens", 400),
    ({"messages": with_media("x"), "temperature": "hot"}, "temperature", 400),
    ({"messages": with_media("x"), "n": 3}, "n", 400),
    ({"messages": with_media("x"), "tools": [{"type": "function"}]}, "tools[0].function", 400),
    ({"messages": with_media("x"), "stop": [3]}, "stop", 400),
]


def test_wrong_requests_are_refused_by_name(server: Running) -> None:
    url = f"{server.http}/v1/chat/completions"
    with httpx.Client(timeout=PATIENCE) as http:
        for body, field, status in WRONG:
            answer = http.post(url, json=body)
            error = answer.json()["error"]
            assert answer.status_code == status, body
            assert field in f"{error['param']}", error
            assert "Traceback" not in error["message"]
        json = {"Content-Type": "application/json"}
        assert http.post(url, content=b"{", headers=json).status_code == 400
        assert http.post(url, content=b" " * (10**6 + 1), headers=json).status_code == 413
    server.wait(0)


def test_large_media_are_refused(client: openai.OpenAI, tmp_path: Path) -> None:
    wide = tmp_path / "wide.mp4"
    graded_video(wide, [0.0, 0.2], size=(1600, 800))
    for kind, data, words in (
        ("image_url", data_url(jpeg(0, (1200, 900)), "image/jpeg"), "1200 x 900 pixels"),
        ("video_url", data_url(wide.read_bytes(), "video/mp4"), "1600 x 800 pixels"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, with_media("x", (kind, data)))
    pictures = [("image_url", data_url(jpeg(i), "image/jpeg")) for i in range(13)]
    with pytest.raises(openai.APIStatusError, match="more than 12 frames"):
        ask(client, with_media("x", *pictures))


def test_more_requests_than_places_wait_for_each_other(client: openai.OpenAI) -> None:
    answers: list[str] = []

    def one(number: int) -> None:
        text = f"What is number {number % 2}?"
        answers.append(text + ask(client, with_media(text)).choices[0].message.content)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 2


def test_a_client_that_leaves_frees_its_place(server: Running, engine: Engine) -> None:
    body = {"messages": with_media("x"), "max_tokens": 400, "stream": True}
    url = f"{server.http}/v1/chat/completions"
    with standing_still(engine, steps=10):
        with (
            httpx.Client(timeout=PATIENCE) as http,
            http.stream("POST", url, json=body) as answer,
        ):
            next(answer.iter_lines())
            assert server.hub.runner.sessions == 1
            (running,) = server.hub.runner._running
        until(lambda: running.closing)
    server.wait(0)
    assert running.task.stats.counts["tokens"] <= 11  # of the 311 that it would say


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["moss-video"]
    assert client.models.retrieve("moss-video").id == "moss-video"


def test_errors_are_those_of_openais_client(client: openai.OpenAI) -> None:
    """Its exceptions, with code and field, also where an answer would be a stream."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as unknown:
            ask(client, with_media("x"), model="gpt-4o", stream=stream)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as long:
            ask(client, with_media("word " * 90) * 3, stream=stream)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.BadRequestError) as value:
            ask(client, with_media("x"), temperature=-1, stream=stream)
        assert (value.value.code, value.value.param) == ("invalid_value", "temperature")
    with pytest.raises(openai.NotFoundError) as retrieved:
        client.models.retrieve("gpt-4o")
    assert retrieved.value.code == "model_not_found"
