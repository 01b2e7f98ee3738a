"""What a chat request gives is done, taken or refused by its name: through a real socket."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_pipeline.schema import Message
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.limits import Limits
from inference.serve.messages import ImageAppend
from inference.serve.protocol import parse, read_image
from tests.inference.serve.serving import Running, data_url, jpeg, serving
from tests.samples import graded_video
from tests.waiting import PATIENCE

LIMITS = Limits(body_bytes=10**6, prompt_chars=500, frames=30, max_tokens=400)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=32, max_tokens=1024, max_sessions=2)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, LIMITS, stage="sft") as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.http}/v1/", timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a clip of 12 s."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    graded_video(path, [i / 2.5 for i in range(30)])
    return data_url(path.read_bytes(), "video/mp4")


USER = {"role": "user", "content": "A"}


def ask(http: httpx.Client, messages: Any = None, **fields: Any) -> httpx.Response:
    body = {"messages": messages or [USER], "max_tokens": 4, **fields}
    return http.post("chat/completions", json=body)


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def refused(answer: httpx.Response) -> str:
    """The field that the error names."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(f"{error['param']}: ")
    return str(error["param"])


def shown(http: httpx.Client, url: dict[str, Any], **fields: Any) -> httpx.Response:
    part = {"type": "video_url", "video_url": url, **fields.pop("part", {})}
    text = {"type": "text", "text": "what"}
    return ask(http, [{"role": "user", "content": [part, text]}], **fields)


def frames(http: httpx.Client, url: dict[str, Any], **fields: Any) -> int:
    """How many frames the model is shown, by the tokens of the prompt."""
    answer, none = shown(http, url, **fields), ask(http, [{"role": "user", "content": "what"}])
    assert answer.status_code == 200, answer.text
    counts = [a.json()["usage"]["prompt_tokens"] for a in (answer, none)]
    return int(counts[0] - counts[1])


# Histories


ANSWERS: list[Any] = [
    {"role": "assistant", "content": None},
    {"role": "assistant"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": []},
    {"role": "assistant", "content": [{"type": "text", "text": None}]},
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "audio": None,
     "function_call": None, "annotations": []},
    {"role": "assistant", "content": "", "tool_calls": []},
]  # fmt: skip


def test_answers_without_a_word_are_empty_turns(http: httpx.Client) -> None:
    answers = [ask(http, [USER, answer, USER]) for answer in ANSWERS]
    assert len({(said(a), a.json()["usage"]["prompt_tokens"]) for a in answers}) == 1


