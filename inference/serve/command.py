"""Runs `python -m inference.serve`: serves a model, or is the front of several replicas."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import NoReturn

from data_pipeline.commands import DONE, FAILED, report_error
from data_pipeline.parent import signalled_with_parent
from inference import cli
from inference.replicas.command import run_front
from inference.serve import media
from inference.serve.access import Access
from inference.serve.app import make_app
from inference.serve.flags import LIMIT_HELP, PROGRAM, parse
from inference.serve.hub import Hub
from inference.serve.limits import Limits
from inference.serve.media_files import MediaFolders
from inference.serve.metrics import Metrics
from inference.serve.server import (
    Certificate,
    ListeningSockets,
    Server,
    allow_files,
    is_local,
    listen,
    server_config,
    url_of,
)
from inference.session.runner import Runner


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    parent = os.environ.pop("MOSS_END_WITH_PARENT", "")
    if parent:
        signalled_with_parent(int(parent))  # which ends with the front
    with cli.one_line_errors(PROGRAM):
        limits = Limits(**{name: getattr(args, f"limit_{name}") for name in LIMIT_HELP})
        allow_files(limits)
        certificate = Certificate.of_flags(args.ssl_certfile, args.ssl_keyfile)
        export = cli.export_info(args)
        if export.watches is None:
            cli.note(
                f"{args.checkpoint} does not say its prompt form: it may not have learned to watch"
            )
        open_to_all = not (args.api_key or args.keys)
        if open_to_all and not is_local(args.host):
            cli.note(f"warning: {args.host} is open to the network, and there is no --api_key")
        if "*" in args.allow_origin and open_to_all:
            cli.note("warning: any site's page may use this server, and there is no --api_key")
        with cli.refusing_values():
            folders = MediaFolders(args.allow_media)
        if args.replicas or args.replica_urls:
            return run_front(args, argv, limits, export, certificate)
        # Before the model is loaded, which takes long; other ranks of torchrun serve nothing.
        sockets = (
            listen(args.host, args.port, args.unix_socket) if cli.leads() else ListeningSockets()
        )
        with cli.refusing_values():
            access = Access.of_flags(args, limits, args.front_key)
        if cli.leads():
            media.prepare()
        metrics = Metrics()
        with (
            sockets,
            closing(access),
            Runner(cli.load(args, args.max_sessions), metrics.measured) as runner,
        ):
            hub = Hub(runner, limits, metrics, export, folders)
            with cli.refusing_values():
                hub.each.check(limits.sessions_memory)
            app = make_app(hub, access, args.allow_origin, args.allow_host)
            # uvicorn raises SIGTERM again after a clean shutdown, which must not kill the process.
            signal.signal(signal.SIGTERM, lambda *_: None)
            cli.note(url_of(args.host, sockets, certificate))
            tile = runner.tile if args.front_key else None
            config = server_config(app, args.host, args.port, limits, certificate, tile)
            server = Server(config, hub)
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
                signal.signal(signal.SIGHUP, server.handle_exit)  # as SIGTERM, which uvicorn takes
            server.run(sockets=sockets)
            if not runner.ended:
                access.close()
                _end_without_engine(hub)
            if runner.failed:
                report_error(PROGRAM, runner.failed)
    return FAILED if runner.failed else DONE


def _end_without_engine(hub: Hub) -> NoReturn:
    """Ends the process, which would wait for a step of the engine that nothing can end."""
    words = f"within {hub.limits.step:g} s the engine does not end its step"
    report_error(PROGRAM, f"{words}: the process ends without it")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)
