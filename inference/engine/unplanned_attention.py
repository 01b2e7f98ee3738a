"""torch's attention without the kernel that is planned for one length.

cuDNN's, which torch prefers on Hopper, is planned anew for each length that it has not met, 0.14 s
a shape on an H200; and a first token after 256 frames took 188 ms there with it also when planned,
72 without.
"""

from __future__ import annotations

from threading import Lock

from data_pipeline import devices


class UnplannedAttention:
    """A context in which torch takes no kernel of cuDNN's. torch has one switch for all threads of
    a process, and `sdpa_kernel` of two threads that overlap leaves it off: here the last one that
    leaves sets it to what it was."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = devices.plan_attention(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                devices.plan_attention(self._before)


unplanned_attention = UnplannedAttention()
