"""The published model's streaming interface: three queues and their sentinels, over a session.

    model = QueueModel.load(checkpoint)
    threading.Thread(target=model.real_time_generate, args=(images, prompts, tokens)).start()
    images.put(picture); prompts.put("What is it?"); tokens.get()
    model.stop_real_time_generate()

`tokens` gets the model's text piece by piece, and among it `<|silence|>` for each decision to be
silent, `<|round_start|>` when a prompt has been written into the context, and `<|round_end|>` when
the model has ended its turn or reached `max_new_tokens`. The last is `[DONE]`, or `[ERROR]` if
something failed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.session.events import Event
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.runner import Runner
from inference.session.session import QueueFull

ROUND_START, ROUND_END, SILENCE = "<|round_start|>", "<|round_end|>", "<|silence|>"
DONE, ERROR = "[DONE]", "[ERROR]"
_POLL = 0.05  # seconds between looks at whether the session is over


class QueueModel:
    """One stream at a time on an engine, which it closes with `close`."""

    def __init__(self, engine: Engine) -> None:
        self._runner = Runner(engine)
        self._session: SessionHandle | None = None

    @classmethod
    def load(cls, checkpoint: str, **options: Any) -> QueueModel:
        """Loads an engine with the options of `load_engine`."""
        return cls(load_engine(checkpoint, **options))

    def real_time_generate(
        self,
        image_queue: queue.Queue[Any],
        prompt_queue: queue.Queue[str],
        token_queue: queue.Queue[str],
        processor: object = None,
        *,
        max_new_tokens: int = 86400,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        silence_bias: float = Sampling.silence_bias,
        seed: int | None = None,
        **session: Any,
    ) -> None:
        """Runs until `stop_real_time_generate`, or until an image that is None ends the input.

        Images wait in their queue until the session has room: bound the queue of a live source.
        `processor` is a parameter of the published call and not used. `session` are further
        fields of SessionConfig. An error is raised after `[ERROR]` was put.
        """
        sampling = Sampling(
            temperature=temperature if do_sample else 0.0, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, silence_bias=silence_bias, seed=seed,
        )  # fmt: skip
        options = {"live": False, **session, "max_new_tokens": max_new_tokens, "sampling": sampling}
        end = ERROR
        try:
            with self._runner.session(**options) as handle:
                self._session = handle
                failed: list[BaseException] = []
                pumps = [
                    threading.Thread(target=_pump, args=(handle, source, give, failed))
                    for source, give in (
                        (image_queue, lambda image: _give_image(handle, image)),
                        (prompt_queue, handle.prompt),
                    )
                ]
                for pump in pumps:
                    pump.start()
                reader = _Reader(token_queue)
                for event in handle.events():
                    reader.take(event)
            for pump in pumps:
                pump.join()
            if failed or reader.error:
                raise failed[0] if failed else RuntimeError(reader.error)
            end = DONE
        finally:
            self._session = None
            token_queue.put(end)

    def stop_real_time_generate(self) -> None:
        """Ends the stream, if one runs, at the next token boundary."""
        session = self._session
        if session is not None:
            session.close("stopped")

    def close(self) -> None:
        """Ends the stream and the engine's thread."""
        self._runner.close()


def _pump(
    handle: SessionHandle,
    source: queue.Queue[Any],
    give: Callable[[Any], None],
    failed: list[BaseException],
) -> None:
    """Moves items of a queue into the session until that is closed."""
    waiting: list[Any] = []  # an item that the session had no room for
    while not handle.log.closed:
        try:
            waiting = waiting or [source.get(timeout=_POLL)]
            give(waiting[0])
            waiting = []
        except queue.Empty:
            continue
        except QueueFull:
            handle.log.wait_closed(_POLL)
        except SessionClosed:
            return
        except Exception as error:  # raised again in real_time_generate
            failed.append(error)
            handle.close(f"{error}")
            return


def _give_image(handle: SessionHandle, image: Any) -> None:
    if image is None:
        handle.end()
    else:
        handle.put_frame(image)


class _Reader:
    """Turns events into the items of the published token queue."""

    def __init__(self, tokens: queue.Queue[str]) -> None:
        self._tokens = tokens
        self._silence_reported = False  # by the event before, which is about the same silence
        self.error = ""

    def take(self, event: Event) -> None:
        data, reported = event.data, self._silence_reported
        if event.type == "response.output_text.delta":
            self._tokens.put(data["delta"])
            return
        self._silence_reported = event.type == "response.done"
        if event.type == "input_frame.processed" and data["decision"] == "silence":
            self._silence_reported = True
            self._tokens.put(SILENCE)
        elif event.type == "response.done" and data["reason"] == "silence":
            if not reported:
                self._tokens.put(SILENCE)
        elif event.type == "session.state" and data["state"] == "silent" and not reported:
            self._tokens.put(SILENCE)
        elif event.type == "response.done" and data["reason"] in ("turn_ended", "max_new_tokens"):
            self._tokens.put(ROUND_END)
        elif event.type == "conversation.item.created":
            self._tokens.put(ROUND_START)
        elif event.type == "error":
            self.error = data["message"]
