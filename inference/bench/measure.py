"""Times the engine and the published way. Inputs are ready on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import psutil
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from data_pipeline import devices
from data_pipeline.progress import Progress
from inference.bench.published import PublishedModel
from inference.engine.engine import Engine
from inference.engine.slots import Slot, Step
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.session.stats import quantile

QUESTION = [3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15]  # a turn of twelve tokens
LONGER = list(range(20, 50))  # a turn of thirty tokens
PROMPT = [1, 3, 4, 5]


class Clock:
    """Seconds of wall time, or of this process's CPU time (which other processes do not change)."""

    def __init__(self, device: torch.device, kind: str):
        self.device, self.kind = device, kind

    def __call__(self) -> float:
        devices.synchronize(self.device)
        return time.process_time() if self.kind == "cpu" else time.perf_counter()


@dataclass
class Timings:
    """Measured seconds; a list has an entry for each token, frame or question."""

    vision: float = 0.0  # all frames
    first_token: float = 0.0  # vision, prefill and one token
    tokens: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)  # frame -> decision, one by one
    question: list[float] = field(default_factory=list)  # question -> first token
    joined: list[float] = field(default_factory=list)  # question and a frame -> first token
    longer: list[float] = field(default_factory=list)  # question of thirty tokens -> first token
    uploads: list[float] = field(default_factory=list)  # 16 pictures to the device

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first over the time they took: (n - 1) / (t_end - t_first)."""
        return len(self.tokens) / sum(self.tokens)

    @property
    def published_total(self) -> float:
        """Total seconds as the published script counts them: 2 x TTFT + (n - 1) / TPS."""
        return 2 * self.first_token + sum(self.tokens)


def random_frames(model: MossVideoForConditionalGeneration, count: int) -> Tensor:
    """Normalized frames `[count, 3, h, w]` on the model's device."""
    weight = next(model.parameters())
    size = model.config.vision_config.image_size
    return torch.randn(count, 3, size, size, device=weight.device, dtype=weight.dtype)


def offline(engine: Engine, pixels: Tensor, new: int, clock: Clock) -> Timings:
    """Times all frames and a question at once, then `new` tokens."""
    out = Timings()
    tokens = [*PROMPT, *[engine.image_token] * len(pixels), *QUESTION]
    slot = engine.open()
    start = clock()
    features = engine.encode(list(pixels))
    out.vision = clock() - start
    engine.step([Step(slot, tokens, features)])
    out.first_token = clock() - start
    out.tokens = _decode(engine, slot, new, clock)
    engine.close(slot)
    return out


def stream(engine: Engine, pixels: Tensor, new: int, clock: Clock, questions: int = 8) -> Timings:
    """Times frames one by one, to which the model is silent; then questions, alone and together
    with a frame, `new` tokens, longer questions, and uploads of pictures."""
    out, silence = Timings(), engine.silence_token
    slot = engine.open()
    engine.step([Step(slot, PROMPT)])
    progress = Progress("streaming", len(pixels), "frames")
    for frame in pixels:
        slot.pending = silence
        start = clock()
        engine.step([Step(slot, [engine.image_token], engine.encode([frame]))])
        out.frames.append(clock() - start)
        progress.step()
    progress.end()
    for _ in range(questions):
        start = clock()
        engine.step([Step(slot, QUESTION)])
        out.question.append(clock() - start)
    for _ in range(questions):
        start = clock()
        both = [*QUESTION, engine.image_token]
        engine.step([Step(slot, both, engine.encode([pixels[0]]))])
        out.joined.append(clock() - start)
    out.tokens = _decode(engine, slot, new, clock)
    for _ in range(questions):
        start = clock()
        engine.step([Step(slot, LONGER)])
        out.longer.append(clock() - start)
    out.uploads = uploaded(engine, clock)
    engine.close(slot)
    return out


def _decode(engine: Engine, slot: Slot, new: int, clock: Clock) -> list[float]:
    seconds = []
    for _ in range(new - 1):
        start = clock()
        engine.step([Step(slot)])
        seconds.append(clock() - start)
    return seconds


def uploaded(engine: Engine, clock: Clock, pictures: int = 16) -> list[float]:
    """Seconds to bring pictures (bytes, of the tower's size) to the device and normalize them."""
    size, seconds = engine.pixels.size, []
    images = list(torch.randint(0, 255, (pictures, 3, size, size), dtype=torch.uint8))
    for _ in range(8):
        start = clock()
        engine.pixels(images)
        seconds.append(clock() - start)
    return seconds