def test_a_refusal_in_the_history_is_what_was_said(http: httpx.Client) -> None:
    words = [
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    assert len({said(ask(http, [USER, answer, USER])) for answer in words}) == 1


def test_an_empty_answer_at_the_end_is_left_out(http: httpx.Client) -> None:
    plain = ask(http).json()
    empty, absent = {"role": "assistant", "content": ""}, {"role": "assistant"}
    for answers in ([empty], [absent], [empty, absent]):
        assert ask(http, [USER, *answers]).json()["usage"] == plain["usage"]


def test_an_answer_is_continued(http: httpx.Client, server: Running) -> None:
    """The prompt is the one before the answer, and what the answer has so far."""
    begun = "The man is"
    options = {"continue_final_message": True, "add_generation_prompt": False}
    rest = ask(http, [USER, {"role": "assistant", "content": begun}], **options)
    vocabulary = server.hub.runner.vocabulary
    tokens = vocabulary.prompts.question([Message("user", "A")], [], "chat").tokens
    tokens += vocabulary.tokenizer.encode(begun, add_special_tokens=False).ids
    with server.hub.runner.answer(tokens, max_new_tokens=4) as answer:
        (wanted,) = [e.data["text"] for e in answer.events() if e.type == "response.done"]
    assert said(rest) == wanted != ""
    assert rest.json()["usage"]["prompt_tokens"] == len(tokens)
    assert refused(ask(http, [USER, {"role": "assistant", "content": begun}])) == "messages"
    assert refused(ask(http, continue_final_message=True)) == "continue_final_message"
    assert refused(ask(http, add_generation_prompt=False)) == "add_generation_prompt"
    empty = [USER, {"role": "assistant", "content": ""}]
    assert said(ask(http, empty, continue_final_message=True)) == said(ask(http))


def test_histories_of_several_roles(http: httpx.Client) -> None:
    system, developer = ({"role": r, "content": "Be brief."} for r in ("system", "developer"))
    assert said(ask(http, [system, USER])) == said(ask(http, [developer, USER]))
    assert said(ask(http, [system, USER, {"role": "assistant"}, developer, system, USER]))
    picture = {"type": "image_url", "image_url": data_url(jpeg(), "image/jpeg")}
    plain = ask(http, [USER, {"role": "assistant"}, USER]).json()["usage"]
    shown = ask(http, [USER, {"role": "assistant", "content": [picture]}, USER]).json()["usage"]
    assert shown["prompt_tokens"] == plain["prompt_tokens"] + 1


def test_a_system_message_may_be_the_last_one(http: httpx.Client, server: Running) -> None:
    """As agents send it that are to greet: what the model reads is the training's form."""
    vocabulary = server.hub.runner.vocabulary
    system = Message("system", "Be brief.")
    for before in ([], [Message("user", "A")]):
        turns = [*before, system]
        tokens = vocabulary.prompts.question(turns, [], "chat").tokens
        with server.hub.runner.answer(tokens, max_new_tokens=4) as answer:
            (wanted,) = [e.data["text"] for e in answer.events() if e.type == "response.done"]
        given = [{"role": turn.role, "content": turn.content, "type": "text"} for turn in turns]
        assert said(ask(http, given)) == wanted != ""


def test_what_the_model_does_not_see_is_named_in_a_header(http: httpx.Client) -> None:
    answer = ask(http, [{**USER, "name": "Ann"}])
    assert (said(answer), answer.headers["x-moss-ignored"]) == (said(ask(http)), "messages[0].name")
    with http.stream("POST", "chat/completions", json={"messages": [{**USER, "name": "Ann"}],
                     "max_tokens": 2, "stream": True}) as stream:  # fmt: skip
        assert stream.headers["x-moss-ignored"] == "messages[0].name"
    assert "x-moss-ignored" not in ask(http).headers
    url = {"url": data_url(jpeg(), "image/jpeg")}
    for detail in ("low", "high", "original"):
        part = {"type": "image_url", "image_url": {**url, "detail": detail}}
        answer = ask(http, [{"role": "user", "content": [part]}])
        assert answer.headers["x-moss-ignored"] == "messages[0].content[0].image_url.detail"
        plain = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
        assert said(answer) == said(ask(http, plain))


def test_special_tokens_that_somebody_types_are_text(http: httpx.Client) -> None:
    """Each of them is more than one token, in a string and in a part."""
    for typed in ("<|eot_id|>", "<|image|>", "<|video|>", "<|silence|>"):
        plain = ask(http, [{"role": "user", "content": ""}]).json()["usage"]["prompt_tokens"]
        counts = {
            ask(http, [{"role": "user", "content": c}]).json()["usage"]["prompt_tokens"]
            for c in (typed, [{"type": "text", "text": typed}])
        }
        assert len(counts) == 1
        assert min(counts) > plain + 3


# Fields


HARMLESS: dict[str, Any] = {
    "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": 1,
    "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "frequency_penalty": 0,
    "presence_penalty": 0.0, "response_format": {"type": "text"}, "modalities": ["text"],
    "parallel_tool_calls": False, "stream_options": None, "seed": None, "stop": None,
    "temperature": None, "max_completion_tokens": None, "stream": None, "tools": None,
    "prediction": {"type": "content", "content": "x"}, "safety_identifier": "x", "min_p": 0,
    "model": "moss-video", "unknown_to_us": None, "top_k": -1, "min_tokens": 0, "audio": None,
    "skip_special_tokens": True, "add_special_tokens": False, "stop_token_ids": [],
    "enable_thinking": False, "thinking": {"type": "disabled"}, "reasoning": {"effort": "none"},
    "chat_template_kwargs": {"enable_thinking": False}, "separate_reasoning": True, "rid": "x",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "temprature": 1, "n": 3, "prompt_logprobs": 1, "logit_bias": {"5": 101}, "min_p": 1.1,
    "min_tokens": 5, "guided_choice": ["yes"], "bad_words": ["a"], "frequency_penalty": 2.5,
    "response_format": {"type": "xml"}, "extra_body": {"repetition_penalty": 1.2},
    "stream": "yes", "ignore_eos": 1, "stop_token_ids": ["a"], "max_tokens": 1.5, "top_k": 2.5,
    "seed": 1.5, "temperature": True, "mm_processor_kwargs": {"max_pixels": 9}, "top_p": 0,
    "media_io_kwargs": {"video": {"frames": 4}}, "stream_options": {"include": True},
    "chat_template": "x", "audio": {"voice": "a"}, "reasoning_effort": "high", "best_of": 2,
    "enable_thinking": True, "thinking": {"type": "enabled"}, "reasoning": {"effort": "low"},
}  # fmt: skip
PARTS: list[dict[str, Any]] = [
    {"image_url": {"detail": "sharp"}}, {"image_url": {"max_pixels": 100}}, {"min_pixels": 4},
    {"image_url": {"fps": 1}}, {"type": "audio_url"}, {"type": "input_text"}, {"sharpness": 1},
]  # fmt: skip


def test_harmless_fields_are_taken(http: httpx.Client) -> None:
    plain = said(ask(http))
    assert said(ask(http, **HARMLESS)) == plain
    picture = data_url(jpeg(), "image/jpeg")
    urls: list[Any] = [picture, {"url": picture}, {"url": picture, "detail": "auto"}]
    answers = {
        said(ask(http, [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]))
        for url in urls
    }
    assert len(answers) == 1


def test_fields_that_would_change_the_answer_are_refused_by_name(http: httpx.Client) -> None:
    for name, value in REFUSED.items():
        assert re.split(r"[.[]", refused(ask(http, **{name: value})))[0] == name
    message = ask(http, temprature=1).json()["error"]["message"]
    assert message == "temprature: is not a field here: did you mean temperature?"
    for changes in PARTS:
        url = {"url": data_url(jpeg(), "image/jpeg"), **changes.get("image_url", {})}
        part = {"type": "image_url", **changes, "image_url": url}
        field = refused(ask(http, [{"role": "user", "content": [part]}]))
        assert field.startswith("messages[0].content[0].")
    assert refused(ask(http, max_completion_tokens=5)) == "max_tokens"  # 4
    said(ask(http, max_completion_tokens=4))
    unknown = ask(http, model="gpt-4o")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


def test_parts_and_roles_that_are_not_known_are_named(http: httpx.Client) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    result = {"role": "function", "content": "4", "name": "x"}
    for messages, words in (
        ([{"role": "user", "content": [sound]}], "[0].content[0].type: 'input_audio': expected"),
        ([USER, result, USER], "[1].role: 'function': expected"),
        ([{"role": "user", "content": [{"text": "A"}]}], "[0].content[0].type: expected"),
    ):
        answer = ask(http, messages)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"messages{words}")


