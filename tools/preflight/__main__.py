"""Checks all machines of a job before it starts; on each the command that starts its ranks:

    torchrun --nnodes 2 --nproc-per-node 8 ... -m tools.preflight stage=pt1 model=11b ...

With the overrides of the job: its storage and data are tried, and its configuration is compared.
Devices, matrix products, all-reduce within and between machines, storage, data, clocks, versions.
Names the machines that are unfit; exit code 0 where none is, 1 else.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from data_pipeline.commands import (
    DONE,
    FAILED,
    WRONG_USAGE,
    CommandParser,
    report_error,
    whole_number,
)
from data_pipeline.ranks import JoinError, RanksError, ranks_of
from moss_train.compose import load_config
from moss_train.config import Config, ConfigError
from moss_train.imports import quick_imports
from moss_train.log import configure

if TYPE_CHECKING:
    import torch.distributed as dist

PROGRAM = "python -m tools.preflight"
LIMIT_S = 60
# Seconds in which ranks hear the verdict: those that have answered, however late they look on a
# busy machine, and others, which may hang.
ANSWERED_S, GOODBYE_S = 60.0, 5.0


def main(arguments: list[str] | None = None) -> int:
    """Runs this rank's part; the exit code is the same on all ranks."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--limit", type=whole_number(above=0), default=LIMIT_S, metavar="S",
        help="seconds after which a rank that has not answered is unfit")  # fmt: skip
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="as of the job")
    args = parser.parse_args(arguments)
    configure(quiet=True)
    try:
        config = load_config(overrides=args.overrides)
        config.hardware.timeout_s = args.limit
        return _run(config, args.limit)
    except (ConfigError, RanksError) as error:
        return report_error(PROGRAM, error, WRONG_USAGE)
    except JoinError as error:
        return report_error(PROGRAM, error)


def _run(config: Config, limit: int) -> int:
    """The verdict, once all ranks have answered or `limit` seconds are over."""
    import torch.distributed as dist

    with quick_imports():
        from moss_train import hardware
        from moss_train.train.process import leave_process_group, start_process_group
        from tools.preflight.checks import check, here

    until = time.monotonic() + limit
    start_process_group(config)
    found, store = here(), _store()
    numbers = iter(range(100))

    def begin(what: str) -> None:
        store.set(f"at_{found.rank}", f"{next(numbers)} {found.host}: {what}")

    def work() -> None:
        check(config, found, begin)
        store.set(f"found_{found.rank}", json.dumps(asdict(found)))

    begin("start")
    # A collective that waits for another rank is left together with the process alone.
    threading.Thread(target=work, daemon=True).start()
    if found.rank == 0:
        code = _judge(store, dist.get_world_size(), until, hardware.on_accelerator())
        store.set("code", str(code))
        _wait_for_readers(store, dist.get_world_size())
    else:
        answered = _wait(store, ["code"], until + GOODBYE_S)
        code = int(store.get("code")) if answered else FAILED
        store.set(f"gone_{found.rank}", "")
    sys.stdout.flush()
    if code != DONE:
        os._exit(code)
    leave_process_group()
    return code


def _wait_for_readers(store: dist.Store, size: int) -> None:
    """Waits, on rank 0, until the others have read the verdict: the store ends with this
    process."""
    others = range(1, size)
    answered = [rank for rank in others if store.check([f"found_{rank}"])]
    for ranks, seconds in ((answered, ANSWERED_S), (others, GOODBYE_S)):
        _wait(store, [f"gone_{rank}" for rank in ranks], time.monotonic() + seconds)


def _judge(store: dist.Store, size: int, until: float, accelerator: bool) -> int:
    """Prints, on rank 0, the table and what is wrong."""
    from tools.preflight.checks import Findings
    from tools.preflight.verdict import missing, table, wrong

    _wait(store, [f"found_{rank}" for rank in range(size)], until)
    answers = [rank for rank in range(size) if store.check([f"found_{rank}"])]
    found = [Findings(**json.loads(store.get(f"found_{rank}"))) for rank in answers]
    late = {
        rank: store.get(f"at_{rank}").decode() if store.check([f"at_{rank}"]) else "-1 ?: start"
        for rank in range(size)
        if rank not in answers
    }
    if found:
        print(table(found))
    problems = [*missing(late), *wrong(found, accelerator)]
    for line in problems:
        report_error(PROGRAM, line)
    return FAILED if problems else DONE


def _store() -> dist.Store:
    """The store in which ranks leave their answers."""
    import torch.distributed as dist

    from moss_train.train.process import store_of

    ranks = ranks_of()
    return dist.HashStore() if ranks.size == 1 else store_of(ranks, "preflight")


def _wait(store: dist.Store, keys: list[str], until: float) -> bool:
    """Whether all keys come in time. It asks again and again, because the main thread uses the
    store, too."""
    while not (arrived := store.check(keys)) and time.monotonic() < until:
        time.sleep(0.05)
    return arrived


if __name__ == "__main__":
    sys.exit(main())
