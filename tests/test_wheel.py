"""The wheel: built offline, installed into a fresh environment, used outside of any checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("moss_train", "data_pipeline", "inference", "tools")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")

# Calls every command as its script does, with --help (one with --list); prints what each one did:
# its exit code, and what it wrote to stdout and to stderr.
HELP = """
import contextlib, importlib.metadata, io, json, sys
import data_pipeline, inference, moss_train, tools
done = {"files": [module.__file__ for module in (data_pipeline, inference, moss_train, tools)]}
for point in importlib.metadata.distribution("moss-train").entry_points:
    option = "--list" if point.name == "moss-convert" else "--help"
    sys.argv, said, complained = [point.name, option], io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = point.load()()
    except SystemExit as end:
        code = end.code
    done[point.name] = [code, said.getvalue(), complained.getvalue()]
print(json.dumps(done))
"""


@dataclass
class Installed:
    """A fresh environment: its folder, and an empty one to work in."""

    venv: Path
    work: Path
    wheel: Path

    def run(self, command: str, *arguments: str) -> str:
        """What a command of the environment prints."""
        environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "RANK")}
        done = subprocess.run(
            [str(self.venv / "bin" / command), *arguments],
            cwd=self.work,
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Dependencies are those of this interpreter; our packages are the wheel's alone."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv, work = folder / "source", folder / "venv", folder / "work"
    for name in (*PACKAGES, "conf"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, source / name, ignore=ignore)
    for name in FILES:
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["--quiet", "--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(wheel, check=True)
    (built,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [*pip, "--python", str(python), "install", *quiet, str(built)]
    subprocess.run(install, check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    # Folders that a .pth file names have their own .pth files ignored: an editable install is not
    # seen.
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    work.mkdir()
    return Installed(venv, work, built)


def test_the_wheel_holds_every_file_and_the_presets(installed: Installed) -> None:
    expected = {
        str(path.relative_to(REPO))
        for package in PACKAGES
        for path in (REPO / package).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    presets = {f"moss_train/{path.relative_to(REPO)}" for path in REPO.glob("conf/**/*.yaml")}
    assert len(presets) > 20
    inside = zipfile.ZipFile(installed.wheel).namelist()
    found = {name for name in inside if ".dist-info/" not in name}
    assert found == expected | presets
    typed = {f"{package}/py.typed" for package in ("moss_train", "inference", "data_pipeline")}
    assert typed <= found  # else no type checker reads their annotations


def test_every_command_starts_from_the_wheel(installed: Installed) -> None:
    done = json.loads(installed.run("python", "-c", HELP))
    assert all(Path(file).is_relative_to(installed.venv) for file in done.pop("files"))
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert done.keys() == scripts.keys()
    assert {name: code for name, (code, *_) in done.items() if code not in (0, None)} == {}
    assert [name for name, (_, said, _) in done.items() if len(said) < 100] == []
    assert {name: words for name, (*_, words) in done.items() if words} == {}
    assert "stage: pt1, pt2, realtime_sft, sft" in done["moss-train"][1]
    assert "--checkpoint" in done["moss-serve"][1]
    assert "language_model.model.embed_tokens.weight" in done["moss-convert"][1]
    assert sorted(path.name for path in (installed.venv / "bin").glob("moss-*")) == sorted(scripts)


def test_a_model_is_trained_without_a_checkout(installed: Installed) -> None:
    build_toy(installed.work / "toy_world", ToyConfig(train=8, heldout=1, stages=("pt1",)))
    options = [
        "stage=pt1", "model=tiny", "model.text.vocab_size=512", "hardware=cpu", "run.dir=run",
        "data.global_batch=2", "data.micro_batch=2", "data.workers=0",
    ]  # fmt: skip
    said = installed.run("moss-train", *options, "trainer.steps=1")
    assert "step 1/1  loss" in said
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"]
    installed.run("python", *torchrun, "-m", "moss_train", *options, "trainer.steps=2")
    run = installed.work / "run"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert json.loads((run / "run.json").read_text())["git"] is None
    assert (run / "report.html").exists()