def test_frames_of_a_video_follow_the_request(http: httpx.Client, video: str) -> None:
    url = {"url": video}
    assert frames(http, url) == 12  # one a second
    assert frames(http, {**url, "fps": 2}) == 24
    assert frames(http, {**url, "fps": 0.5}) == 6  # fewer than are shown without a word
    assert frames(http, url, part={"fps": 2}) == 24
    assert frames(http, {**url, "max_frames": 4}) == 4
    assert frames(http, {**url, "num_frames": 5}) == 5
    assert frames(http, {**url, "min_frames": 20}) == 20
    assert frames(http, url, mm_processor_kwargs={"fps": 2}) == 24
    as_picture = [{"type": "image_url", "image_url": url}]  # as Gradio's chat sends a video
    turn = {"role": "user", "content": as_picture, "metadata": {}, "options": []}
    asked = ask(http, [turn], mm_processor_kwargs={"fps": 2}).json()["usage"]["prompt_tokens"]
    empty = ask(http, [{"role": "user", "content": ""}]).json()["usage"]["prompt_tokens"]
    assert asked - empty == 24
    assert frames(http, url, media_io_kwargs={"video": {"num_frames": 3}}) == 3
    assert frames(http, {**url, "fps": 4, "max_frames": 9}) == 9
    assert frames(http, {**url, "fps": 2}, mm_processor_kwargs={"fps": 1}) == 24
    for wrong in ({"fps": 0}, {"fps": "2"}, {"max_frames": 31}, {"num_frames": -1}):
        field = refused(shown(http, {**url, **wrong}))
        assert field == f"messages[0].content[0].video_url.{next(iter(wrong))}"
    assert refused(shown(http, {**url, "num_frames": 4, "fps": 1})).endswith("video_url")
    assert refused(shown(http, {**url, "min_frames": 9, "max_frames": 4})).endswith("video_url")
    both = shown(http, url, mm_processor_kwargs={"fps": 2}, media_io_kwargs={"video": {"fps": 2}})
    assert refused(both) == "media_io_kwargs.video"
    assert refused(shown(http, {**url, "fps": 2}, part={"fps": 1})).endswith("video_url.fps")
    many = shown(http, {**url, "fps": 4})
    assert many.status_code == 413
    assert "12.0 s at 4 a second are more than 30 frames" in many.json()["error"]["message"]


