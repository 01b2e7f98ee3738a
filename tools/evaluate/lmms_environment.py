"""Makes the environment in which lmms-eval runs, apart from this project's: their pins differ."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.commands import CommandParser, report_error
from inference.evaluate.harness.benchmarks import LMMS_VERSION
from inference.evaluate.results import BenchmarkError

DEFAULT = Path("~/.cache/moss_train/lmms-eval").expanduser()
# In this order, each line by itself: what a line brings along is not what a later one asks for.
PINS: tuple[tuple[str, ...], ...] = (
    # The CPU's torch: the model runs in the server. No torchvision: one of another build of torch
    # ends `import transformers` (torchvision::nms).
    ("torch==2.13.0",),
    # Without their dependencies, which are the packages of all its models.
    ("--no-deps", f"lmms-eval=={LMMS_VERSION}", "accelerate"),
    # lmms-eval imports filelock._api, which 4.3 does not have any more.
    (
        "filelock<4.3", "datasets==5.2.0", "openai==3.57.0", "transformers==5.24.0", "evaluate",
        "httpx", "jinja2", "jsonlines", "loguru", "networkx", "numexpr", "openpyxl", "packaging",
        "pillow", "psutil", "pydantic", "pytablewriter", "python-dotenv", "pyyaml", "sacrebleu",
        "scikit-learn", "sympy", "tenacity", "tqdm",
    ),
    # Imported by the tasks of LongVideoBench, VSI-Bench and VideoMME, which decode nothing here.
    ("--no-deps", "decord", "opencv-python-headless"),
)  # fmt: skip
CPU = "https://download.pytorch.org/whl/cpu"


def main(arguments: list[str] | None = None) -> int:
    """Makes the environment, or says that it exists."""
    parser = CommandParser("python -m tools.evaluate.lmms_environment", description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=DEFAULT, metavar="FOLDER", help="where it is made")
    options = parser.parse_args(arguments)
    try:
        make(options.folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return report_error(parser.prog, f"{options.folder}: {error}")
    print(options.folder)
    return 0


def make(folder: Path) -> None:
    """Installs the pinned packages, once; a folder that an earlier run did not finish is made
    anew."""
    if _ready(folder).exists() and _ready(folder).read_text() == _stamp():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
    for packages in PINS:
        words = [*pip, *packages]
        if packages[0].startswith("torch=="):
            cpu = [*pip, "--retries", "1", "--extra-index-url", CPU, f"{packages[0]}+cpu"]
            if subprocess.run(cpu, stderr=subprocess.DEVNULL, check=False).returncode == 0:
                continue
        subprocess.run(words, check=True)
    _ready(folder).write_text(_stamp())


def check_environment(folder: Path) -> None:
    """Raises BenchmarkError where the environment is missing, or has other pins."""
    if not _ready(folder).exists() or _ready(folder).read_text() != _stamp():
        raise BenchmarkError(
            f"{folder}: is not the environment of lmms-eval {LMMS_VERSION}: make it with"
            f" python -m tools.evaluate.lmms_environment --folder {folder}"
        )


def _ready(folder: Path) -> Path:
    return folder / ".ready"


def _stamp() -> str:
    return f"{PINS}\n"


if __name__ == "__main__":
    sys.exit(main())
