"""One stream: what the model was trained to do, as a state machine without threads.

    start      system prompt, a user turn (empty, or a prompt that was there first), then the
               assistant's header
    frame      [<|image|>] -> one decision: <|silence|> (idle until the next input) or a word
    speaking   one token per step, paced; a frame may come between any two of them
    prompt     at the next token boundary: <|eot_id|>, the user's turn, a new header -> a decision
    both       prompt first, then the frame, in one step
    cancel     the response is ended as the model ends one: with <|silence|>

`next_step` returns the input of the next engine step, `on_token` takes the sampled token.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from data_pipeline.fields import check_values, choice, number
from inference.engine.graphs import PROMPTS
from inference.engine.sampling import Sampling
from inference.session.events import LOG_LIMIT
from inference.session.inputs import Frame, Prompt, StepRequest
from inference.session.response import ResponseWriter, Vocabulary
from inference.session.stats import Stats


class QueueFull(Exception):
    """A queue of a session is full; the message names it and its size."""


class PromptTooLong(ValueError):
    """A text has more tokens than the session takes at once."""


# Maximum of a step: other sessions' steps go between those of a long prompt. With the pending token
# it is a pass of fixed shape.
CHUNK_TOKENS = PROMPTS[-1] - 1


@dataclass(frozen=True)
class SessionConfig:
    """How a session behaves. Wrong values raise ValueError that names the field.

    clock `wall`: a frame is taken in as soon as it is there. `media`: once the model is silent or
    has said `pace` tokens, so that what is said does not depend on the speed of the machine.
    """

    system_prompt: str = ""
    prompt: str = ""  # of the first user turn; empty: the model watches before it is asked
    sampling: Sampling = field(default_factory=Sampling)
    live: bool = True  # a full queue drops its oldest frame; False: the source waits
    clock: Literal["wall", "media"] = choice("wall", ("wall", "media"))
    # Maximum number of tokens between two frames; None: no limit.
    pace: int | None = number(40, above=0)
    frame_interval: float = number(1.0, above=0)  # seconds between two frames
    max_new_tokens: int | None = number(4096, above=0)  # maximum length of a response; None: none
    max_waiting_frames: int = number(4, above=0)
    max_waiting_prompts: int = number(16, above=0)

    def __post_init__(self) -> None:
        check_values(self)


# Fields that can be changed in the middle of a stream.
_ANY_TIME = ("pace", "max_new_tokens", "sampling")


class Session(ResponseWriter):
    """The state machine of one stream. Not thread-safe: the runner calls every method under its
    lock."""

    def __init__(
        self,
        name: str,
        config: SessionConfig,
        vocabulary: Vocabulary,
        stats: Stats,
        log_limit: int = LOG_LIMIT,
        most: int | None = None,
    ) -> None:
        """most: tokens of a prompt, and of the system prompt; None: no limit."""
        super().__init__(name, vocabulary, stats, log_limit)
        self.config, self._most = config, most
        self.frames: deque[Frame] = deque()
        self.prompts: deque[Prompt] = deque()
        self.wake: float | None = None  # time at which `next_step` has work without new input
        self.next_second = 0.0  # of a frame that comes without one
        self._responses = 0  # so many have begun
        # Tokens that the next step takes in before all else. The start is written with the first
        # input: a prompt that comes before any frame is the first user turn.
        self._queued_tokens: list[int] = []
        self._unfinished: StepRequest | None = None  # the rest of a request that is taken in
        self._started = False
        self._turn_over = False  # the model has closed its turn itself
        self._prompt_time: float | None = None  # when the prompt arrived whose answer is due
        self._tokens_since_frame = 0  # tokens since the last frame or user's turn
        self._paced_from = 0.0  # when the step of the last token began
        self._cancelled = False
        self._input_ended = False
        self.check_texts(config.system_prompt, config.prompt)

    def configure(self, **changes: Any) -> None:
        """Changes fields of the config; most only before the first input. ValueError."""
        fixed = [name for name in changes if name not in _ANY_TIME]
        if fixed and (self._started or self.frames or self.prompts):
            raise ValueError(f"{fixed[0]}: can be set before the first input only")
        config = replace(self.config, **changes)
        self.check_texts(config.system_prompt, config.prompt)
        enough, self.config = self._pace_reached, config
        if self.response is not None and self._pace_reached != enough:  # by another pace
            self.emit("session.state", state="speaking" if enough else "waiting")

    # Input

    def push(self, frame: Frame) -> None:
        """Queues a frame. A full live queue drops its oldest frame that has no prompt, or else the
        new one (`input_frame.dropped`). QueueFull if the session is not live, or if every frame,
        the new one too, has a prompt.
        """
        if frame.prompt:
            self.check_texts(frame.prompt)
        if not math.isfinite(frame.at):
            raise ValueError(f"at: {frame.at!r} is not a second")
        following = self.next_second
        if frame.image is not None:
            following = frame.at + self.config.frame_interval
        if len(self.frames) >= self.config.max_waiting_frames:
            loose = next((waiting for waiting in self.frames if not waiting.prompt), None)
            if not self.config.live or (loose is None and frame.prompt):
                raise QueueFull(f"{len(self.frames)} frames wait: the limit of max_waiting_frames")
            self.drop("queue_full", (loose or frame).at)
            self.next_second = following
            if loose is None:
                return
            self.frames.remove(loose)
        self.next_second = following
        self.frames.append(frame)

    def ask(self, prompt: Prompt) -> None:
        """Queues a prompt; QueueFull, and SampleError for half characters."""
        self.check_texts(prompt.text)
        if len(self.prompts) >= self.config.max_waiting_prompts:
            raise QueueFull(f"{len(self.prompts)} prompts wait: the limit of max_waiting_prompts")
        self.prompts.append(prompt)

    def drop(self, reason: str, at: float, count: int = 1) -> None:
        self.stats.count(f"drop:{reason}", count)
        self.emit("input_frame.dropped", reason=reason, frame_at=at, count=count)

    def cancel(self) -> bool:
        """Ends the response at the next token boundary; False if there is none."""
        self._cancelled = self.response is not None
        return self._cancelled

    def end(self) -> None:
        """Ends the input: the session is over when all of it is taken in and answered."""
        self._input_ended = True

    @property
    def input_ended(self) -> bool:
        return self._input_ended

    @property
    def over(self) -> bool:
        waiting = self.frames or self.prompts or self.response or self._unfinished
        return self._input_ended and not waiting

    @property
    def settled(self) -> bool:
        """All input is taken in, and what the pace allows on the media clock is said."""
        waiting = self.frames or self.prompts or self._unfinished
        return not waiting and (self.response is None or self._pace_reached)

    @property
    def _pace_reached(self) -> bool:
        """Whether, on the media clock, as many tokens have been said as the pace allows until more
        input comes."""
        config = self.config
        paced = config.clock == "media" and config.pace is not None
        return paced and self._tokens_since_frame >= (config.pace or 0)

    # Steps

    def next_step(self, now: float) -> StepRequest | None:
        """The next step at time `now`; None: nothing to do before `wake` or new input."""
        self.wake = None
        request, self._unfinished = self._unfinished, None
        if request is None:
            request = self._next_request(now)
        if request is None or len(request.tokens) <= CHUNK_TOKENS:
            return request
        # A picture is that of the last token.
        part = StepRequest(request.tokens[:CHUNK_TOKENS], sample=False, began=now)
        del request.tokens[:CHUNK_TOKENS]
        self._unfinished = request
        return part

    def _next_request(self, now: float) -> StepRequest | None:
        if self._cancelled and self.response:
            self._end_response("cancelled", "client_cancelled")
            self._queued_tokens.append(self._vocabulary.special.silence)
        self._cancelled = False
        request = StepRequest([], began=now)
        self._take_prompts(request)
        if self.frames and self._frame_due(bool(request.tokens)):
            self._take_frame(request)
        if not request.tokens and not (self.response and self._token_due(now)):
            return None
        request.tokens = self._queued_tokens + request.tokens
        self._queued_tokens = []
        return request

    def on_token(self, request: StepRequest, token: int | None, now: float) -> None:
        """Takes the token that the model sampled after a step."""
        if token is None:
            return
        special, self._turn_over = self._vocabulary.special, False
        silent = token == special.silence
        ends = silent or token in (special.eot_id, special.end_of_text)
        nothing = ends and self.response is None  # is said to the frame, or the prompt
        ttft = None if self._prompt_time is None else now - self._prompt_time
        if ttft is not None:
            self.stats.add("ttft", ttft)
        self._prompt_time = None
        if request.frame:
            self._report_decision(request, silent or nothing, now)
        if nothing and ttft is not None:
            self.emit("session.state", state="silent")  # silence is the answer
        if silent:
            self._end_response("completed", "silence")
        elif ends:
            self._end_response("completed", "turn_ended")
            self._turn_over = token == special.eot_id
            self._queued_tokens = [] if self._turn_over else [special.silence]
        else:
            self._paced_from = request.began
            self._continue_response(token, now, ttft)

    def _take_prompts(self, request: StepRequest) -> None:
        while self.prompts:
            prompt = self.prompts.popleft()
            self._write_turn(request, prompt.text, prompt.arrived)

    def _write_turn(self, request: StepRequest, text: str, arrived: float) -> None:
        """The user's turn and a new header after what is in the context."""
        vocabulary, interrupted = self._vocabulary, self.response is not None
        if not self._started and not self.config.prompt:
            request.tokens += self._opening(text)
        else:
            if not self._started:
                request.tokens += self._opening(self.config.prompt)
            self._end_response("cancelled", "interrupted")
            if not self._turn_over:
                request.tokens.append(vocabulary.special.eot_id)
            request.tokens += vocabulary.user_turn(text)
        self._turn_over = False
        self._tokens_since_frame = 0  # what is said to it has a frame's time of its own
        self.stats.add("interruption", request.began - arrived)
        if self._prompt_time is None:
            self._prompt_time = arrived
        waited = round(1000 * (request.began - arrived), 3)
        self.emit("conversation.item.created", text=text, interrupted=interrupted, wait_ms=waited)

    def _take_frame(self, request: StepRequest) -> None:
        frame = self.frames.popleft()
        if frame.prompt:
            self._write_turn(request, frame.prompt, frame.arrived)
        elif not self._started:
            request.tokens += self._opening(self.config.prompt)
        elif self._turn_over:
            # A frame must be in an assistant's turn.
            request.tokens += self._vocabulary.user_turn("")
        self._tokens_since_frame = 0
        if frame.image is None:
            return
        request.tokens.append(self._vocabulary.special.image)
        request.images.append(frame.image)
        request.frame, self.media = frame, frame.at
        self.stats.count("frames")
        self.stats.add("frame_lag", request.began - frame.arrived)

    def _opening(self, prompt: str) -> list[int]:
        self._started = True
        config, vocabulary = self.config, self._vocabulary
        tokens = [vocabulary.special.begin_of_text]
        if config.system_prompt:
            tokens += vocabulary.turn("system", config.system_prompt)
        return tokens + vocabulary.user_turn(prompt)

    def _frame_due(self, interrupted: bool) -> bool:
        config = self.config
        if config.clock == "wall" or interrupted or self.response is None:
            return True
        return config.pace is not None and self._tokens_since_frame >= config.pace

    def _token_due(self, now: float) -> bool:
        """Whether the pace allows the next token; if it will later, `wake` is when."""
        config = self.config
        if config.pace is None:
            return True
        if config.clock == "media":
            return not self._pace_reached or self._input_ended
        due_at = self._paced_from + config.frame_interval / config.pace
        if now < due_at:
            self.wake = due_at
        return now >= due_at

    # Reports and responses

    def _report_decision(self, request: StepRequest, silent: bool, now: float) -> None:
        frame = request.frame
        assert frame is not None
        self.stats.count("silence" if silent else "speech")
        self.stats.add("frame_decision", now - request.began)
        self.emit(
            "input_frame.processed",
            frame_at=frame.at,
            decision="silence" if silent else "speech",
            lag_ms=round(1000 * (request.began - frame.arrived), 3),
            decision_ms=round(1000 * (now - request.began), 3),
            waiting=len(self.frames),
        )

    def _continue_response(self, token: int, now: float, ttft: float | None) -> None:
        config = self.config
        waited = config.clock == "media" and self._tokens_since_frame in (0, config.pace)
        if self.response is None or waited:
            self.emit("session.state", state="speaking")
        if self.response is None:
            self._responses += 1
            name = f"{self.name}-{self._responses}"
        else:
            name = self.response.name
        self._tokens_since_frame += 1
        response = self._append_token(token, now, name, ttft)
        if len(response.tokens) >= (self.config.max_new_tokens or math.inf):
            self._end_response("incomplete", "max_new_tokens")
            self._queued_tokens.append(self._vocabulary.special.silence)
        elif config.clock == "media" and self._tokens_since_frame == config.pace:
            # Also where the input has ended: what is told does not depend on when that comes.
            self.emit("session.state", state="waiting")

    def close(self, status: str, reason: str) -> None:
        self._end_response(status, reason)

    def _end_response(self, status: str, reason: str) -> None:
        if self.response is not None:
            self._finish(status, reason)
            self.emit("session.state", state="silent")

    def check_texts(self, *texts: str) -> None:
        """PromptTooLong, and SampleError for half characters. Takes 20 ms for 8000 characters, and
        nothing the next time: may be called before the lock is taken."""
        for text in texts:
            count = len(self._vocabulary.turn("user", text))
            if self._most is not None and count > self._most:
                raise PromptTooLong(f"the text has {count} tokens: at most {self._most} are taken")
