"""docs/from-megatron.md: each row's command runs and prints what its last column says."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPO
from tools import preloaded

PAGE = REPO / "docs" / "from-megatron.md"
CELL = re.compile(r"(?<!\\)\|")
PREPARE = "python -m data_pipeline.toy toy_world --train 16 --heldout 4 --stages sft"


def rows() -> list[tuple[str, str, str]]:
    """(what you know, command, what it prints) of each row of the page's tables."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in CELL.split(line)[1:-1]]
        if len(cells) == 4 and cells[2].startswith("`"):
            command, printed = (cell.strip("`").replace("\\|", "|") for cell in cells[2:])
            found.append((cells[0], command, printed))
    return found


def run(command: str, folder: Path) -> str:
    """What a command prints; `toy_world` and `runs` are in `folder`.

    Commands are forks of one process that has imported torch and megatron: most of their time is
    importing these.
    """
    words = [
        re.sub(r"\b(toy_world|runs)\b", rf"{folder}/\1", word) for word in shlex.split(command)
    ]
    if words[0] == "torchrun":
        options, script, overrides = words[1:3], REPO / words[3], words[4:]
        module = "torch.distributed.run"
        arguments = preloaded.torchrun(
            options, script, [*overrides, f"data.root={folder}/toy_world"]
        )
    else:
        assert words[:2] == ["python", "-m"], command
        module, arguments = words[2], words[3:]
        if module == "moss_train" and "--cfg" not in arguments:
            arguments.append(f"data.root={folder}/toy_world")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    log = folder / "log"
    code = preloaded.Command(module, arguments, environment, log).wait(240)
    assert code == 0, f"{command}\n{log.read_text()[-4000:]}"
    return log.read_text().replace(f"{folder}/", "")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the page prints; one that several rows share runs once."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "runs").mkdir()
    assert PREPARE in PAGE.read_text()
    run(PREPARE, folder)
    return {command: run(command, folder) for command in dict.fromkeys(c for _, c, _ in rows())}


def test_the_page_has_its_rows() -> None:
    assert len(rows()) >= 25


@pytest.mark.parametrize(("known", "command", "expected"), rows())
def test_the_command_of_a_row_prints_what_the_row_says(
    printed: dict[str, str], known: str, command: str, expected: str
) -> None:
    assert expected in printed[command], f"{known}: {command}\n{printed[command][-2000:]}"
