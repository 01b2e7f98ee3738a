"""Runs `python -m inference.serve` with --replicas or --replica_urls: as a front."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from data_pipeline import devices
from data_pipeline.commands import DONE, FAILED, report_error
from inference import cli
from inference.engine.engine_config import EngineConfig
from inference.engine.tensor_parallel import check_divisible
from inference.export_info import ExportInfo
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.replicas.admin import add_admin_routes
from inference.replicas.front import Front
from inference.replicas.processes import Process, command
from inference.replicas.replica import Replica
from inference.serve.access import Access
from inference.serve.app import guarded, make_routes
from inference.serve.flags import PROGRAM
from inference.serve.limits import Limits
from inference.serve.memory import picture
from inference.serve.server import Certificate, Server, listen, server_config, url_of
from inference.session.session import SessionConfig


def run_front(
    args: argparse.Namespace,
    argv: Sequence[str],
    limits: Limits,
    export: ExportInfo,
    certificate: Certificate | None,
) -> int:
    """Runs the front until it is told to stop; returns the exit code. argv: the flags that it was
    given."""
    environments = check(args)
    with cli.refusing_values():
        access = Access.of_flags(args, limits)
    with (
        closing(access),
        listen(args.host, args.port) as sockets,
        tempfile.TemporaryDirectory(prefix="moss-front-") as folder,
    ):
        front_key = args.front_key or secrets.token_urlsafe(32)
        replicas, processes = list[Replica](), list[Process]()
        for number in range(args.replicas):
            path = Path(folder) / f"{number}.sock"
            replicas.append(Replica(number, f"unix:{path}", front_key))
            environment = {"MOSS_FRONT_KEY": front_key, **environments[number]}
            started = command(argv, path, args.gpus_per_replica, number)
            processes.append(Process(replicas[-1], started, environment))
        for number, url in enumerate(args.replica_urls, args.replicas):
            replicas.append(Replica(number, url, front_key))
        tile = MossVideoConfig.from_pretrained(args.checkpoint).vision_config.image_size
        pictures = args.window + SessionConfig().max_waiting_frames + 1
        front = Front(replicas, processes, limits, export, pictures * picture(tile))
        with cli.refusing_values():
            front.check()
        app = make_routes(front, access, args.allow_origin, args.allow_host)
        add_admin_routes(app, front, access)
        routes = guarded(app, args.allow_origin, args.allow_host)
        # uvicorn raises SIGTERM again after a clean shutdown, which must not kill the process.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server = Server(server_config(routes, args.host, args.port, limits, certificate), front)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
            signal.signal(signal.SIGHUP, server.handle_exit)
        cli.note(f"{len(replicas)} replicas behind {url_of(args.host, sockets, certificate)}")
        cli.keep_for_life()
        server.run(sockets=sockets)
    if front.failed:
        report_error(PROGRAM, front.failed)
    return FAILED if front.failed else DONE


def check(args: argparse.Namespace) -> list[dict[str, str]]:
    """The environment of each replica: the devices that are its own. CommandError for what cannot
    be, before anything starts."""
    if args.unix_socket:
        raise cli.CommandError("--unix_socket: a front has clients: give --host and --port")
    if args.replica_urls and not args.front_key:
        raise cli.CommandError("--replica_urls: give the --front_key that those replicas have")
    if "RANK" in os.environ:
        raise cli.CommandError("--replicas: not under torchrun: give --gpus_per_replica")
    with cli.refusing_values():
        EngineConfig(window=args.window, sinks=args.sinks, max_tokens=args.max_context)
    with cli.refusing_values():
        check_divisible(MossVideoConfig.from_pretrained(args.checkpoint), args.gpus_per_replica)
        kind = devices.find(args.device, "--device").type
    names = devices.visible(kind)
    if not names:
        return [{}] * args.replicas
    if args.device not in ("auto", kind):
        words = f"--device {args.device}: replicas have devices of their own: give {kind}"
        raise cli.CommandError(words)
    needed = args.replicas * args.gpus_per_replica
    if needed > len(names):
        words = f"--replicas {args.replicas} --gpus_per_replica {args.gpus_per_replica}: these are"
        raise cli.CommandError(f"{words} {needed} GPUs, and this machine has {len(names)}")
    each = args.gpus_per_replica
    return [devices.only(kind, names[each * n : each * (n + 1)]) for n in range(args.replicas)]
