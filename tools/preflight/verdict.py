"""Judges all ranks' findings: which machines are unfit, and a table of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from data_pipeline.tables import format_table
from tools.preflight.checks import Findings

CLOCKS_S = 2.0  # apart, at most
SLOW = {True: 0.7, False: 0.0}  # of the median; a CPU that others use, too, is no measure


def wrong(found: Sequence[Findings], accelerator: bool) -> Iterator[str]:
    """A line `HOST, rank 3: ...` for each thing that is wrong with the ranks that answered."""
    if not found:
        return
    for one in found:
        for line in one.wrong:
            yield f"{one.host}, rank {one.rank}: {line}"
    yield from _different(found)
    yield from _slow(found, SLOW[accelerator])
    middles = [median(look) for look in zip(*(one.clocks for one in found), strict=True)]
    for one in found:
        apart = min((a - b for a, b in zip(one.clocks, middles, strict=True)), key=abs)
        if abs(apart) > CLOCKS_S:
            yield f"{one.host}, rank {one.rank}: clock: {apart:+.1f} s from the others"


def missing(at: Mapping[int, str]) -> Iterator[str]:
    """The ranks that have not answered, each with what it began last, the earliest alone: the
    others wait for those. `at`: of each rank `NUMBER HOST: WHAT`."""
    if not at:
        return
    earliest = min(int(stage.split()[0]) for stage in at.values())
    for rank, stage in sorted(at.items()):
        number, _, rest = stage.partition(" ")
        if int(number) == earliest:
            host, _, what = rest.partition(": ")
            yield f"{host}, rank {rank}: {what}: no answer"


def _different(found: Sequence[Findings]) -> Iterator[str]:
    """A line for each thing that a minority of ranks has otherwise than the others."""
    for name in sorted({name for one in found for name in one.same}):
        counts = Counter(one.same.get(name, "unknown") for one in found)
        usual = max(counts, key=lambda value: (counts[value], value == found[0].same.get(name)))
        for one in found:
            own = one.same.get(name, "unknown")
            if own != usual:
                yield f"{one.host}, rank {one.rank}: {name} {own}; others have {usual}"


def _slow(found: Sequence[Findings], least: float) -> Iterator[str]:
    for name in ("tower MLP TFLOP/s", "decoder MLP TFLOP/s", "within GB/s", "between GB/s"):
        rates = [one.speed[name] for one in found if name in one.speed]
        for one in found:
            if name in one.speed and one.speed[name] < least * median(rates):
                yield (
                    f"{one.host}, rank {one.rank}: {one.speed[name]:.3g} {name}; the median is "
                    f"{median(rates):.3g}"
                )


def table(found: Sequence[Findings]) -> str:
    """A line for each machine, with its slowest rank's speeds."""
    nodes: dict[tuple[int, str], list[Findings]] = defaultdict(list)
    for one in found:
        nodes[one.node, one.host].append(one)
    names = list(dict.fromkeys(name for one in found for name in one.speed))
    rows = [("machine", "ranks", *names)]
    for (_, host), own in sorted(nodes.items()):
        slowest = (min((o.speed[n] for o in own if n in o.speed), default=0.0) for n in names)
        rows.append((host, str(len(own)), *(f"{rate:.3g}" for rate in slowest)))
    return format_table(rows)
