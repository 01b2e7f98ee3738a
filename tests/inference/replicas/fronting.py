"""A front and its replicas in threads of the test's process, on real sockets."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from tests.inference.serve.serving import Client, serving

FRONT_KEY = "key-of-the-front"


@dataclass
class Fronted:
    """A front that runs: its address, and what it holds."""

    host: str
    front: Front
    engines: Sequence[Engine]

    @property
    def http(self) -> str:
        return f"http://{self.host}"

    def open(self, key: str | None = None, query: str = "") -> Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = f"ws://{self.host}/v1/realtime{query}"
        return Client(connect(url, additional_headers=headers, max_size=None, open_timeout=60))


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
        stack.callback(thread.join, 60)
        stack.callback(setattr, server, "should_exit", True)
        until = time.monotonic() + 300
        while not server.started or any(r.state != "ready" for r in replicas):
            assert time.monotonic() < until, "the front did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Fronted(f"127.0.0.1:{port}", front, engines)
