"""The server's routes: page, health, metrics, models, chat completions, real-time sessions."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from inference.engine.engine import EngineFull
from inference.serve.chat import complete, refusal
from inference.serve.hub import GOING_AWAY, MODEL, POLICY, TRY_LATER, UNKNOWN, Hub
from inference.serve.limits import Refused
from inference.serve.socket import Connection
from inference.session.handle import SessionClosed

PAGE = Path(__file__).parent / "static" / "index.html"
_PROTOCOL, _KEY_PROTOCOL = "realtime", "openai-insecure-api-key."  # how browsers send a key


def make_app(hub: Hub, api_key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The routes over a hub. `origins`: other sites whose pages may open sessions."""
    app = FastAPI(title="MOSS-Video", docs_url=None, redoc_url=None, openapi_url=None)

    def allowed(connection: HTTPConnection) -> bool:
        return api_key is None or hmac.compare_digest(_given_key(connection), api_key.encode())

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        body = {
            "status": "closing" if hub.closing else "ok",
            "model": MODEL,
            "stage": hub.export.stage,
            "prompt_form": hub.export.prompt_form,
            "sessions": hub.runner.sessions,
            "max_sessions": hub.runner.engine.max_sessions,
        }
        return JSONResponse(body, 503 if hub.closing else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not allowed(request):
            return refusal(_UNAUTHORIZED)
        return Response(hub.metrics.page(hub.runner), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not allowed(request):
            return refusal(_UNAUTHORIZED)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "moss"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if not allowed(request):
            hub.metrics.refused("unauthorized")
            return refusal(_UNAUTHORIZED)
        return await complete(request, hub)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        offered = socket.headers.get("sec-websocket-protocol", "")
        chosen = _PROTOCOL if _PROTOCOL in [p.strip() for p in offered.split(",")] else None
        await socket.accept(subprotocol=chosen)
        if not allowed(socket):
            return await _refuse(socket, hub, POLICY, "unauthorized", "a wrong or no API key")
        if not _same_origin(socket, origins):
            return await _refuse(socket, hub, POLICY, "origin", "this page may not open sessions")
        if hub.export.watches is False:
            words = "this model has not learned to watch: use /v1/chat/completions"
            return await _refuse(socket, hub, POLICY, "not_realtime", words)
        await _serve(socket, hub)

    return app


async def _serve(socket: WebSocket, hub: Hub) -> None:
    """Opens a session, or resumes one: `?session=ID&last_seq=N`."""
    name, last = socket.query_params.get("session"), socket.query_params.get("last_seq", "0")
    if name is not None:
        live = hub.find(name)
        if live is None or not last.isdigit():
            words = "last_seq must be a number" if live else "no such session, or it was closed"
            return await _refuse(socket, hub, UNKNOWN, "unknown_session", words)
        return await Connection(hub, live, socket, int(last)).run()
    try:
        live = hub.open()
    except EngineFull as error:
        return await _refuse(socket, hub, TRY_LATER, "full", str(error))
    except SessionClosed as error:
        return await _refuse(socket, hub, GOING_AWAY, "closing", str(error))
    await Connection(hub, live, socket, 0).run()


async def _refuse(socket: WebSocket, hub: Hub, code: int, reason: str, words: str) -> None:
    hub.metrics.refused(reason)
    await socket.close(code, words[:120])


_UNAUTHORIZED = Refused("unauthorized", "a wrong or no API key: Authorization: Bearer KEY")


def _given_key(connection: HTTPConnection) -> bytes:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.encode()
    for offered in connection.headers.get("sec-websocket-protocol", "").split(","):
        if offered.strip().startswith(_KEY_PROTOCOL):
            return offered.strip().removeprefix(_KEY_PROTOCOL).encode()
    return b""


def _same_origin(socket: WebSocket, origins: Sequence[str]) -> bool:
    """Browsers send the origin of the page that opens a socket: other sites are refused, for they
    could reach a server on this machine."""
    origin = socket.headers.get("origin")
    if origin is None or origin in origins:
        return True
    return urlsplit(origin).netloc == socket.headers.get("host")
