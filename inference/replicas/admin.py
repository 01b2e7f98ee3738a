"""Administrator's routes, for this machine only: list replicas, take one out of service, restart
all."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from inference.replicas.front import Front
from inference.replicas.replica import Replica
from inference.serve.access import Access
from inference.serve.app import UNAUTHORIZED
from inference.serve.chat import refusal
from inference.serve.limits import Refused
from inference.serve.server import is_loopback


def add_admin_routes(app: FastAPI, front: Front, access: Access) -> None:
    """Adds `/admin/replicas` and what can be done with them."""

    def refused(request: Request) -> Response | None:
        if not access.is_operator(request):
            return refusal(UNAUTHORIZED)
        # A header that a proxy has not written may have anything in place of an address.
        if request.client is None or not is_loopback(request.client.host):
            return refusal(Refused("host", "only from the machine of the server"))
        return None

    def found(number: str) -> Replica | None:
        return next((r for r in front.replicas if str(r.number) == number), None)

    @app.get("/admin/replicas")
    async def replicas(request: Request) -> Response:
        described = [replica.describe() for replica in front.replicas]
        return refused(request) or JSONResponse({"replicas": described})

    @app.post("/admin/restart")
    async def restart(request: Request) -> Response:
        wrong = refused(request)
        if wrong is not None:
            return wrong
        if not front.restart():
            return refusal(Refused("overloaded", "a restart is under way"))
        return JSONResponse({"restarting": len(front.processes)}, 202)

    @app.post("/admin/replicas/{number}/{action}")
    async def act(request: Request, number: str, action: str) -> Response:
        wrong, replica = refused(request), found(number)
        if wrong is not None:
            return wrong
        if replica is None or action not in ("drain", "resume"):
            return refusal(Refused("not_found", "/admin/replicas/NUMBER/drain, or resume"))
        replica.held = action == "drain"
        if replica.held:
            await front.drain(replica)
        front.places.pump()
        return JSONResponse(replica.describe())
