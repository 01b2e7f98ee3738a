"""Pictures and videos in JSON: `data:` URLs as browsers and programs write them, and base64."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from inference.serve.limits import Refused

# The head ends here: a recorder's media type has commas of its own (codecs=vp8,opus).
_BASE64 = re.compile(r";\s*base64\s*,", re.IGNORECASE)
_LONGEST_HEAD = 1024
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/_=%\s-]", re.ASCII)


def data_name(url: object, field: str) -> str:
    """A `data:` URL as it is; Refused: it is another URL, or a path."""
    text = url.lstrip() if isinstance(url, str) else ""
    if text[:5].lower() != "data:":
        prefix = f"{url!r:.60}: " if isinstance(url, str) else ""
        words = f"{field}: {prefix}only data: URLs are taken (data:image/jpeg;base64,...)"
        raise Refused("invalid_url", words, field)
    return text


def data_url(url: object, field: str, most: int) -> bytes:
    """The bytes of a `data:` URL, at most `most`; what they are is not its media type's to say.

    Raises:
        Refused: it is another URL or a path, is broken, or is too large.
    """
    text = data_name(url, field)
    head = _BASE64.search(text, 5, 5 + _LONGEST_HEAD)
    if head:
        return decode_base64(text[head.end() :], field, most)
    _, comma, body = text.partition(",")
    if not comma:
        raise Refused("invalid_url", f"{field}: a data: URL without a comma has no data", field)
    return _sized(unquote_to_bytes(body.encode("utf-8", "replace")), field, most)


def media_bytes(value: object, field: str, most: int) -> bytes:
    """The bytes of base64, or of a `data:` URL; Refused."""
    if isinstance(value, str) and value[:32].lstrip()[:5].lower() == "data:":
        return data_url(value, field, most)
    return decode_base64(value, field, most)


def decode_base64(text: object, field: str, most: int) -> bytes:
    """The bytes. White space is skipped; both alphabets are read, with or without padding, and with
    characters written as %XX. Refused: the text is not base64, or stands for more than `most`."""
    if not isinstance(text, str):
        raise Refused("invalid_value", f"{field}: expected base64", field)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = _lenient(text, field)
    return _sized(data, field, most)


def _lenient(text: str, field: str) -> bytes:
    wrong = _NO_BASE64.search(text)
    if wrong:
        words = f"{field}: is not base64: character {wrong.start() + 1} is {wrong.group()!r}"
        raise Refused("invalid_value", words, field)
    plain = unquote_to_bytes(text) if "%" in text else text.encode()
    letters = b"".join(plain.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error as error:
        words = f"{field}: is not base64: {len(letters)} characters: {error}"
        raise Refused("invalid_value", words, field) from None


def _sized(data: bytes, field: str, most: int) -> bytes:
    if not data:
        raise Refused("invalid_value", f"{field}: is empty", field)
    if len(data) > most:
        raise Refused("too_large", f"{field}: {len(data)} bytes are more than {most}", field)
    return data