def together(engine: Engine, pixels: Tensor, new: int, clock: Clock) -> list[float]:
    """Seconds of each step in which all slots of an engine, after the frames and a question,
    decode a token at once."""
    features = engine.encode(list(pixels))
    tokens = [*PROMPT, *[engine.image_token] * len(pixels), *QUESTION]
    slots = [engine.open() for _ in range(engine.max_sessions)]
    for slot in slots:
        engine.step([Step(slot, tokens, features)])
    seconds = []
    for _ in range(new - 1):
        start = clock()
        engine.step([Step(slot) for slot in slots])
        seconds.append(clock() - start)
    for slot in slots:
        engine.close(slot)
    return seconds


def published(model: PublishedModel, pixels: Tensor, new: int, clock: Clock) -> Timings:
    """Times the same question through the published model's `generate`."""
    out, times = Timings(), []
    image = model.config.image_token_index
    tokens = torch.tensor([[*PROMPT, *[image] * len(pixels), *QUESTION]], device=pixels.device)

    def note(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        times.append(clock())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        start = clock()
        states = model.get_image_features(pixels[None, :, None])
        out.vision = clock() - start
        model.generate(
            input_ids=tokens,
            cross_attention_states=states,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([note]),
        )
    out.first_token = times[0] - start
    out.tokens = [after - before for before, after in pairwise(times)]
    return out


def moved_by(
    model: MossVideoForConditionalGeneration,
    change: Callable[[MossVideoForConditionalGeneration], object],
) -> float:
    """Changes the model; returns the norm of the logits' change over their norm, for 64 random
    tokens with 4 random frames."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, model.config.image_token_index, (64,), generator=generator)
    words[[4, 20, 21, 40]] = model.config.image_token_index
    pixels = random_frames(model, 4)
    inputs = {"input_ids": words[None].to(pixels.device), "pixel_values": pixels[None, :, None]}
    with torch.inference_mode():
        before = model(**inputs).logits.float()
        change(model)
        return ((model(**inputs).logits.float() - before).norm() / before.norm()).item()


@torch.inference_mode()
def moved_by_kept(model: MossVideoForConditionalGeneration, kv_dtype: str) -> float:
    """Measures what `moved_by` does for another dtype of cached keys and values, on 4 frames with
    16 random words after each, one by one; both dtypes are given the same."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, model.config.image_token_index, (64,), generator=generator).tolist()
    pixels, logits = random_frames(model, 4), []
    for kind in ("auto", kv_dtype):
        engine = Engine(model, window=4, max_tokens=128, kernels="torch", kv_dtype=kind)
        slot, hidden = engine.open(), []
        for number, word in enumerate(words):
            if number % 16 == 0:
                frames = engine.encode([pixels[number // 16]])
                engine.packed.forward([(slot, [engine.image_token], frames)])
            hidden.append(engine.packed.forward([(slot, [word], ())])[slot.index])
        logits.append(model.lm_head(torch.stack(hidden)).float())
    before, after = logits
    return ((after - before).norm() / before.norm()).item()


@dataclass
class LongStream:
    """Measurements of a long stream; lists have an entry for each tenth of it."""

    frames: int
    megabytes: list[float]  # memory of this process
    milliseconds: list[float]  # median of a frame's step
    rate: float  # frames/s
    text_tokens: int  # in the cache at the end
    cached_frames: int  # likewise


def endless(engine: Engine, frames: int, clock: Clock) -> LongStream:
    """Streams `frames` frames through one slot, which is silent after nine of ten frames."""
    pixels = random_frames(engine.model, 8)
    slot = engine.open()
    engine.step([Step(slot, PROMPT)])
    process, megabytes, milliseconds = psutil.Process(), [], []
    seconds: list[float] = []
    progress, start = Progress("endless", frames, "frames"), clock()
    for number in range(frames):
        slot.pending = 20 if number % 10 == 5 else engine.silence_token
        began = clock()
        feature = engine.encode([pixels[number % 8]])
        engine.step([Step(slot, [engine.image_token], feature)])
        seconds.append(clock() - began)
        slot.evictions.clear()
        if number % (frames // 10) == frames // 10 - 1:
            megabytes.append(process.memory_info().rss / 1e6)
            milliseconds.append(median_ms(seconds))
            seconds.clear()
        progress.step()
    progress.end()
    rate = frames / (clock() - start)
    result = LongStream(frames, megabytes, milliseconds, rate, slot.length, len(slot.frames))
    engine.close(slot)
    return result


def median_ms(seconds: list[float]) -> float:
    """The median in milliseconds, without the first quarter, which warms up."""
    return 1e3 * statistics.median(seconds[len(seconds) // 4 :])


def percentile_ms(seconds: list[float], percent: int) -> float:
    """`quantile` in milliseconds."""
    return 1e3 * quantile(seconds, percent)