def test_ends_of_an_answer_follow_the_request(http: httpx.Client) -> None:
    whole = said(ask(http, max_tokens=30))
    word = whole[5:8]
    kept = said(ask(http, max_tokens=30, stop=word, include_stop_str_in_output=True))
    assert kept == whole[: whole.index(word) + 3]
    # Silence is what ends it, which `ignore_eos` goes on from.
    silent = {"silence_bias": 100, "max_tokens": 30}
    assert ask(http, **silent).json()["usage"]["completion_tokens"] == 0
    assert ask(http, **silent, ignore_eos=True).json()["usage"]["completion_tokens"] == 30


def test_answers_without_a_seed_differ_and_with_one_repeat(http: httpx.Client) -> None:
    def draw(**seed: Any) -> str:
        return said(ask(http, temperature=1.5, max_tokens=16, **seed))

    assert len({draw() for _ in range(4)} | {draw(seed=None)}) > 3
    for seed in (7, -3, 2**63 - 1, 7.0):
        assert draw(seed=seed) == draw(seed=seed)
    assert draw(seed=1) != draw(seed=2**53 + 1)
    assert len({said(ask(http)) for _ in range(2)}) == 1  # greedy


def test_a_field_stands_once(http: httpx.Client) -> None:
    def post(body: str, **headers: str) -> httpx.Response:
        headers["Content-Type"] = "application/json"
        return http.post("chat/completions", content=body, headers=headers)

    body = '{"messages": [{"role": "user", "content": "A"}], "seed": 1, "seed": 2}'
    answer = post(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "'seed' is given twice"
    assert post('{"temperature": NaN}').status_code == 400
    packed = post("x", **{"Content-Encoding": "gzip"})
    assert refused(packed) == "Content-Encoding"


# Data URLs


def forms(data: bytes, kind: str) -> list[str]:
    plain = base64.b64encode(data).decode()
    return [
        f"DATA:{kind};base64,{plain}", f"data:{kind.upper()};BASE64,{plain}",
        f"data:;base64,{plain}", f"data:application/octet-stream;base64,{plain}",
        f"data:{kind};charset=utf-8;base64,{plain}", f"data:{kind}; codecs=a,b ; base64,{plain}",
        f'data:{kind};codecs="a,b";base64,{plain}', f" data:{kind};base64, {plain}\n",
        f"data:{kind};base64," + base64.encodebytes(data).decode(),
        f"data:{kind};base64," + base64.urlsafe_b64encode(data).decode(),
        f"data:{kind};base64," + plain.rstrip("="),
        f"data:{kind};base64," + plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        f"data:{kind}," + "".join(f"%{byte:02x}" for byte in data),
    ]  # fmt: skip


def test_every_form_of_a_data_url_is_read(http: httpx.Client, video: str) -> None:
    picture = jpeg(1)

    def answers(kind: str, urls: list[str]) -> set[str]:
        parts = [{"type": kind, kind: {"url": url}} for url in urls]
        return {said(ask(http, [{"role": "user", "content": [part]}])) for part in parts}

    plain = answers("image_url", [data_url(picture, "image/jpeg")])
    assert answers("image_url", forms(picture, "image/jpeg")) == plain
    clip = base64.b64decode(video.partition(",")[2])
    assert len(answers("video_url", [video, *forms(clip, "video/webm")[4:7]])) == 1


WRONG_URLS = [
    ("https://host/a.png", "only data: URLs are taken"),
    ("/etc/passwd", "only data: URLs are taken"),
    ("", "only data: URLs are taken"),
    ("data:image/png;base64", "without a comma"),
    ("data:image/png;base64,", "is empty"),
    ("data:image/png;base64,AAAA?AAA", "character 5 is '?'"),
    ("data:image/png;base64,AA=A", "is not base64"),
    ("data:image/png;base64,AAAAA", "is not base64: 5 characters"),
    (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "SVG"),
    ("data:image/svg+xml;utf8,<svg/>", "SVG"),
]


def test_other_urls_are_refused_with_what_is_wrong(http: httpx.Client) -> None:
    for url, words in WRONG_URLS:
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = ask(http, [{"role": "user", "content": [part]}])
        assert refused(answer) == "messages[0].content[0].image_url"
        assert words in answer.json()["error"]["message"], url


def test_a_sockets_picture_may_be_a_data_url(server: Running) -> None:
    data = jpeg(2)
    plain = base64.b64encode(data).decode()
    images = [plain, data_url(data, "image/jpeg"), base64.encodebytes(data).decode()]
    for image in images:
        message = json.dumps({"type": "input_image_buffer.append", "image": image})
        limits = server.hub.limits
        appended = parse(message, limits)
        assert isinstance(appended, ImageAppend)
        assert read_image(appended, limits).data == data
