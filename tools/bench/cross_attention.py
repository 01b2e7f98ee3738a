"""Measures time and memory of one cross-attention core, forward and backward, on a long video.

Compares the blocks of moss_train.model.cross_attention with scaled_dot_product_attention over all
keys under a dense float mask [tokens, frames x vision tokens], in two layouts: `realtime` (a frame
every few tokens) and `question` (all frames, then the text).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from data_pipeline.commands import CommandParser
from data_pipeline.tables import format_table
from moss_train import hardware
from moss_train.model.cross_attention import attend_blocks
from moss_train.model.flex_attention import attend_flex
from moss_train.model.frame_plan import FramePlan, plan_frames
from moss_train.transfer import move


def plan(layout: str, tokens: int, frames: int, flex: int | None = None) -> FramePlan:
    """The frame plan of one row, on the device; tokens see each frame from its mark on."""
    step = tokens // frames if layout == "realtime" else 1
    planned = plan_frames(
        torch.zeros(frames, dtype=torch.long),
        torch.arange(frames) * step,
        [tokens],
        tokens,
        flex=flex,
    )
    move(planned)
    return planned


def dense_mask(frames: FramePlan, tokens: int, patches: int, dtype: torch.dtype) -> Tensor:
    """0 where a token may see a key, else -inf: `[tokens, frames x patches]`."""
    device = frames.positions.device
    allowed = torch.arange(tokens, device=device)[:, None] >= frames.positions
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(
        ~allowed, float("-inf")
    )
    return mask.repeat_interleave(patches, dim=1)


def attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attends all keys for all tokens, with KV heads repeated for SDPA's fused kernels."""
    heads = query.shape[1] // key.shape[2]
    key, value = (x.flatten(0, 1).repeat_interleave(heads, dim=1) for x in (key, value))
    q, k, v = (x.movedim(0, -2) for x in (query, key, value))  # [heads, S, D], [heads, K, D]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).movedim(-2, 0)


class PeakMemory:
    """Measures by how much this process's memory grows at most, in GB."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.on_accelerator = hardware.on_accelerator()
        if self.on_accelerator:
            hardware.synchronize()
            hardware.reset_peak_memory()
            self.start = int(hardware.peak_memory_gb() * 1e9)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would hide what is allocated
            self.start = self.peak = _resident()
            self.running = True
            self.thread = threading.Thread(target=self._sample)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, _resident())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        if self.on_accelerator:
            hardware.synchronize()
            self.peak = int(hardware.peak_memory_gb() * 1e9)
        else:
            self.running = False
            self.thread.join()

    @property
    def gigabytes(self) -> float:
        """The growth so far."""
        return (self.peak - self.start) / 1e9


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(
    attend: Callable[[], Tensor], leaves: list[Tensor], repeat: int
) -> tuple[float, float, float]:
    """Measures a forward and backward pass: best seconds, best CPU seconds, peak of memory in GB.

    CPU seconds (of all threads) say more than seconds where other processes share the cores.
    """
    seconds, cpu, peaks = [], [], []
    for _ in range(repeat):
        for leaf in leaves:
            leaf.grad = None
        with PeakMemory() as memory:
            began, began_cpu = time.perf_counter(), time.process_time()
            attend().sum().backward()
            hardware.synchronize()
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - began_cpu)
        peaks.append(memory.gigabytes)
    return min(seconds), min(cpu), max(peaks)


def compare(layout: str, args: argparse.Namespace) -> None:
    """Prints the table of one layout."""
    device, dtype = hardware.device(), hardware.DTYPES[args.dtype]
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator).to(device, dtype)
        return value.requires_grad_()

    query = leaf(args.tokens, args.heads, args.head_dim)
    key, value = (leaf(args.frames, args.patches, args.kv_heads, args.head_dim) for _ in range(2))
    frames = plan(layout, args.tokens, args.frames)

    # Masks are part of the cost: a training step makes them for every microbatch.
    def blocks() -> Tensor:
        masks = args.heads // args.kv_heads, args.patches, dtype
        return attend_blocks(query, key, value, frames.with_masks(*masks))

    def dense() -> Tensor:
        mask = dense_mask(frames, args.tokens, args.patches, dtype)
        return attend_dense(query, key, value, mask)

    computed = sum(block.pairs for block in frames.blocks)
    rows: list[tuple[str, float, Callable[[], Tensor]]] = [
        ("blocks", computed, blocks),
        ("dense mask", args.tokens * args.frames, dense),
    ]
    if hardware.on_accelerator():
        flex = plan(layout, args.tokens, args.frames, args.patches).flex
        assert flex is not None
        rows.insert(1, ("flex", flex.pairs, lambda: attend_flex(query, key, value, flex)))
    lines: list[tuple[str, ...]] = [("layout", "core", "computed", "seconds", "CPU s", "extra GB")]
    best = {}
    for name, pairs, attend in rows:
        repeat = args.repeat + hardware.on_accelerator()  # the first pass compiles
        best[name] = measure(attend, [query, key, value], repeat)
        share = pairs / (args.tokens * args.frames)
        lines.append((layout, name, f"{share:.0%}", *(f"{number:.3f}" for number in best[name])))
    print(format_table(lines, "llr"))
    ratio = [a / b for a, b in zip(best["dense mask"], best["blocks"], strict=True)]
    print(f"dense / blocks: time {ratio[0]:.2f}, CPU {ratio[1]:.2f}, memory {ratio[2]:.2f}")
    with torch.no_grad():
        off = (blocks() - dense()).abs().max().item()
    print(f"largest difference of the results: {off:.1e}\n", flush=True)


def main() -> None:
    """Prints a table for each layout."""
    parser = CommandParser("python -m tools.bench.cross_attention", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=2048, help="text tokens")
    add("--frames", type=int, default=256, help="frames")
    add("--patches", type=int, default=101, help="vision tokens of a frame")
    add("--heads", type=int, default=32, help="query heads")
    add("--kv-heads", type=int, default=8, help="key and value heads")
    add("--head-dim", type=int, default=128, help="width of a head")
    add("--dtype", choices=sorted(hardware.DTYPES), default="fp32", help="dtype")
    add("--repeat", type=int, default=1, help="passes, of which the fastest counts")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hardware.activate("auto")
    print(f"{hardware.device()}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(f"{args.tokens} tokens x {args.frames} frames x {args.patches} vision tokens", end="; ")
    print(f"{args.heads} heads, {args.kv_heads} KV heads, {args.head_dim} wide")
    for layout in ("realtime", "question"):
        compare(layout, args)


if __name__ == "__main__":
    main()
