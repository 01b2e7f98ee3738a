"""Messages between a front and its replicas (inference/replicas/): values as JSON, then bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from inference.serve.accounts import Usage
from inference.serve.limits import Limits

ROUTE = "/v1/front"  # a replica's, for its front alone
# What an answer to a chat request tells its front beside the answer: a header, and lines before its
# pieces, or before the one of a whole answer while it is made.
REQUESTED = "X-Moss-Asked"
USED_LINE = b": used "
_HEAD = struct.Struct(">I")
# Bytes at most: what a front keeps of a session beside its pictures; what is around a client's.
_KEPT, _AROUND = 2**24, 4096


def largest_message(limits: Limits, tile: int | None) -> int:
    """Bytes of a WebSocket's message that a server takes; more closes the socket. tile: of a
    replica: its front sends what clients send, with more around it, and sessions that move."""
    of_client = 2 * limits.frame_bytes  # base64 in JSON is a third larger
    return of_client if tile is None else max(of_client, 3 * tile * tile, _KEPT) + _AROUND


@cache
def code() -> str:
    """A digest of what makes and reads these messages: a front and a replica with another one may
    not understand each other."""
    inference, digest = Path(__file__).resolve().parents[1], sha256()
    for folder in ("replicas", "serve", "session"):
        for file in sorted((inference / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def pack(values: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """A message as bytes: the values, then each blob with its length."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    parts = [_HEAD.pack(len(text)), text]
    for blob in blobs:
        parts += [_HEAD.pack(len(blob)), blob]
    return b"".join(parts)


def unpack(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The values and blobs of a message. Raises ValueError or struct.error for one that is not
    whole."""
    parts, at = list[bytes](), 0
    while at < len(message):
        (size,) = _HEAD.unpack_from(message, at)
        at += _HEAD.size
        parts.append(message[at : at + size])
        at += size
    return json.loads(parts[0]), parts[1:]


def usage_text(usage: Usage) -> str:
    return f"{usage.frames} {usage.input_tokens} {usage.output_tokens}"


def usage_of(text: str | bytes) -> Usage:
    """Reads the text of `usage_text`."""
    return Usage(*map(int, text.split()))
