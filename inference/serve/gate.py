"""Holds a client's messages to the rate limits of its key, before anything else reads them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from inference.serve.accounts import Account

_LARGE = 2**16  # characters: what is longer and may be taken has a picture
_NAP = 1.0  # seconds
# Seconds for which a file's frame waits for tokens: meanwhile nobody hears that its client left.
_PATIENCE = 5.0


class Gate:
    """Holds the messages of one socket to the rates of its account."""

    def __init__(self, account: Account | None) -> None:
        self._account = account
        self._waits = False  # a file's frames wait for their turn, a live source's are dropped

    async def over(self, text: str | None, data: bytes | None) -> str:
        """The limit that a message exceeds; "": it may pass. A frame of a file waits here for a
        short while."""
        account = self._account
        if account is None or account.unlimited:
            return ""
        frame, question = self._read(text, data)
        while frame or question:
            late = account.limit_reached(frame=frame)
            if late is None:
                break
            long = late.limit == "tokens_per_minute" and late.seconds > _PATIENCE
            if question or long or not self._waits:
                account.refused[late.limit] += 1
                return late.words
            await asyncio.sleep(min(late.seconds, _NAP))
        if frame:
            account.take_frame()
        return ""

    def _read(self, text: str | None, data: bytes | None) -> tuple[bool, bool]:
        """Whether a message brings a frame, and whether it asks. Errors in it are found where it is
        handled."""
        if data is not None or text is None or len(text) > _LARGE:
            return True, False
        try:
            message = json.loads(text)
            kind = message["type"]
            if kind == "input_image_buffer.append":
                return message.get("image") is not None, bool(message.get("prompt"))
            if kind == "conversation.item.create":
                content = message["item"]["content"]
                parts = content if isinstance(content, list) else []
                return any(_is_picture(part) for part in parts), True
            source = message["session"].get("source") if kind == "session.update" else None
            self._waits = self._waits if source is None else source == "file"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        return False, False


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "input_image"
