"""Refuses requests whose end a proxy may see elsewhere, before anything of them is read.

Where a proxy and the server behind it disagree on where a request ends, what follows is another
request for one of them: the bytes of one client would begin the request of another one (request
smuggling). RFC 9112 names what may be read in two ways (sections 2.2, 5.2, 6.1, 6.3, 7.1); of that,
h11 accepts a part.
"""

from __future__ import annotations

import re

import h11

_FOLDED = re.compile(rb"\r\n[ \t]")
_LENGTHS = re.compile(rb"^content-length:[ \t]*(.*?)[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^#]*|\?[^#]*|)", re.IGNORECASE)  # host, the rest
_SMALL_CHUNKS = 4096  # of a body: each takes as long to read as a thousand bytes
_CHUNK = 1024  # bytes of all further ones, on average


class Framing(h11.Connection):
    """h11's side of a server, which refuses what may be read in two ways.

    wrong: why the last request was refused. status: of the answer to it. of_events: whether the
    answer that is sent is a stream of events, in pieces of whole lines.
    """

    wrong, status = "", 400
    of_events = False
    _chunks = _bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.wrong:
            raise h11.RemoteProtocolError(self.wrong)
        try:
            return self._next_event()
        except h11.RemoteProtocolError as error:
            self.wrong, self.status = str(error), error.error_status_hint
            raise

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if isinstance(event, h11.Response):
            kinds = [value for name, value in event.headers if name == b"content-type"]
            self.of_events = any(kind.startswith(b"text/event-stream") for kind in kinds)
        return super().send(event)

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        unread = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        event = super().next_event()
        if isinstance(event, h11.Request):
            head = unread[: len(unread) - len(self.trailing_data[0])]
            wrong = ambiguity(head, event)
            if wrong:
                raise h11.RemoteProtocolError(wrong)
            self._chunks = self._bytes = 0
            return _as_routed(event)
        if isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > _SMALL_CHUNKS + self._bytes / _CHUNK:
                raise h11.RemoteProtocolError(f"{self._chunks} chunks of {self._bytes} bytes")
        return event


def ambiguity(head: bytes, request: h11.Request) -> str:
    """What of a request can be read in two ways; "": nothing. head: its bytes up to the body."""
    lines = head.replace(b"\r\n", b"")
    lengths = _LENGTHS.findall(head)
    body = _coded(request) or any(length != b"0" for length in lengths)
    # Others (h2c) are only offered, with any request.
    socket = any(name == b"upgrade" and b"websocket" in v.lower() for name, v in request.headers)
    found = [
        (b"\n" in lines or b"\r" in lines, "a line does not end with CR LF"),
        (_FOLDED.search(head), "a header goes on in the next line"),
        (len(lengths) > 1 or any(b"," in one for one in lengths), "more than one Content-Length"),
        (_coded(request) and lengths, "both Content-Length and Transfer-Encoding"),
        (_coded(request) and request.http_version < b"1.1", "Transfer-Encoding in HTTP/1.0"),
        (request.http_version not in (b"1.0", b"1.1"), "neither HTTP/1.0 nor HTTP/1.1"),
        (socket and body, "a request for a WebSocket has no body"),
        (_other_host(request), "its target names another host than Host"),
    ]
    return next((words for wrong, words in found if wrong), "")


def _coded(request: h11.Request) -> bool:
    return any(name == b"transfer-encoding" for name, _ in request.headers)


def _other_host(request: h11.Request) -> bool:
    """Whether an absolute target and `Host` differ: one of them would be ignored."""
    absolute = _ABSOLUTE.fullmatch(request.target)
    hosts = [value for name, value in request.headers if name == b"host"]
    return absolute is not None and any(host.lower() != absolute[1].lower() for host in hosts)


def _as_routed(request: h11.Request) -> h11.Request:
    """The request with the path alone as its target, where it has all of its URL, as some proxies
    send it (RFC 9112, 3.2.2). One in chunks is the last one of its connection: bytes that others
    take for its chunks are then not read as another request."""
    absolute, coded = _ABSOLUTE.fullmatch(request.target), _coded(request)
    if not (absolute or coded):
        return request
    path = absolute[2] if absolute else request.target
    return h11.Request(
        method=request.method,
        target=path if path[:1] == b"/" or not absolute else b"/" + path,
        headers=[*request.headers.raw_items(), *([(b"Connection", b"close")] if coded else [])],
        http_version=request.http_version,
    )
