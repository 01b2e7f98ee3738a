"""The saved state of one data stream, as bytes for a checkpoint."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

# The only classes in energon's states. Any other class in a checkpoint is refused: loading a
# checkpoint of somebody else must not run their code.
_ALLOWED = {
    ("megatron.energon.state", "FlexState"),
    ("megatron.energon.flavors.webdataset.sample_loader", "SliceState"),
}


@dataclass
class StreamState:
    """`batches` taken from stream `stream` so far, and energon's state of it after them."""

    identity: str  # streams, shuffling, samples of each source: as saved
    stream: int
    batches: int
    dataset: dict[str, Any] | None  # None: not started

    def to_bytes(self) -> bytes:
        return pickle.dumps({name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def from_bytes(cls, data: bytes) -> StreamState:
        """Raises ValueError for bytes that are not from `to_bytes`."""
        try:
            return cls(**_Unpickler(io.BytesIO(data)).load())
        except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"data loader state cannot be read: {error}") from None

    def check(self, identity: str, stream: int) -> None:
        """Raises ValueError where this state is that of another stream or other data."""
        if self.identity != identity:
            raise ValueError(
                f"data loader state: saved with [{self.identity}], this loader has [{identity}]: "
                "resume with the same data and the same ranks x workers"
            )
        if self.stream != stream:
            raise ValueError(
                f"data loader state: the entry of stream {self.stream} was given to stream "
                f"{stream}: give the entries to the ranks in their order"
            )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a loader state")
        return super().find_class(module, name)
