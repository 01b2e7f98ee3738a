"""Kinds of devices are named in one place (data_pipeline/devices.py), and by who must."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.devices import ACCELERATORS, BACKENDS, VISIBLE

REPO = Path(__file__).parents[1]
ROOMS = ("data_pipeline", "inference", "launch", "moss_train", "tools")
OWN = {
    "data_pipeline/attention_kinds.py": "where each kind of attention runs",
    "data_pipeline/devices.py": "it owns them",
    "data_pipeline/npu.py": "and this that package",
    "moss_train/config.py": "what a user may write: hardware.device",
    "moss_train/hardware.py": "megatron-core names CUDA in its source, which is redirected there",
}
WORDS = {*ACCELERATORS, *BACKENDS.values(), *VISIBLE.values()}
NUMBERED = re.compile(rf"({'|'.join(ACCELERATORS)}):\d+")


def named(source: str) -> Iterator[tuple[int, str]]:
    """(Line, name) of each kind of device in code: as a string, an attribute, or asked of a
    tensor. What a sentence says does not count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in WORDS or NUMBERED.fullmatch(node.value):
                yield node.lineno, node.value
        elif isinstance(node, ast.Attribute) and node.attr.removeprefix("is_") in ACCELERATORS:
            yield node.lineno, node.attr


def test_no_other_file_names_a_device():
    found = [
        f"{name}:{line}: {word}"
        for room in ROOMS
        for path in sorted((REPO / room).rglob("*.py"))
        if (name := path.relative_to(REPO).as_posix()) not in OWN
        for line, word in named(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ['x = torch.device("cuda")', "torch.cuda.synchronize()", 'y.to("npu:1")', "x.is_cuda",
     'dist.init_process_group("nccl")', 'os.environ["CUDA_VISIBLE_DEVICES"]', 'x.type == "mps"'],
)  # fmt: skip
def test_a_file_that_names_one_is_found(source):
    assert len(list(named(source))) == 1


@pytest.mark.parametrize(
    "source", ['"""On cuda."""', 'say("no cuda here")', 'x.device.type == "cpu"']
)
def test_sentences_and_the_host_are_no_such_names(source):
    assert list(named(source)) == []
