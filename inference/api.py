"""An export from Python: questions, a video as events, live sessions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers

from data_pipeline.fields import check_number
from data_pipeline.images import read_picture
from data_pipeline.prompts import as_system, as_typed
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message
from data_pipeline.seconds import parse_seconds
from inference.cli import MAX_NEW_TOKENS
from inference.engine.engine import Engine, EngineFull
from inference.engine.lifetime import when_forgotten
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.export_info import ExportInfo, read_export_info
from inference.feed import Schedule, follow
from inference.live import LiveSource
from inference.session.answer import LARGE_CHUNK_FRAMES, check_fits
from inference.session.events import Event
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.runner import Runner
from inference.session.session import SessionConfig
from inference.sources import (
    CLIP_FPS,
    CLIP_MAX_FRAMES,
    CLIP_MIN_FRAMES,
    RECONNECT,
    WATCHED_MAX_FRAMES,
    FileSource,
    clip,
    open_source,
)

# A file's path or bytes, a PIL image, an array [H, W, 3], a tensor [3, H, W].
Image = str | Path | bytes | PIL.Image.Image | np.ndarray | torch.Tensor

_FORGOTTEN = "nobody refers to it any more"


def load(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    **engine: Any,
) -> Model:
    """Opens an exported folder, with this package's code, never with the folder's.

        with inference.load("exports/live") as model:
            print(model.chat("Where is the circle?", images=["picture.jpg"]))

    Args:
        device: such as cpu, cuda, cuda:1 (default: the best that there is).
        dtype: fp32 or bf16 (default: the checkpoint's on CUDA, fp32 on a CPU).
        quantize: int8, fp8 or int4: weights of the decoder's linear layers.
        engine: fields of `EngineConfig`: `window` (frames that the model sees at once, 256),
            `max_tokens` (cached tokens of a session, 8192), `max_sessions` (1), ...

    Raises:
        ExportError, ValueError: the folder is not an export, or an argument is wrong.
    """
    info = read_export_info(checkpoint)
    transformers.logging.disable_progress_bar()  # a folder is read in a second
    options = {"device": device, "dtype": dtype, "quantize": quantize, **engine}
    return Model(load_engine(checkpoint, **options), info, str(checkpoint))


class Model:
    """An opened export, until `close`, or until nobody refers to it or its sessions any more. Every
    method may be called from any thread, of the process that has loaded it."""

    def __init__(self, engine: Engine, info: ExportInfo, name: str) -> None:
        self.info, self.name = info, name
        self.runner = Runner(engine)
        when_forgotten(self, partial(self.runner.close, _FORGOTTEN))

    def chat(
        self,
        text: str,
        images: Sequence[Image] = (),
        video: str | Path | Sequence[Image] | None = None,
        *,
        system_prompt: str = "",
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
        fps: float = CLIP_FPS,
        max_frames: int | None = None,
    ) -> str:
        """The answer to `text` after `images` and `video`. A real-time model watches the video in
        silence before it is asked.

        Args:
            images: paths, bytes of files, PIL images, uint8 [H, W, 3] arrays or [3, H, W] tensors.
            video: a file, of which `fps` frames a second are taken, at most `max_frames`
                (default: 16, of a real-time model 256; `window`, if that is less); or its frames.
            sampling: (default: the most likely token each time).

        Raises:
            ValueError: a number is out of its range, or the question does not fit: more pictures
                and frames than `window`, more tokens than `max_tokens`. Of a video that is watched
                the first frames are forgotten instead, as of a stream.
            SourceError, SampleError: what is shown cannot be read.
            EngineFull: all `max_sessions` are in use.
            RuntimeError: the engine failed.
        """
        check_number("fps", fps, above=0)
        check_number("max_frames", max_frames, whole=True, above=0)
        check_number("max_new_tokens", max_new_tokens, whole=True, above=0)
        frames = [read_picture(image) for image in images]
        if isinstance(video, str | Path):
            default = WATCHED_MAX_FRAMES if self.info.watches else CLIP_MAX_FRAMES
            most = max_frames or min(default, self.runner.engine.window)
            clip_frames = clip(str(video), fps, min(CLIP_MIN_FRAMES, most), most)
        else:
            clip_frames = [read_picture(frame) for frame in video or ()]
        prompts = self.runner.vocabulary.prompts
        if self.info.watches and clip_frames and not frames:
            tokens = prompts.watched(len(clip_frames), text, system_prompt)
        else:
            marks = IMAGE_MARK * len(frames) + (VIDEO_MARK if clip_frames else "")
            counts = [1] * len(frames) + ([len(clip_frames)] if clip_frames else [])
            system = [Message("system", as_system(system_prompt))] if system_prompt else []
            messages = [*system, Message("user", marks + as_typed(text))]
            tokens = prompts.question(messages, counts, self.info.question_form).tokens
            check_fits(self.runner.engine, tokens, [*frames, *clip_frames])
        with _hinting():
            session = self.runner.answer(
                tokens,
                [*frames, *clip_frames],
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                chunk=LARGE_CHUNK_FRAMES,
            )
        with session as answer:
            return _text_of(answer)

    def watch(
        self,
        video: str | Path | int,
        prompt: str = "",
        ask: Mapping[Any, str] | None = None,
        *,
        fps: float = 1 / SessionConfig.frame_interval,
        speed: float | None = None,
        reconnect: float = RECONNECT,
        **session: Any,
    ) -> Iterator[Event]:
        """Watches a video and yields what happens, as it happens, until it is over.

            for event in model.watch("clip.mp4", "Tell me what happens.", {1.5: "What is it?"}):
                if event.type == "response.done":
                    print(event.t_media, event.data["text"])

        Args:
            video: a file, the number of a camera, or an rtsp:// or http:// URL.
            prompt: the first user turn (default: none, the model watches first).
            ask: second of the video (`75`, "75.5s", "1:15") -> a question that is asked then.
            fps: frames per second of the video.
            speed: seconds of a file per second of the wall clock (default: 0, as fast as
                possible); what is live has a speed of its own.
            reconnect: seconds for which a camera or stream that is lost is tried again; 0: not.
            session: further fields of `SessionConfig`: `system_prompt`, `pace`, `sampling`, ...

        Raises:
            ValueError: the model has not learned to watch, or an argument is wrong.
            SourceError: there is no such file, camera or stream. Later errors are events of the
                type `error`.
        """
        self._check_watches()
        if not (0 < fps < math.inf and 0 <= (speed or 0) < math.inf and 0 <= reconnect < math.inf):
            raise ValueError(
                f"fps={fps}, speed={speed}, reconnect={reconnect}: fps must be more than 0, the "
                "others not less than 0, and all of them finite"
            )
        timed = [(parse_seconds(second), text) for second, text in (ask or {}).items()]
        questions = sorted(timed, key=itemgetter(0))
        source = open_source(str(video), reconnect)
        pace = float(source.live) if speed is None else speed
        schedule = Schedule(fps, 1.0 if source.live else pace, questions)
        fields = {**schedule.session_fields(source.live), **session, "prompt": prompt}
        return self._watch(source, schedule, fields)

    def _watch(
        self, source: FileSource | LiveSource, schedule: Schedule, fields: Mapping[str, Any]
    ) -> Iterator[Event]:
        with _hinting():
            opened = self.runner.session(**fields)
        with opened as session:
            yield from follow(session, source, schedule)

    def session(self, prompt: str = "", **fields: Any) -> SessionHandle:
        """A live session: frames and prompts go in, events come out.

            with model.session("Tell me what happens.", live=False) as session:
                session.put_frame(image)
                session.end()
                for event in session.events():
                    ...

        `fields` are those of `SessionConfig`; what a session does is in docs/streaming.md. It ends
        with `close`, or once nobody refers to it any more.

        Raises:
            ValueError: the model has not learned to watch, or a field is wrong.
            EngineFull: all `max_sessions` are in use.
        """
        self._check_watches()
        with _hinting():
            session = self.runner.session(prompt=prompt, **fields)
        session.model = self
        close = partial(session.running.close, self.runner.changed, _FORGOTTEN)
        when_forgotten(session, close)
        return session

    def close(self) -> None:
        """Ends all sessions, and the engine's thread."""
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_watches(self) -> None:
        if self.info.watches is False:
            raise ValueError(
                f"{self.name}: its prompts are of the form {self.info.prompt_form}: it has not "
                "learned when to be silent: use chat(), or load a real-time model"
            )


@contextlib.contextmanager
def _hinting() -> Iterator[None]:
    """Says what to do where all places are taken."""
    try:
        yield
    except EngineFull as error:
        words = "close one, or load the model with a larger max_sessions"
        raise EngineFull(f"{error}: {words}") from None


def _text_of(answer: SessionHandle) -> str:
    text, complete = "", False
    for event in answer.events():
        if event.type == "response.done":
            text, complete = event.data["text"], event.data["status"] != "cancelled"
        elif event.type == "error":
            raise RuntimeError(f"{answer.name}: {event.data['message']}")
        elif event.type == "session.closed" and not complete:
            raise SessionClosed(f"{answer.name}: {event.data['reason']}")
    return text
