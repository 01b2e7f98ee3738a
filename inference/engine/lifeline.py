"""Ranks end together: where one has gone, all others end within seconds, and say which it was.

A collective that waits for a rank that has died may wait for ever, over NCCL always. So each rank
keeps a connection with rank 0, over which nothing is said but that a rank has gone, or that all is
done. The system closes the connections of a process that dies; of a machine that is cut off it
notices that nothing answers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from data_pipeline.commands import FAILED

GRACE_S = 3.0  # in which a program whose rank has gone may end by itself
# In the environment: a file for the number of the rank that was the first to go. What has started
# the ranks says it, in place of each of them.
NAMED = "MOSS_RANKS_NAMED"
LOOPBACK = "127.0.0.1"
HELLO_S = 10.0  # in which one that connects says who it is
MEET_S = 300.0  # in which all ranks connect
SILENCE_S = 2, 1, 4  # TCP asks after so many seconds, every so many, so many times
DONE = -1  # in place of the number of a rank that has gone
NUMBER = struct.Struct("!q")


class Lifeline:
    """One rank's end of the connections over which ranks learn that one has gone. All ranks make it
    at once.

    Args:
        share: gives rank 0's numbers to all ranks, and returns them.
        host: rank 0's.
    """

    def __init__(
        self, rank: int, ranks: int, share: Callable[[Sequence[int]], list[int]], host: str
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self._ends: dict[int, socket.socket] = {}  # by the rank at the other end
        self._done = threading.Event()
        if rank == 0:
            self._listen(share, host)
        else:
            port, key = share([0, 0])
            end = socket.create_connection((host, port), timeout=MEET_S)
            end.sendall(NUMBER.pack(rank) + NUMBER.pack(key))
            self._ends[0] = end
        for end in self._ends.values():
            _keep_alive(end)
        threading.Thread(target=self._watch, name="moss-ranks", daemon=True).start()

    def close(self) -> None:
        """Says that this rank is done, and so will be the others: from now on none is missed."""
        self._done.set()
        self._send_all(DONE)

    def _listen(self, share: Callable[[Sequence[int]], list[int]], host: str) -> None:
        key, near = secrets.randbits(62), host == LOOPBACK
        both = not near and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        address = LOOPBACK if near else "", 0
        with socket.create_server(address, family=family, dualstack_ipv6=both) as door:
            share([door.getsockname()[1], key])
            door.settimeout(MEET_S)
            while len(self._ends) < self.ranks - 1:
                end, _ = door.accept()
                end.settimeout(HELLO_S)
                rank, secret = _read(end), _read(end)
                if rank is not None and secret == key:
                    self._ends[rank] = end
                else:  # somebody else
                    end.close()

    def _send_all(self, number: int) -> None:
        for end in self._ends.values():
            try:
                end.sendall(NUMBER.pack(number))
            except OSError:  # it has gone, too
                continue

    def _watch(self) -> None:
        with selectors.DefaultSelector() as watched:
            for rank, end in self._ends.items():
                watched.register(end, selectors.EVENT_READ, rank)
            while watched.get_map():
                for key, _ in watched.select():
                    number = _read(self._ends[key.data])
                    if number == DONE or self._done.is_set():
                        watched.unregister(key.fileobj)
                        continue
                    self._end(key.data if number is None else number)
                    return

    def _end(self, ended_rank: int) -> None:
        """A rank has gone: says so, waits until this process has ended by itself, or ends it."""
        if self.rank == 0:
            self._send_all(ended_rank)
        note = os.environ.get(NAMED)
        if note:
            with contextlib.suppress(OSError), open(note, "x") as file:
                file.write(str(ended_rank))  # the first to write it is right
        else:
            words = f"rank {ended_rank} of {self.ranks} has ended: rank {self.rank} ends, too"
            print(words, file=sys.stderr, flush=True)
        if not self._done.wait(GRACE_S):
            os._exit(FAILED)


def host_of(environment: Mapping[str, str] = os.environ) -> str:
    """The address of rank 0, as torchrun says; this machine's own, if all ranks are on it."""
    if environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE"):
        return LOOPBACK
    return environment.get("MASTER_ADDR", LOOPBACK)


def _read(end: socket.socket) -> int | None:
    """The next number; None where the connection has been closed, or is broken."""
    data = b""
    try:
        while len(data) < NUMBER.size:
            piece = end.recv(NUMBER.size - len(data))
            if not piece:
                return None
            data += piece
    except OSError:
        return None
    return int(NUMBER.unpack(data)[0])


def _keep_alive(end: socket.socket) -> None:
    """The system asks whether the other machine is still there."""
    end.settimeout(None)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name, value in zip(names, SILENCE_S, strict=True):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
