"""What every route has: HEAD, OPTIONS, a slash at its end, and headers for other sites' pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.serve.chat import refusal
from inference.serve.connections import is_allowed_host
from inference.serve.limits import Refused

_LONG = "600"  # seconds for which a browser need not ask again
_EXPOSED = "Retry-After, X-Moss-Ignored"  # headers of answers that a page may read


def is_allowed_origin(origin: str | None, host: str | None, origins: Sequence[str]) -> bool:
    """Whether a browser's page may use this server. `origin`: of the page, None: no browser; it is
    its own at `host`, or one of `origins`, of which `*` is any."""
    if origin is None or "*" in origins or origin.lower() in origins:
        return True
    try:
        return urlsplit(origin).netloc == host
    except ValueError:  # of something that is not an address, such as `http://[`
        return False


class Cors:
    """Around the routes. Preflights are answered here: they carry no key. What a page that may not
    ask sends without one is refused, and what is meant for another host.

    Args:
        origins: sites whose pages may ask and read answers, in lower case; `*`: any.
        hosts: names of this server, as in `is_allowed_host`.
        methods: those of a path, empty where there is no such route.
    """

    def __init__(
        self,
        app: ASGIApp,
        origins: Sequence[str],
        hosts: Sequence[str],
        methods: Callable[[str], Sequence[str]],
    ) -> None:
        self._app, self._origins, self._hosts, self._methods = app, origins, hosts, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["type"] == "websocket":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        extra = self._headers(headers.get("origin"))

        async def write(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        wrong = self._refused(headers, scope["method"])
        if wrong:
            return await refusal(wrong)(scope, receive, write)
        if scope["method"] == "OPTIONS":
            return await self._options(headers, scope["path"])(scope, receive, write)
        if scope["method"] == "HEAD":  # the server sends no body to one
            scope["method"] = "GET"
        await self._app(scope, receive, write)

    def _refused(self, headers: Headers, method: str) -> Refused | None:
        if not is_allowed_host(headers.get("host"), self._hosts):
            words = f"{headers['host']:.80} is no name of this server: see --allow_host"
            return Refused("host", words)
        origin = headers.get("origin")
        writes = method not in ("GET", "HEAD", "OPTIONS")
        if writes and not is_allowed_origin(origin, headers.get("host"), self._origins):
            words = f"pages of {origin:.80} may not ask: start the server with --allow_origin"
            return Refused("origin", words)
        return None

    def _headers(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """CORS headers of every answer, errors too."""
        if not self._origins:
            return []
        headers = [(b"vary", b"Origin")]
        if origin is not None and ("*" in self._origins or origin.lower() in self._origins):
            headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
            headers.append((b"access-control-expose-headers", _EXPOSED.encode()))
        return headers

    def _options(self, headers: Headers, path: str) -> Response:
        methods = ", ".join(self._methods(path))
        if not methods:
            return refusal(Refused("not_found", f"there is no route {path:.80}"))
        if "access-control-request-method" not in headers:
            return Response(status_code=204, headers={"Allow": methods})
        origin = headers.get("origin")
        if not is_allowed_origin(origin, headers.get("host"), self._origins):
            words = f"pages of {origin:.80} may not ask: start the server with --allow_origin"
            return refusal(Refused("origin", words))
        requested = headers.get("access-control-request-headers", "authorization, content-type")
        allowed = {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": requested,
            "Access-Control-Max-Age": _LONG,
        }
        if headers.get("access-control-request-private-network") == "true":
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=204, headers=allowed)
