"""A session on a terminal: silence as one dim line, responses with time, lag and rate."""

from __future__ import annotations

from typing import TextIO

from data_pipeline.seconds import clock
from inference.session.events import Event

_QUIET, _PLAIN = "\x1b[2m", "\x1b[0m"


class View:
    """Shows events as they come. On a terminal a silence is one line that is updated."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._live = out, out.isatty()
        self._silent: tuple[float, float] | None = None  # first and last second of a silence
        self._lag = 0.0
        self._speaking = False

    def show(self, event: Event) -> None:
        data, kind = event.data, event.type
        if kind == "input_frame.processed":
            self._lag = data["lag_ms"]
            if data["decision"] == "silence":
                self._quiet(event.t_media)
        elif kind == "response.created":
            self._line(f"{clock(event.t_media)}  ", end="")
            self._speaking = True
        elif kind == "response.output_text.delta":
            self._out.write(data["delta"].replace("\n", "\n       "))
            self._out.flush()
        elif kind == "response.done":
            cut = "" if data["status"] == "completed" else f" [{data['reason']}]"
            rate = data["usage"].get("tokens_per_second")
            measured = f"  ({rate:.0f} tokens/s, lag {self._lag:.0f} ms)" if rate else ""
            self._out.write(f"{cut}{self._aside(measured)}\n")
            self._out.flush()
            self._speaking = False
        elif kind == "conversation.item.created":
            self._line(f"{clock(event.t_media)}  > {data['text']}")
        elif kind == "input_frame.dropped":
            reason = f"{data['count']} dropped: {data['reason']}"
            self._line(self._aside(f"{clock(data['frame_at'])}  frame {reason}"))
        elif kind == "session.evicted":
            forgot = f"{clock(event.t_media)}  forgot {data['count']} of {data['kind']}"
            self._line(self._aside(forgot))
        elif kind.startswith("source."):
            self._source(event)
        elif kind == "error":
            self._line(f"error: {data['message']}")
        elif kind == "session.closed":
            self._line("", end="")

    def _source(self, event: Event) -> None:
        data, now = event.data, clock(event.t_media)
        if event.type == "source.lost":
            self._line(f"{now}  {data['message']}; tried again in {data['retry_s']:g} s")
        elif event.type == "source.back":
            self._line(f"{clock(data['frame_at'])}  back after {data['lost_s']:.1f} s")
        elif event.type == "source.clock":
            jump = f"the source's clock has jumped by {data['jump_s']:+.1f} s"
            self._line(self._aside(f"{clock(data['frame_at'])}  {jump}"))
        elif data["questions"]:
            left = f"questions of later seconds, asked now: {data['questions']}"
            self._line(f"{now}  the source has ended; {left}")

    def _quiet(self, second: float) -> None:
        if self._speaking:
            return  # this silence ends a response, which has been shown
        self._silent = (self._silent[0] if self._silent else second, second)
        if self._live:
            self._out.write(f"\r\x1b[K{self._silence()}")
            self._out.flush()

    def _silence(self) -> str:
        assert self._silent is not None
        first, last = (clock(second) for second in self._silent)
        span = first if first == last else f"{first}-{last}"
        return self._aside(f"{span}  ·  lag {self._lag:.0f} ms")

    def _line(self, text: str, end: str = "\n") -> None:
        """A new line, after what there is of a silence or a response."""
        if self._speaking:
            self._out.write("\n       ")
        if self._silent:
            self._out.write("\n" if self._live else f"{self._silence()}\n")
            self._silent = None
        self._out.write(text + end if text else "")
        self._out.flush()

    def _aside(self, text: str) -> str:
        return f"{_QUIET}{text}{_PLAIN}" if self._live and text else text


def summary(event: Event) -> str:
    """The last `session.metrics` of a session, in a line."""
    data = event.data
    parts = [f"{data['frames']} frames", f"{data['tokens']} tokens"]
    if data["tokens_per_second"]:
        parts.append(f"{data['tokens_per_second']:.1f} tokens/s")
    if data["silence_ratio"] is not None:
        parts.append(f"silent {data['silence_ratio']:.0%}")
    for name, words in (("frame_decision", "frame to decision"), ("frame_lag", "lag")):
        if f"{name}_ms" in data:
            parts.append(f"{words} {data[f'{name}_ms']['p50']:.1f} ms")
    parts += [f"{count} dropped: {reason}" for reason, count in data["drops"].items()]
    return ", ".join(parts)
