"""Makes the index that energon needs to read a folder of shards, as `energon prepare` does.

A folder of shards can be loaded once it has one. data_pipeline.build makes it by itself.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from megatron.energon import CrudeWebdataset

from data_pipeline.commands import CommandParser, report_error, whole_number
from data_pipeline.parent import signalled_with_parent
from data_pipeline.shards import (
    INDEX_FOLDER,
    INDEX_MARK,
    ShardError,
    SourceInfo,
    check_source,
    shard_files,
)

_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
_FORK = multiprocessing.get_context("fork")  # as energon starts its own
_LOOK = 0.1  # seconds between two looks whether one of energon's processes was killed
_CHUNK = 1 << 20  # bytes


def prepare_index(path: str | Path, workers: int = 2) -> SourceInfo:
    """(Re)builds the index of a folder; every shard goes to the `train` split.

    `workers` processes read the shards. Raises ShardError for a missing folder, no shards, a tar
    that is unreadable or damaged, a key that occurs twice, a process that was killed.
    """
    folder = Path(path)
    shards = shard_files(folder)
    shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)
    _with_energon(folder, [shard.name for shard in shards], min(workers, len(shards)))
    for shard in shards:
        _check_end(shard)
    (folder / INDEX_FOLDER / INDEX_MARK).write_text(_DATASET)
    return check_source(folder)


def _with_energon(folder: Path, names: list[str], workers: int) -> None:
    """Lets energon make the index. Raises ShardError.

    energon waits for ever for one of its processes that was killed, or that has a handler of
    SIGTERM from a program, and they wait for ever where energon was killed. So all of them have a
    process above them that nothing else runs in, which ends with them, and they with it.
    """
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(theirs, os.getpid(), folder, names, workers))
    process.start()
    theirs.close()
    try:
        wrong = ours.recv()
    except EOFError:
        process.join()
        wrong = _killed(process.exitcode or 0)
    finally:
        process.kill()
        process.join()
        ours.close()
    if wrong:
        raise ShardError(f"{folder}: {wrong}")


def _killed(code: int) -> str:
    return (
        f"the shards cannot be indexed: a process was killed (exit code {code}; out of memory?): "
        "try again, with fewer workers if need be"
    )


def _work(pipe: Connection, parent: int, folder: Path, names: list[str], workers: int) -> None:
    """The process above energon's: sends what is wrong, or an empty text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # energon ends its processes by it
    signalled_with_parent(parent)
    os.register_at_fork(after_in_child=partial(signalled_with_parent, os.getpid()))
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()
    output = io.StringIO()
    try:
        with redirect_stdout(output):
            CrudeWebdataset.prepare_dataset(
                folder.absolute(),
                names,
                split_parts_ratio=[("train", 1.0), ("val", 0.0), ("test", 0.0)],
                shuffle_seed=None,
                workers=workers,
            )
        pipe.send("")
    except SystemExit:  # energon prints and exits where a key occurs twice
        pipe.send(output.getvalue().strip()[:300])
    except Exception as error:
        pipe.send(f"the shards cannot be indexed: {error}")


def _watch(pipe: Connection) -> None:
    """Ends this process where one of energon's was killed."""
    while True:
        time.sleep(_LOOK)
        with suppress(ChildProcessError):  # there is none yet
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            # energon ends them by SIGTERM where it has found something wrong, and says so then.
            if code not in (0, -signal.SIGTERM):
                pipe.send(_killed(code))
                os._exit(1)
            multiprocessing.active_children()  # buries it: the next one is seen then


def _check_end(shard: Path) -> None:
    """ShardError where a shard holds more than its index has: tarfile, with which energon reads,
    takes a header that it cannot read for the end, and so is the end of the first of joined tars.
    """
    end = int(np.fromfile(f"{shard}.idx", "<u8")[-1])
    with shard.open("rb") as file:
        file.seek(end)
        if not (chunk := file.read(_CHUNK)):
            raise ShardError(
                f"{shard}: the end of the archive is missing: the file was cut off, or is "
                "compressed: write it anew, uncompressed (one that is whole all the same gets its "
                "end by: head -c 1024 /dev/zero >> FILE)"
            )
        while chunk:
            if chunk.strip(b"\0"):
                raise ShardError(f"{shard}: byte {end} is not the header of a member, and there is "
                                 "more behind it: the file is damaged, compressed, or several tars "
                                 "one behind the other: write it anew as one tar")  # fmt: skip
            chunk = file.read(_CHUNK)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m data_pipeline.index", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, metavar="FOLDER", help="folder of shards")
    parser.add_argument(
        "--workers", type=whole_number(above=0), default=2, help="processes that read the shards"
    )
    options = parser.parse_args(arguments)
    try:
        for folder in options.folder:
            info = prepare_index(folder, options.workers)
            print(f"{folder}: {info.samples} samples in {info.shards} shards")
    except ShardError as error:
        return report_error(parser.prog, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
