"""The server's routes: page, health, metrics, models, chat completions, real-time sessions."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from data_pipeline import devices
from inference.engine.engine import EngineFull
from inference.export_info import ExportInfo
from inference.serve.access import Access, Visits, begin
from inference.serve.accounts import Account, Visit
from inference.serve.chat import complete, refusal
from inference.serve.connections import is_allowed_host
from inference.serve.cors import Cors, is_allowed_origin
from inference.serve.hub import MODEL, Hub
from inference.serve.limits import Refused
from inference.serve.openapi import document
from inference.serve.replica import add_front_route
from inference.serve.session_socket import (
    FAILED,
    GOING_AWAY,
    POLICY,
    TRY_LATER,
    UNKNOWN,
    cut,
    refusal_to_resume,
    written,
)
from inference.serve.socket import Connection
from inference.serve.wire import code
from inference.session.events import Event
from inference.session.handle import SessionClosed

STATIC = Path(__file__).parent / "static"
PAGE = STATIC / "index.html"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PIECES = {path.name: path for path in STATIC.iterdir() if path.suffix in (".css", ".js")}
_MODEL_CARD = {"id": MODEL, "object": "model", "created": 0, "owned_by": "moss"}
_CHAT, _REALTIME, _PROTOCOL = "/v1/chat/completions", "/v1/realtime", "realtime"
# Other forms of a question, in place of which clients can use this one.
_OTHER_FORMS = re.compile("(/v1)?/(responses|completions|messages)")


class Service(Protocol):
    """What the routes serve: a model in this process, or replicas of it (inference/replicas)."""

    export: ExportInfo

    def refused(self, reason: str) -> None:
        """Counts a session or a request that is turned away."""

    async def health(self) -> dict[str, Any]:
        """`status`, `ok` if it serves, and more."""

    async def metrics_page(self) -> bytes:
        """The metrics in Prometheus' form."""

    async def complete(self, request: Request, visit: Visit) -> Response:
        """Answers a chat request."""

    async def realtime(
        self, socket: WebSocket, account: Account, name: str | None, last_seq: int
    ) -> None:
        """Serves an accepted socket: a new session, or the one of this name. Refused: by a limit
        of the account."""


