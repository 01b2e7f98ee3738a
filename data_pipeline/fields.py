"""What the fields of a dataclass may hold, said beside each field and checked in one place.

lr: float | None = number(None, above=0)
schedule: str = choice("cosine", ("cosine", "linear"))
layers: list[int] = numbers([1, 4], least=0)

list(wrong_values(config))  # ["lr=nan: must be a finite number greater than 0"]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

ALLOWED = "allowed"  # key of a field's metadata: its Range, or a tuple of its choices


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; a bound that is None is not there.

    least, most: bounds that belong to it. above, below: bounds that do not.
    zero: what 0 means, where that is not a size.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    zero: str = ""

    def __contains__(self, value: Any) -> bool:
        if not _is_finite(value):
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """As an error goes on after `must be`: `0 (no clipping) or more`."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        zero = f" ({self.zero})" if self.zero else ""
        if low is None and high is None:
            return "a finite number"
        if high is None:
            return f"greater than {low}" if self.above is not None else f"{low}{zero} or more"
        upper = f"less than {high}" if self.below is not None else f"at most {high}"
        if low is None:
            return upper
        if self.above is None and self.below is None:
            return f"between {low}{zero} and {high}"
        lower = f"greater than {low}" if self.above is not None else f"{low}{zero} or more"
        return f"{lower} and {upper}"


def number(default: Any, **bounds: Any) -> Any:
    """A field that holds a number of `Range(**bounds)`; None where its type allows it."""
    return field(default=default, metadata={ALLOWED: Range(**bounds)})


def numbers(default: Sequence[float], **bounds: Any) -> Any:
    """A field that holds a list of numbers of `Range(**bounds)`."""
    return field(default_factory=lambda: list(default), metadata={ALLOWED: Range(**bounds)})


def numbers_by(**bounds: Any) -> Any:
    """A field that holds numbers of `Range(**bounds)` by keys, by default none."""
    return field(default_factory=dict, metadata={ALLOWED: Range(**bounds)})


def choice(default: str | None, choices: Sequence[str]) -> Any:
    """A field that holds one of `choices`; None where its type allows it."""
    return field(default=default, metadata={ALLOWED: tuple(choices)})


def choices(default: Sequence[str], names: Sequence[str]) -> Any:
    """A field that holds a list of some of `names`."""
    return field(default_factory=lambda: list(default), metadata={ALLOWED: tuple(names)})


def wrong_values(config: Any, prefix: str = "") -> Iterator[str]:
    """A line for each value of a dataclass that its field does not allow, and of those inside it.

    Args:
        prefix: before the names of its fields, as in `trainer.`.
    """
    kind: type = type(config)
    hints = _type_hints(kind)
    for entry in fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            yield from wrong_values(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and is_dataclass(value[0]):
            for place, item in enumerate(value):
                yield from wrong_values(item, f"{name}[{getattr(item, 'name', place)}].")
        elif ALLOWED in entry.metadata:
            yield from _wrong(name, value, entry.metadata[ALLOWED], str(hints[entry.name]))


@cache  # 0.2 ms each time, and a server checks often
def _type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_values(config: Any, before: str = "") -> None:
    """Raises ValueError with all that `wrong_values` says of a dataclass, `before` in front."""
    problems = list(wrong_values(config))
    if problems:
        raise ValueError(f"{before}{'; '.join(problems)}")


def check_number(name: str, value: float | None, *, whole: bool = False, **bounds: Any) -> None:
    """Raises ValueError where an argument is no number of `Range(**bounds)`; None is not checked.

    Args:
        whole: it must be a whole number.
    """
    for line in _wrong(name, value, Range(**bounds), f"{'int' if whole else 'float'} | None"):
        raise ValueError(line)


def _wrong(name: str, value: Any, allowed: Range | tuple[str, ...], hint: str) -> Iterator[str]:
    if value is None and "None" in hint:
        return
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    values = value.values() if isinstance(value, dict) else values
    if isinstance(allowed, tuple):
        if any(one not in allowed for one in values):
            of = "some of" if isinstance(value, list | tuple) else "one of"
            yield f"{name}={value}: choose {of} {', '.join(allowed)}"
        return
    whole = "int" in hint and "float" not in hint
    bad = [one for one in values if one not in allowed or (whole and one != int(one))]
    if bad:
        named = bad if isinstance(value, list | tuple) else value
        yield f"{name}={named}: must be {described(allowed, bad[0], whole)}"


def _is_finite(value: object) -> bool:
    """True for numbers; an integer must fit into 64 bits, as tensors and files hold it."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)


def described(allowed: Range, value: Any, whole: bool) -> str:
    """The range, as an error goes on after `must be`; with the kind of number where the value is of
    another."""
    if not _is_finite(value):
        kind = "a whole number" if whole else "a finite number"
        kind += " of 64 bits" if isinstance(value, int) else ""
    elif whole and value != int(value):
        kind = "a whole number"
    else:
        return str(allowed)
    words = str(allowed)
    return kind if words == "a finite number" else f"{kind}, {words}"
