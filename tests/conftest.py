"""Fixtures of all tests: a process that runs megatron-core on the CPU, alone in its groups."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_pipeline.open_files import allow_open_files

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
# Files that take longest, first: the last one to begin would keep one core waiting.
LONG = (
    "tests/tools/evaluate/test_lmms.py",  # where its environment is
    "tests/tools/evaluate/test_lmms_scores.py",
    "tests/moss_train/train/test_learning.py",
    "tests/moss_train/train/test_faults.py",
    "tests/moss_train/parallel/test_matrix.py",
    "tests/tools/test_chaos.py",
    "tests/test_readme.py",
    "tests/moss_train/train/test_resume.py",
    "tests/inference/replicas/test_replicas.py",
    "tests/tools/test_demo.py",
    "tests/moss_train/train/test_suites.py",
    "tests/moss_train/train/test_slurm.py",
    "tests/inference/replicas/test_ranks.py",
    "tests/moss_train/test_validate.py",
    "tests/docs/test_notebook.py",
    "tests/moss_train/train/test_device.py",
    "tests/moss_train/train/test_guard.py",
    "tests/moss_train/train/test_job_errors.py",
    "tests/moss_train/train/test_job.py",
    "tests/tools/test_preflight.py",
    "tests/data_pipeline/importers/test_killed_imports.py",
    "tests/moss_train/test_api.py",
    "tests/docs/test_extending.py",
    "tests/moss_train/evaluate/test_demo_report.py",
    "tests/data_pipeline/engines/test_engines.py",
    "tests/test_torchrun.py",
    "tests/test_wheel.py",
    "tests/moss_train/train/test_optimizer_state.py",
    "tests/docs/test_from_megatron.py",
    "tests/moss_train/convert/test_round_trip.py",
    "tests/tools/test_gpu_check.py",
    "tests/moss_train/train/test_activations.py",
    "tests/moss_train/train/test_adapter_runs.py",
    "tests/docs/test_python.py",
    "tests/inference/serve/test_soak.py",
    "tests/inference/kernels/test_kernels.py",
    "tests/moss_train/model/test_golden.py",
    "tests/data_pipeline/test_devices.py",
    "tests/inference/serve/test_framing.py",
    "tests/tools/test_synthesize.py",
    "tests/moss_train/train/test_validation.py",
    "tests/tools/test_convert_command.py",
    "tests/moss_train/evaluate/test_model.py",
    "tests/inference/bench/test_bench.py",
    "tests/tools/test_bench_data.py",
    "tests/inference/engine/test_sharded.py",
    "tests/moss_train/train/test_unlearned.py",
    "tests/moss_train/train/test_deterministic.py",
)


# Processes of tests share the cores with each other: the threads of a small product would wait for
# one another longer than they compute. Read when torch is loaded, here and in what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What gives torch all cores all the same (an evaluation, a job without hardware.threads) would
# otherwise keep them busy while its threads wait: ten times the time, beside another test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Else each process that a test starts would compile our modules anew: a second of a core.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Python's collector would look through all that is imported, again and again, and find nothing.
gc.disable()
# Groups of ranks that have been stay open in a process; a shell often allows 1024 files.
allow_open_files()
# A shell's background job ignores Ctrl-C, and with it what tests start: those wait for its effect.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no failure. Each run tries the same examples: a change answers for itself alone.
settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
if shutil.which("nvidia-smi") is None:  # kernels then run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by torch or by us


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts whole files; `--no-loadscope-reorder` keeps pytest-xdist from sorting them again."""
    order = {str(REPO / name): place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(str(item.path), len(LONG)))


def pytest_collection_finish() -> None:
    """From here on the collector looks at what tests make, and no more at what was imported."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test, and what its fixtures make, begins with one thread of torch: what ran before may
    have taken all cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def unconfigured_logger() -> None:
    """The logger as a new process has it: an earlier test may have called log.configure, and what
    `caplog` sees once or twice would hang on the order of the tests."""
    from moss_train.log import log

    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """A command that is called in this process leaves the handlers of signals as they were: forks
    that later tests make would have them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    assert {number: signal.getsignal(number) for number in numbers} == before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and numbers beside the repository; tests that need it are skipped else."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="module")
def groups():
    """Process groups of one process. They end with the file, and with them all that its tests have
    made: each has threads of gloo's that wake up a hundred times a second while it is there."""
    import torch
    from megatron.core import parallel_state

    from moss_train import hardware
    from moss_train.config import ParallelConfig
    from moss_train.parallel.process_groups import build_groups

    hardware.activate("cpu")
    store = torch.distributed.HashStore()  # no port, which another process could take
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield build_groups(ParallelConfig(), seed=1)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
