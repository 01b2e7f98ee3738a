"""The server's routes: page, health, metrics, models, chat completions, real-time sessions."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from inference.engine.engine import EngineFull
from inference.serve.chat import complete, refusal
from inference.serve.connections import known_host
from inference.serve.cors import Cors, may_ask
from inference.serve.hub import GOING_AWAY, MODEL, POLICY, TRY_LATER, UNKNOWN, Hub
from inference.serve.limits import Refused
from inference.serve.openapi import document
from inference.serve.socket import Connection, cut
from inference.session.handle import SessionClosed

STATIC = Path(__file__).parent / "static"
PAGE = STATIC / "index.html"
_PIECES = {path.name: path for path in STATIC.iterdir() if path.suffix in (".css", ".js")}
_MODEL_CARD = {"id": MODEL, "object": "model", "created": 0, "owned_by": "moss"}
_PROTOCOL, _KEY_PROTOCOL = "realtime", "openai-insecure-api-key."  # how browsers send a key


def make_app(
    hub: Hub, api_key: str | None = None, origins: Sequence[str] = (), hosts: Sequence[str] = ()
) -> ASGIApp:
    """The routes over a hub.

    Args:
        api_key: that clients must send; None: none.
        origins: other sites whose pages may ask and open sessions.
        hosts: names of this server beside its addresses and those that the machine knows.
    """
    app = FastAPI(
        title="MOSS-Video", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    def allowed(connection: HTTPConnection) -> bool:
        return api_key is None or hmac.compare_digest(_given_key(connection), api_key.encode())

    @app.get("/health")
    async def health() -> Response:
        body = {
            "status": hub.status,
            "step_seconds": round(hub.runner.busy, 3),
            "model": MODEL,
            "stage": hub.export.stage,
            "prompt_form": hub.export.prompt_form,
            "sessions": hub.runner.sessions,
            "max_sessions": hub.runner.engine.max_sessions,
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not allowed(request):
            return refusal(_UNAUTHORIZED)
        return Response(hub.metrics.page(hub.runner), media_type="text/plain; version=0.0.4")

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
        if not known_host(socket.headers.get("host"), hosts):
            return await _refuse(socket, hub, POLICY, "host", "not a name of this server")
        if not allowed(socket):
            return await _refuse(socket, hub, POLICY, "unauthorized", "a wrong or no API key")
        if not may_ask(socket.headers.get("origin"), socket.headers.get("host"), origins):
            return await _refuse(socket, hub, POLICY, "origin", "this page may not open sessions")
        if hub.export.watches is False:
            words = "this model has not learned to watch: use /v1/chat/completions"
            return await _refuse(socket, hub, POLICY, "not_realtime", words)
        await _serve(socket, hub)

    _add_page(app)
    _add_models(app, allowed)
    _add_errors(app)
    return Cors(app, origins, hosts, partial(_methods, app))


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    @app.get("/static/{name}")
    async def piece(name: str) -> Response:
        if name not in _PIECES:
            raise HTTPException(404)
        return FileResponse(_PIECES[name], headers={"Cache-Control": "no-cache"})


def _add_models(app: FastAPI, allowed: Callable[[HTTPConnection], bool]) -> None:
    """The list of the one model, and it by its name; the document that describes all routes."""

    @app.get("/openapi.json")
    def described() -> Response:  # in a thread: it is written at the first request
        return JSONResponse(document())

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not allowed(request):
            return refusal(_UNAUTHORIZED)
        return JSONResponse({"object": "list", "data": [_MODEL_CARD]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        if not allowed(request):
            return refusal(_UNAUTHORIZED)
        if name != MODEL:
            return refusal(Refused("model_not_found", f"{name!r:.60}: this server has {MODEL}"))
        return JSONResponse(_MODEL_CARD)


def _add_errors(app: FastAPI) -> None:
    """What no route refuses is refused in the same form."""

    @app.exception_handler(HTTPException)
    async def wrong(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path:.80}"
        if error.status_code == 405:
            return refusal(Refused("method_not_allowed", f"{where}: this route has no such method"))
        return refusal(Refused("not_found", f"{where}: there is no such route"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return refusal(Refused("failed", f"the server failed: {type(error).__name__}"))


def _methods(app: FastAPI, path: str) -> list[str]:
    """Those of a path; none where there is no such route."""
    known: set[str] = set()
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path_regex.match(path):
            known |= route.methods or set()
    return sorted({*known, "OPTIONS", *(["HEAD"] if "GET" in known else [])} if known else [])


async def _serve(socket: WebSocket, hub: Hub) -> None:
    """Opens a session, or resumes one: `?session=ID&last_seq=N`."""
    query = socket.query_params
    name, last, live = query.get("session"), query.get("last_seq", "0"), None
    unknown = [key for key in query if key not in ("session", "last_seq", "model")]
    if unknown or query.get("model", MODEL) != MODEL:
        words = f"?{unknown[0]}: known are session, last_seq" if unknown else f"model: {MODEL}"
        return await _refuse(socket, hub, POLICY, "unknown_field", words)
    if name is not None:
        live = hub.find(name)
        if live is None or not re.fullmatch("[0-9]{1,18}", last):
            words = "last_seq must be a number" if live else "no such session, or it was closed"
            return await _refuse(socket, hub, UNKNOWN, "unknown_session", words)
    try:
        if live is None:
            live, last = await hub.open(), "0"
        else:
            await hub.revive(live)
    except EngineFull as error:
        return await _refuse(socket, hub, TRY_LATER, "full", str(error))
    except SessionClosed as error:
        return await _refuse(socket, hub, GOING_AWAY, "closing", str(error))
    await Connection(hub, live, socket, int(last)).run()


async def _refuse(socket: WebSocket, hub: Hub, code: int, reason: str, words: str) -> None:
    hub.metrics.refused(reason)
    await socket.close(code, cut(words))


_UNAUTHORIZED = Refused("unauthorized", "a wrong or no API key: Authorization: Bearer KEY")


def _given_key(connection: HTTPConnection) -> bytes:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.encode("latin-1")  # as it came
    for offered in connection.headers.get("sec-websocket-protocol", "").split(","):
        if offered.strip().startswith(_KEY_PROTOCOL):
            return offered.strip().removeprefix(_KEY_PROTOCOL).encode("latin-1")
    return b""
