"""The server's routes: page, health, metrics, models, chat completions, real-time sessions."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from inference.engine.engine import EngineFull
from inference.engine.memory import memory_free
from inference.export_info import ExportInfo
from inference.serve.chat import complete, refusal
from inference.serve.connections import known_host
from inference.serve.cors import Cors, may_ask
from inference.serve.held import GOING_AWAY, POLICY, TRY_LATER, UNKNOWN, cut
from inference.serve.hub import MODEL, Hub
from inference.serve.limits import Refused
from inference.serve.openapi import document
from inference.serve.replica import add_front_route
from inference.serve.socket import Connection
from inference.session.handle import SessionClosed

STATIC = Path(__file__).parent / "static"
PAGE = STATIC / "index.html"
_PIECES = {path.name: path for path in STATIC.iterdir() if path.suffix in (".css", ".js")}
_MODEL_CARD = {"id": MODEL, "object": "model", "created": 0, "owned_by": "moss"}
_PROTOCOL, _KEY_PROTOCOL = "realtime", "openai-insecure-api-key."  # how browsers send a key


class Service(Protocol):
    """What the routes serve: a model in this process, or replicas of it (inference/replicas)."""

    export: ExportInfo

    def refused(self, reason: str) -> None:
        """Counts a session or a request that is turned away."""

    async def health(self) -> dict[str, Any]:
        """`status`, `ok` if it serves, and more."""

    async def metrics_page(self) -> bytes:
        """In Prometheus' form."""

    async def complete(self, request: Request) -> Response:
        """Answers a chat request."""

    async def realtime(self, socket: WebSocket, name: str | None, last_seq: int) -> None:
        """Serves an accepted socket: a new session, or the one of this name."""


def make_app(
    hub: Hub,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
    front_key: str | None = None,
) -> ASGIApp:
    """The routes over a hub; as in `make_routes`. front_key: of the front whose replica this is."""
    keys = [key for key in (api_key, front_key) if key is not None]
    app = make_routes(Model(hub), keys, origins, hosts)
    if front_key is not None:
        add_front_route(app, hub, front_key)
    return guarded(app, origins, hosts)


def guarded(app: FastAPI, origins: Sequence[str], hosts: Sequence[str]) -> ASGIApp:
    """Routes for browsers; as in `make_routes`."""
    return Cors(app, origins, hosts, partial(_methods, app))


def make_routes(
    service: Service, keys: Sequence[str], origins: Sequence[str], hosts: Sequence[str]
) -> FastAPI:
    """The routes over a service.

    Args:
        keys: of which clients must send one; empty: none.
        origins: other sites whose pages may ask and open sessions.
        hosts: names of this server beside its addresses and those that the machine knows.
    """
    app = FastAPI(
        title="MOSS-Video", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    allowed = key_check(keys)

    @app.get("/health")
    async def health() -> Response:
        body = {
            **await service.health(),
            "model": MODEL,
            "stage": service.export.stage,
            "prompt_form": service.export.prompt_form,
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not allowed(request):
            return refusal(UNAUTHORIZED)
        return Response(await service.metrics_page(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if not allowed(request):
            service.refused("unauthorized")
            return refusal(UNAUTHORIZED)
        return await service.complete(request)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        offered = socket.headers.get("sec-websocket-protocol", "")
        chosen = _PROTOCOL if _PROTOCOL in [p.strip() for p in offered.split(",")] else None
        await socket.accept(subprotocol=chosen)
        if not known_host(socket.headers.get("host"), hosts):
            return await refuse(socket, service, POLICY, "host", "not a name of this server")
        if not allowed(socket):
            return await refuse(socket, service, POLICY, "unauthorized", "a wrong or no API key")
        if not may_ask(socket.headers.get("origin"), socket.headers.get("host"), origins):
            words = "this page may not open sessions"
            return await refuse(socket, service, POLICY, "origin", words)
        if service.export.watches is False:
            words = "this model has not learned to watch: use /v1/chat/completions"
            return await refuse(socket, service, POLICY, "not_realtime", words)
        await _open(socket, service)

    _add_page(app)
    _add_models(app, allowed)
    _add_errors(app)
    return app


class Model:
    """The service of a model in this process."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.export = hub, hub.export
        self.refused = hub.metrics.refused

    async def health(self) -> dict[str, Any]:
        runner = self.hub.runner
        return {
            "status": self.hub.status,
            "step_seconds": round(runner.busy, 3),
            "sessions": runner.sessions,
            "max_sessions": runner.engine.max_sessions,
            "decoders": len(self.hub.pictures.processes),
            "memory_free": memory_free(runner.engine.device),
            "session_bytes": self.hub.each.total,
        }

    async def metrics_page(self) -> bytes:
        return self.hub.page()

    async def complete(self, request: Request) -> Response:
        return await complete(request, self.hub)

    async def realtime(self, socket: WebSocket, name: str | None, last_seq: int) -> None:
        hub, live = self.hub, None if name is None else self.hub.find(name)
        try:
            if live is not None:
                await hub.revive(live)
            elif name is None:
                live = await hub.open()
            else:
                return await refuse(socket, self, UNKNOWN, "unknown_session", UNKNOWN_SESSION)
        except EngineFull as error:
            return await refuse(socket, self, TRY_LATER, "full", str(error))
        except SessionClosed as error:
            return await refuse(socket, self, GOING_AWAY, "closing", str(error))
        await Connection(hub, live, socket, last_seq).run()


def key_check(keys: Sequence[str]) -> Callable[[HTTPConnection], bool]:
    """Whether a request has one of the keys, or needs none."""

    def allowed(connection: HTTPConnection) -> bool:
        given = _given_key(connection)
        return not keys or any([hmac.compare_digest(given, key.encode()) for key in keys])

    return allowed


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
            return refusal(UNAUTHORIZED)
        return JSONResponse({"object": "list", "data": [_MODEL_CARD]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        if not allowed(request):
            return refusal(UNAUTHORIZED)
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


async def _open(socket: WebSocket, service: Service) -> None:
    """Opens a session, or resumes one: `?session=ID&last_seq=N`."""
    query = socket.query_params
    name, last = query.get("session"), query.get("last_seq", "0")
    unknown = [key for key in query if key not in ("session", "last_seq", "model")]
    if unknown or query.get("model", MODEL) != MODEL:
        words = f"?{unknown[0]}: known are session, last_seq" if unknown else f"model: {MODEL}"
        return await refuse(socket, service, POLICY, "unknown_field", words)
    if name is not None and not re.fullmatch("[0-9]{1,18}", last):
        words = "last_seq must be a number"
        return await refuse(socket, service, UNKNOWN, "unknown_session", words)
    await service.realtime(socket, name, 0 if name is None else int(last))


async def refuse(socket: WebSocket, service: Service, code: int, reason: str, words: str) -> None:
    """Closes a socket that was accepted, and counts it."""
    service.refused(reason)
    await socket.close(code, cut(words))


UNKNOWN_SESSION = "no such session, or it was closed"
UNAUTHORIZED = Refused("unauthorized", "a wrong or no API key: Authorization: Bearer KEY")


def _given_key(connection: HTTPConnection) -> bytes:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.encode("latin-1")  # as it came
    for offered in connection.headers.get("sec-websocket-protocol", "").split(","):
        if offered.strip().startswith(_KEY_PROTOCOL):
            return offered.strip().removeprefix(_KEY_PROTOCOL).encode("latin-1")
    return b""
