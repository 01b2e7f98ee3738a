"""H.264 whose bytes depend on the pictures and options alone."""

from __future__ import annotations

from fractions import Fraction

import torch
from av.container import OutputContainer
from av.video.stream import VideoStream


def h264_stream(
    container: OutputContainer, rate: int | Fraction, size: tuple[int, int], preset: str
) -> VideoStream:
    """A stream of `rate` frames a second and `size` (width, height), both even, with 4:2:0 colours.

    Two encodings of the same pictures are equal to the byte, on any machine: one thread encodes,
    since its number changes what is chosen, and nothing with AVX-512. With that, x264 (core 165)
    gave other bytes about once in 300 clips of 64 x 32 pixels, from equal pictures; with AVX2 or
    plain code never in thousands.
    """
    options = {"crf": "20", "preset": preset, "g": "250", "threads": "1"}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        options["x264-params"] = "asm=AVX2"  # what all such processors have
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    return stream
