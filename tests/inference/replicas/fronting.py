"""A front and its replicas in threads of the test's process, on real sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from websockets.sync.client import connect

from inference.engine.engine import Engine
from inference.export_info import ExportInfo
from inference.replicas.admin import add_admin_routes
from inference.replicas.front import Front
from inference.replicas.replica import Replica
from inference.serve.access import Access
from inference.serve.app import guarded, make_routes
from inference.serve.limits import Limits
from inference.serve.server import Server, server_config
from tests.inference.serve.serving import PATIENT, Client, between_turns, serving
from tests.waiting import PATIENCE, until

FRONT_KEY = "key-of-the-front"
T = TypeVar("T")


@dataclass
class Fronted:
    """A front that runs: its address, and what it holds."""

    host: str
    front: Front
    engines: Sequence[Engine]
    server: Server

    @property
    def http(self) -> str:
        return f"http://{self.host}"

    def open(self, key: str | None = None, query: str = "") -> Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = f"ws://{self.host}/v1/realtime{query}"
        return Client(connect(url, additional_headers=headers, max_size=None, **PATIENT))

    def between_turns(self, function: Callable[[], T]) -> T:
        """What a function returns in the front's event loop."""
        return between_turns(self.server, function)


@contextlib.contextmanager
def fronting(
    engines: Sequence[Engine],
    access: Access,
    limits: Limits | None = None,
    replica_access: Sequence[Access] | None = None,
    pictures: int = 2**20,
) -> Iterator[Fronted]:
    """pictures: bytes of them that a session may have at the front."""
    limits = limits or Limits()
    accesses = replica_access or [Access(front_key=FRONT_KEY) for _ in engines]
    with contextlib.ExitStack() as stack:
        replicas = []
        for number, (engine, its) in enumerate(zip(engines, accesses, strict=True)):
            running = stack.enter_context(serving(engine, limits, access=its))
            replicas.append(Replica(number, running.http, FRONT_KEY))
        front = Front(replicas, [], limits, ExportInfo("realtime", "realtime_sft"), pictures)
        app = make_routes(front, access, (), ())
        add_admin_routes(app, front, access)
        config = server_config(guarded(app, (), ()), "127.0.0.1", 0, limits)
        server = Server(config, front)
        thread = threading.Thread(target=server.run, name="front")
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(setattr, server, "should_exit", True)
        until(lambda: server.started and all(r.state == "ready" for r in replicas))
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Fronted(f"127.0.0.1:{port}", front, engines, server)