def make_app(
    hub: Hub,
    access: Access | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> ASGIApp:
    """The app with the routes over a hub. Arguments as of `make_routes`."""
    access = access or Access()
    app = make_routes(Model(hub), access, origins, hosts)
    if access.front_key is not None:
        add_front_route(app, hub, access.front_key)
    return guarded(app, origins, hosts)


def guarded(app: FastAPI, origins: Sequence[str], hosts: Sequence[str]) -> ASGIApp:
    """All routes, for browsers, too; as in `make_routes`."""

    @app.websocket("/{path:path}")
    async def wrong_socket(socket: WebSocket) -> None:
        path = socket.url.path
        words = f"a WebSocket of {path:.80}: {_no_route(app, path)}"
        if path in _paths(app):
            words = f"a WebSocket of {path}: sessions are at {_REALTIME}"
        await socket.send_denial_response(refusal(Refused("not_found", words)))

    return Cors(Visits(app), origins, hosts, partial(_methods, app))


def make_routes(
    service: Service, access: Access, origins: Sequence[str], hosts: Sequence[str]
) -> FastAPI:
    """The routes over a service.

    Args:
        access: who may ask.
        origins: other sites whose pages may ask and open sessions.
        hosts: names of this server beside its addresses and those that the machine knows.
    """
    app = FastAPI(
        title="MOSS-Video", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    @app.get("/health")
    async def health() -> Response:
        body = {
            **await service.health(),
            "model": MODEL,
            "stage": service.export.stage,
            **({} if access.front_key is None else {"code": code()}),
            "prompt_form": service.export.prompt_form,
            "tile": service.export.tile,
            "weights": service.export.weights,
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not access.is_operator(request):
            return refusal(UNAUTHORIZED)
        page = await service.metrics_page() + access.page()
        return Response(page, media_type="text/plain; version=0.0.4")

    @app.websocket(_REALTIME)
    async def realtime(socket: WebSocket) -> None:
        offered = socket.headers.get("sec-websocket-protocol", "")
        chosen = _PROTOCOL if _PROTOCOL in [p.strip() for p in offered.split(",")] else None
        await socket.accept(subprotocol=chosen)
        if not is_allowed_host(socket.headers.get("host"), hosts):
            return await refuse(socket, service, POLICY, "host", "not a name of this server")
        account = access.find(socket)
        if account is None:
            access.turned_away(None, "realtime", UNAUTHORIZED.code)
            return await refuse(socket, service, POLICY, "unauthorized", "a wrong or no API key")
        if not is_allowed_origin(socket.headers.get("origin"), socket.headers.get("host"), origins):
            words = "this page may not open sessions"
            return await refuse(socket, service, POLICY, "origin", words)
        if service.export.watches is False:
            words = f"this model has not learned to watch: use {_CHAT}"
            return await refuse(socket, service, POLICY, "not_realtime", words)
        await _open(socket, service, account)

    _add_chat(app, service, access)
    _add_page(app)
    _add_models(app, access)
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
            "memory_free": devices.free_memory(runner.engine.device),
            "session_bytes": self.hub.each.total,
        }

    async def metrics_page(self) -> bytes:
        return self.hub.page()

    async def complete(self, request: Request, visit: Visit) -> Response:
        return await complete(request, self.hub, visit)

    async def realtime(
        self, socket: WebSocket, account: Account, name: str | None, last_seq: int
    ) -> None:
        hub, live = self.hub, None if name is None else self.hub.find(name)
        wrong = "" if name is None else refusal_to_resume(live, account, last_seq)
        if wrong:
            return await refuse(socket, self, UNKNOWN, "unknown_session", wrong)
        visit = account.enter("realtime", socket.headers) if name is None else None
        try:
            if visit is not None:
                live = await hub.open()
                live.begin(visit)
            else:
                assert live is not None
                await hub.revive(live)
        except EngineFull as error:
            return await refuse(socket, self, TRY_LATER, "full", str(error), visit)
        except SessionClosed as error:
            return await refuse(socket, self, GOING_AWAY, "closing", str(error), visit)
        except BaseException:
            if visit is not None:
                visit.end(FAILED)
            raise
        await Connection(hub, live, socket, last_seq).run()


def _add_chat(app: FastAPI, service: Service, access: Access) -> None:
    @app.post(_CHAT)
    async def chat(request: Request) -> Response:
        account = access.find(request)
        if account is None:
            access.turned_away(None, "chat", UNAUTHORIZED.code)
            service.refused(UNAUTHORIZED.code)
            return refusal(UNAUTHORIZED)
        try:
            visit = account.enter("chat", request.headers)
        except Refused as error:
            service.refused(error.code)
            return refusal(error)
        begin(request, visit)
        return await service.complete(request, visit)


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    async def page() -> Response:
        return _file(PAGE)

    @app.get("/static/{name}")
    async def piece(name: str) -> Response:
        if name not in _PIECES:
            raise HTTPException(404)
        return _file(_PIECES[name])


def _file(path: Path) -> Response:
    """All of it, whatever part is asked for: a few kilobytes."""
    kind = _KINDS[path.suffix]
    return Response(path.read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})


def _add_models(app: FastAPI, access: Access) -> None:
    """Adds the list of the one model, the model by its name, and the document that describes all
    routes."""

    @app.get("/openapi.json")
    def described() -> Response:  # in a thread: it is written at the first request
        return JSONResponse(document())

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if access.find(request) is None:
            return refusal(UNAUTHORIZED)
        return JSONResponse({"object": "list", "data": [_MODEL_CARD]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        if access.find(request) is None:
            return refusal(UNAUTHORIZED)
        if name != MODEL:
            return refusal(Refused("model_not_found", f"{name!r:.60}: this server has {MODEL}"))
        return JSONResponse(_MODEL_CARD)


def _add_errors(app: FastAPI) -> None:
    """Answers errors of the framework in the same form as those of the routes."""

    @app.exception_handler(HTTPException)
    async def wrong(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        where = f"{request.method} {path:.80}"
        if path == _REALTIME:
            words = f"{where}: sessions are WebSockets: the request has no `Upgrade: websocket`, "
            answer = refusal(Refused("upgrade_required", f"{words}which a proxy must pass on"))
            answer.headers["Upgrade"] = "websocket"
            return answer
        if error.status_code == 405:
            words = f"{where}: this route has no such method"
            answer = refusal(Refused("method_not_allowed", words))
            answer.headers["Allow"] = ", ".join(_methods(app, path))
            return answer
        return refusal(Refused("not_found", f"{where}: {_no_route(app, path)}"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return refusal(Refused("failed", f"the server failed: {type(error).__name__}"))


def _paths(app: FastAPI) -> list[str]:
    """Paths of the routes without parameters."""
    found = dict.fromkeys(getattr(route, "path", "") for route in app.routes)
    return [path for path in found if path and "{" not in path]


def _no_route(app: FastAPI, path: str) -> str:
    """The message for a path that leads nowhere. It names the path that is probably meant, as where
    the prefix is missing, or a proxy has left its own."""
    routes, requested = [one for one in _paths(app) if one != "/"], re.sub("/+", "/", path)
    near = [_CHAT] if _OTHER_FORMS.fullmatch(requested) else []
    near += [
        one
        for one in routes
        if requested.endswith(one) or (requested != "/" and one.endswith(requested))
    ]
    near += get_close_matches(requested, routes, 1)
    return f"there is no such route: {f'{near[0]} is' if near else '/openapi.json lists them'}"


def _methods(app: FastAPI, path: str) -> list[str]:
    """HTTP methods that a path allows; [] where there is no such route."""
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path_regex.match(path):
            methods |= route.methods or set()
    return sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])} if methods else [])


async def _open(socket: WebSocket, service: Service, account: Account) -> None:
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
    try:
        await service.realtime(socket, account, name, 0 if name is None else int(last))
    except Refused as error:
        data = {"code": error.code, "message": str(error), "retry_after_s": error.retry}
        for text in written(Event("error", 0, time.time(), 0.0, data), of_openai=False):
            await socket.send_text(text)
        await refuse(socket, service, TRY_LATER, error.code, str(error))


async def refuse(
    socket: WebSocket,
    service: Service,
    code: int,
    reason: str,
    words: str,
    visit: Visit | None = None,
) -> None:
    """Closes a socket that was accepted, and counts it. visit: ends with it."""
    service.refused(reason)
    if visit is not None:
        visit.code = reason
        visit.end(code)
    await socket.close(code, cut(words))


UNAUTHORIZED = Refused("unauthorized", "a wrong or no API key: Authorization: Bearer KEY")
