"""The saved state of one data stream, as bytes for a checkpoint."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

# The only classes that occur in energon's states; anything else in a checkpoint is refused, so
# that loading someone's checkpoint runs no code of theirs.
_ALLOWED = {
    ("megatron.energon.state", "FlexState"),
    ("megatron.energon.flavors.webdataset.sample_loader", "SliceState"),
}


@dataclass
class StreamState:
    """`batches` taken from stream `stream` so far, and energon's state of it after them."""

    identity: str  # what must be equal for the state to fit: streams, shuffling, samples a source
    stream: int
    batches: int
    dataset: dict[str, Any] | None  # None: not started

    def to_bytes(self) -> bytes:
        return pickle.dumps({name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def from_bytes(cls, data: bytes) -> StreamState:
        """Raises ValueError for bytes that to_bytes did not make."""
        try:
            return cls(**_Unpickler(io.BytesIO(data)).load())
        except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"data loader state cannot be read: {error}") from None

    def check(self, identity: str, stream: int) -> None:
        """Raises ValueError where this state is that of another stream or other data."""
        if self.identity != identity:
            raise ValueError(
                f"data loader state: it was saved with [{self.identity}], this loader has "
                f"[{identity}]: resume with the same data and ranks x workers"
            )
        if self.stream != stream:
            raise ValueError(
                f"data loader state: the entry of stream {self.stream} was given to stream "
                f"{stream}: deal the entries out in order"
            )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a loader state")
        return super().find_class(module, name)
