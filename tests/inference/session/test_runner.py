"""Sessions on a real engine: against the model's own offline pass, alone and together, saved,
and closed in every order."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.schema import SampleError
from inference.engine.engine import Engine, EngineFull
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.processing_moss_video import MossVideoProcessor
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.runner import Runner
from inference.session.session import PromptTooLong, QueueFull
from tests.waiting import until

BIAS = 4.0  # at which the random model is silent about as often as not
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    for i in range(8)
]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture
def runner(engine: Engine) -> Iterator[Runner]:
    with Runner(engine) as made:
        yield made
    assert not engine.slots  # nothing leaks


def options(seed: int = 0, **fields: Any) -> dict[str, Any]:
    sampling = Sampling(silence_bias=BIAS, temperature=0.7 if seed else 0.0, seed=seed)
    return {
        "live": False, "clock": "media", "pace": 4, "sampling": sampling, "max_new_tokens": 12,
        **fields,
    }  # fmt: skip


def watch(session: SessionHandle, pictures: list[Any], asks: dict[int, str]) -> None:
    for second, picture in enumerate(pictures):
        session.put_frame(picture, float(second), asks.get(second))


def context(session: SessionHandle) -> list[int]:
    slot = session.save()["slot"]["slot"]
    return slot["tokens"] + ([] if slot["pending"] is None else [slot["pending"]])


def quiet(session: SessionHandle, frames: int) -> bool:
    """All frames have their decision, and the model has stopped, or said what fits in a second."""
    task: Any = session._running.task
    decided = task.stats.counts["silence"] + task.stats.counts["speech"]
    return decided == frames and (not task.response or task._tokens_since_frame >= task.config.pace)


def answering(session: SessionHandle) -> bool:
    """A prompt is in the context, and its answer has filled its second."""
    task: Any = session._running.task
    asked = any(e.type == "conversation.item.created" for e in session.log.after(0, 10**6))
    return asked and bool(task.response) and task._tokens_since_frame >= task.config.pace


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    """The model and processor as transformers opens them, without an engine."""
    model = MossVideoForConditionalGeneration.from_pretrained(tiny).eval()
    return model, MossVideoProcessor.from_pretrained(tiny)


def test_every_token_is_that_of_one_offline_pass(runner: Runner, reference: Any) -> None:
    """Interrupted twice, frames between words: each token is the likeliest of a teacher-forced
    pass over the whole transcript, every frame seen by exactly the tokens after it."""
    with runner.session(**options(), system_prompt="Be brief.") as session:
        watch(session, PICTURES, {3: "Who is it?", 6: "And now?"})
        until(lambda: quiet(session, 8))
        tokens = context(session)
        responses = [e.data for e in session.log.after(0, 10**6) if e.type == "response.done"]
    assert {"interrupted", "silence"} <= {done["reason"] for done in responses}
    model, processor = reference
    pixels = processor.image_processor([PICTURES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0]
    special = runner.vocabulary.special
    logits[:, special.silence] += BIAS
    likely = [0, *logits.argmax(-1).tolist()]
    header = runner.vocabulary.prompts.header("assistant")
    forced = forced_tokens(runner, tokens, header)
    said = [i for i in range(len(tokens)) if i not in forced]
    assert len(said) > 20
    assert [tokens[i] for i in said] == [likely[i] for i in said]


def forced_tokens(runner: Runner, tokens: list[int], header: list[int]) -> set[int]:
    """Indices of what the runner wrote: turns of others, headers, frames, the ends of turns."""
    special, forced, inside = runner.vocabulary.special, set(), False
    for i, token in enumerate(tokens):
        if token == special.start_header_id:
            inside = False
        if not inside or token in (special.image, special.eot_id):
            forced.add(i)
        if tokens[i + 1 - len(header) : i + 1] == header:
            inside = True
    return forced


def transcript(runner: Runner, seed: int, **fields: Any) -> list[int]:
    asks = {seed % 5 + 1: "Who is it?"}
    with runner.session(**options(seed, **fields)) as session:
        watch(session, PICTURES[seed:] + PICTURES[:seed], asks)
        until(lambda: quiet(session, 8))
        return context(session)


def test_sessions_together_say_what_each_says_alone(runner: Runner) -> None:
    alone = [transcript(runner, seed) for seed in (1, 2, 3)]
    together: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: transcript(runner, s)}))
        for seed in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in (1, 2, 3)] == alone
    assert len({tuple(t) for t in alone}) == 3


def test_a_saved_session_goes_on_as_it_would_have(runner: Runner, tiny: Path) -> None:
    """In the middle of a response, through a file, in another engine."""
    talk = Sampling(silence_bias=-100.0, temperature=0.7, seed=2)
    fields = options(pace=6, sampling=talk, max_new_tokens=1000)
    with runner.session(**fields) as session:
        for second, picture in enumerate(PICTURES):
            session.put_frame(picture, float(second))
            if second == 4:
                session.put_prompt("Who is it?")
                until(lambda: answering(session))
                file = io.BytesIO()
                torch.save(session.save(), file)
        until(lambda: quiet(session, 8))
        whole, last = context(session), session.events()
    file.seek(0)
    other = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=1)
    with Runner(other) as second_runner:
        state = torch.load(file, weights_only=True)
        done = state["session"]["flags"]["media"]
        with second_runner.restore(state) as resumed:
            waiting = len(state["session"]["frames"])
            for number in range(int(done) + 1 + waiting, 8):
                resumed.put_frame(PICTURES[number], float(number))
            until(lambda: quiet(resumed, 8))
            assert context(resumed) == whole
            names = {e.data["response_id"] for e in resumed.log.after(0) if "response_id" in e.data}
            assert names <= {e.data.get("response_id") for e in last}


def test_a_state_saved_at_any_moment_has_all_that_was_given(
    runner: Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a frame with a prompt is on its way from the queue into the engine."""
    image, asks = runner.vocabulary.special.image, {1: "Who is it?", 2: "And now?"}
    fields = options(2, max_waiting_frames=9)

    def settled(session: SessionHandle, frames: int) -> bool:
        return quiet(session, frames) and not session._running.task.frames  # type: ignore[union-attr]

    states, step = [], engine.step

    def saved_before(steps: Any) -> Any:
        """A step for which somebody waits who saves the session."""
        until(lambda: runner._calls)
        return step(steps)

    monkeypatch.setattr(engine, "step", saved_before)
    with runner.session(**fields) as session:
        watch(session, PICTURES[:4], asks)
        session.put_prompt("Where is he?")
        watch(session, PICTURES[4:6], {})
        while not settled(session, 6):
            states.append(session.save())
        monkeypatch.undo()
        whole = context(session)
    assert len(states) > 10
    for state in states:
        taken = state["slot"]["slot"]["tokens"].count(image) if state["slot"] else 0
        waiting = [picture for picture, *_ in state["session"]["frames"] if picture is not None]
        assert taken + len(waiting) == 6
    for state in states[:: len(states) // 7]:
        with runner.restore(state) as resumed:
            until(partial(settled, resumed, 6))
            assert context(resumed) == whole


def test_endless_streams_drop_the_oldest_and_report_it(tiny: Path) -> None:
    engine = load_engine(tiny, device="cpu", window=4, max_tokens=64)
    with Runner(engine) as runner, runner.session(**options(live=False)) as session:
        for second in range(60):
            session.put_frame(PICTURES[second % 8], float(second))
        session.end()
        events = list(session.events())
    evicted = [e.data for e in events if e.type == "session.evicted"]
    assert sum(e["count"] for e in evicted if e["kind"] == "frame") == 56
    assert any(e["kind"] == "text" for e in evicted)
    metrics = next(e.data for e in reversed(events) if e.type == "session.metrics")
    assert (metrics["frames"], metrics["cached_frames"], metrics["evicted_frame"]) == (60, 4, 56)


def test_a_session_in_an_event_loop(runner: Runner) -> None:
    async def talk() -> list[str]:
        kinds = []
        async with runner.session(**options()) as session:
            for second, picture in enumerate(PICTURES):
                await session.aput_frame(picture, float(second))
            session.prompt("Who is it?")
            session.end()
            async for event in session.events():
                kinds.append(event.type)
        return kinds

    kinds = asyncio.run(talk())
    assert kinds.count("input_frame.processed") == 8
    assert kinds[-2:] == ["session.metrics", "session.closed"]
    assert "conversation.item.created" in kinds


def test_events_are_numbered_for_readers_at_any_time(runner: Runner) -> None:
    with runner.session(**options()) as session:
        watch(session, PICTURES[:3], {1: "Who is it?"})
        session.end()
        first = list(session.events())
        assert [e.seq for e in first] == list(range(1, len(first) + 1))
        assert list(session.events(after=4)) == first[4:]
    times = [(e.t_server, e.t_media) for e in first]
    assert times == sorted(times)
    assert {e.t_media for e in first} == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("order", ["session", "runner", "twice", "in_the_middle", "by_its_end"])
def test_it_ends_cleanly_in_every_order(
    engine: Engine, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = engine.step

    def until_closed(steps: Any) -> Any:
        """In the middle of the response it is closed, before the model ends it."""
        if order == "in_the_middle" and session.running.task.response:
            until(lambda: session.reason)
        return step(steps)

    monkeypatch.setattr(engine, "step", until_closed)
    runner = Runner(engine)
    talk = options(pace=None, sampling=Sampling(silence_bias=-100.0), max_new_tokens=10**6)
    session = runner.session(**options() if order == "by_its_end" else talk)
    session.push_frame(PICTURES[0])
    session.prompt("Who is it?")
    if order == "in_the_middle":
        until(lambda: session._running.task.response)
    if order == "by_its_end":
        session.end()
        assert list(session.events())[-1].type == "session.closed"
    if order == "runner":
        runner.close()
    session.close()
    if order == "twice":
        session.close()
    last = [event.type for event in session.events()]
    assert last[-1] == "session.closed"
    assert last.count("response.created") == last.count("response.done")
    if order == "in_the_middle":
        assert last[-4:-1] == ["response.done", "session.state", "session.metrics"]
    with pytest.raises(SessionClosed):
        session.push_frame(PICTURES[0])
    with pytest.raises(SessionClosed):
        session.prompt("Who is it?")
    with pytest.raises(SessionClosed):
        session.save()
    runner.close()
    runner.close()
    with pytest.raises(SessionClosed, match="the runner was closed"):
        runner.session()
    assert not engine.slots
    assert not any(thread.name == "moss-engine" for thread in threading.enumerate())


def test_no_more_sessions_than_the_engine_has_slots(runner: Runner) -> None:
    opened = [runner.session() for _ in range(3)]
    with pytest.raises(EngineFull, match="all 3 sessions"):
        runner.session()
    opened[0].close()
    until(lambda: runner.sessions == 2)
    with runner.session(**options()) as session:
        watch(session, PICTURES[:1], {})
        until(lambda: quiet(session, 1))
    for one in opened:
        one.close()


def test_the_failure_of_one_session_does_not_touch_others(runner: Runner) -> None:
    """A step that the engine refuses, in the same batch."""
    with runner.session(**options()) as good, runner.session(**options()) as bad:
        task: Any = bad.running.task
        task._queued_tokens = [10**9]
        bad.prompt("What?")
        watch(good, PICTURES, {})
        events = list(bad.events())
        assert "tokens must be" in next(e.data["message"] for e in events if e.type == "error")
        assert events[-1].type == "session.closed"
        until(lambda: quiet(good, 8))


def test_a_long_prompt_goes_in_between_the_steps_of_others(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what it says in one piece; what is longer than half of the context is refused."""
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=4096, max_sessions=2)
    text = "word " * 250

    def ask(runner: Runner) -> tuple[list[int], str]:
        with runner.session(**options()) as session:
            session.put_frame(PICTURES[0], 0.0)
            session.put_prompt(text)
            until(lambda: answering(session))
            done = [e.data["delta"] for e in session.log.after(0) if "delta" in e.data]
            return context(session), "".join(done)

    counts: list[list[int]] = []
    step = engine.step

    def counted(steps: Any) -> Any:
        counts.append(sorted(len(one.tokens) for one in steps))
        return step(steps)

    engine.step = counted  # type: ignore[method-assign]
    with Runner(engine) as runner:
        talk = options(pace=None, sampling=Sampling(silence_bias=-100.0), max_new_tokens=10**6)
        with runner.session(**talk) as talking:
            talking.prompt("Talk.")
            until(lambda: talking.running.task.response)
            counts.clear()
            said = ask(runner)
            with pytest.raises(PromptTooLong, match="at most 2048"):
                talking.prompt(text * 3)
    assert max(max(count) for count in counts) == 127
    assert all(count[0] == 0 for count in counts[1:-1] if len(count) > 1)  # the other goes on
    monkeypatch.setattr("inference.session.session.CHUNK_TOKENS", 10**6)
    with Runner(engine) as runner:
        assert ask(runner) == said


def test_pictures_come_in_many_forms_and_wrong_ones_are_refused(runner: Runner) -> None:
    array = np.asarray(PICTURES[0])
    jpeg = io.BytesIO()
    PICTURES[0].save(jpeg, "PNG")
    forms: list[Any] = [
        PICTURES[0],
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        jpeg.getvalue(),
    ]
    contexts = []
    for form in forms:
        with runner.session(**options()) as session:
            session.push_frame(form)
            until(partial(quiet, session, 1))
            contexts.append(context(session))
    assert contexts[1:] == contexts[:1] * 3
    with runner.session(**options(max_waiting_frames=1)) as session:
        with pytest.raises(SampleError, match="undecodable_image"):
            session.push_frame(b"no picture")
        with pytest.raises(SampleError, match=r"float32 \[3, 4, 4\]"):
            session.push_frame(torch.zeros(3, 4, 4))

        with runner.changed:  # no frame is taken meanwhile
            session.push_frame(PICTURES[0])
            with pytest.raises(QueueFull):
                session.push_frame(PICTURES[0])
