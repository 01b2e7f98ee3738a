"""Who may import whom: the floors of the house (docs/architecture.md), and what opens them.

Each rule is a function from a tree to the lines that break it. It holds for this repository, and
finds what is wrong in a small tree that breaks it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.imports import Tree, circles, dotted, longest_prefix

REPO = Path(__file__).resolve().parent.parent

# From the ground up. A module belongs to the longest prefix that fits. Imports go down, or stay in
# the same room; rooms of one floor do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("inference.hf", "data_pipeline", "moss_train.field_errors"),
    (
        "inference.kernels",
        "data_pipeline.importers",
        "data_pipeline.loader",
        "moss_train.data_config",
        "moss_train.model_config",
    ),
    ("data_pipeline.build", "data_pipeline.toy", "data_pipeline.synthesis"),
    ("data_pipeline.engines",),
    (
        "moss_train.log",
        "moss_train.config",
        "moss_train.imports",
        "moss_train.model_sizes",
        "moss_train.presets",
        "inference.engine",
    ),
    (
        "moss_train.node_folders",
        "moss_train.overrides",
        "moss_train.processes",
        "moss_train.storage",
    ),
    (
        "moss_train.hardware",
        "moss_train.checkpoint_dir",
        "moss_train.compose",
        "moss_train.trained_tokenizer",
        "moss_train.run_lock",
        "moss_train.sources",
        "inference.session",
    ),
    ("moss_train.transfer",),
    ("moss_train.model", "inference"),  # inference: cli and sources
    ("moss_train.parallel", "inference.serve", "inference.bench"),
    ("moss_train.convert", "inference.replicas"),
    ("moss_train.validate", "moss_train.resume", "inference.serve.command"),
    ("moss_train.train", "inference.serve.__main__", "inference.evaluate"),
    ("moss_train.verify", "moss_train.evaluate"),
    ("moss_train",),  # main, and api: what users import
    ("launch",),
    ("tools",),
)
# Beyond the floors: whole packages of which others import nothing.
ALLOWED = {
    "data_pipeline": {"data_pipeline"},
    "moss_train": {"moss_train", "data_pipeline"},
    "inference": {"inference", "data_pipeline"},
    "launch": {"launch", "moss_train", "data_pipeline"},
    "tools": {"tools", "launch", "moss_train", "inference", "data_pipeline"},
}
# Packages of others that only some files import.
OWNERS: dict[str, tuple[str, ...]] = {
    "megatron.core": ("moss_train/",),
    "megatron.energon": ("data_pipeline/index.py",),
    "hydra": ("moss_train/compose.py",),
    "transformer_engine": ("moss_train/model/attention.py",),
    "flash_attn": ("data_pipeline/flash.py",),
    "torch_npu": ("data_pipeline/npu.py",),
    "ray": ("data_pipeline/engines/ray_tasks.py", "tools/bench/ray_nodes.py"),
    "opentelemetry": ("inference/serve/traces.py",),
    "triton": (
        "inference/kernels/triton_",
        "moss_train/model/triton_",
        "data_pipeline/triton_fp8.py",
    ),
}
# Loaded when they are chosen.
OPTIONAL = (
    "transformer_engine",
    "flash_attn",
    "ray",
    "triton",
    "opentelemetry",
)
# Kernels cannot be written without their package: these files are what is loaded late.
KERNELS = OWNERS["triton"]

Rule = Callable[[Tree], list[str]]


def imports_go_down(tree: Tree) -> list[str]:
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for found, module in tree.own:
        room, target = (longest_prefix(m, list(floors)) for m in (dotted(found.path), module))
        assert room is not None, f"{found.path} has no floor"
        assert target is not None, f"{module} has no floor"
        if target != room and floors[target] >= floors[room]:
            wrong.append(f"{found} goes from {room} up to {target}")
    return wrong


def packages_keep_apart(tree: Tree) -> list[str]:
    return [
        str(found)
        for found, module in tree.own
        if module.split(".")[0] not in ALLOWED[found.path.split("/")[0]]
    ]


def no_circles(tree: Tree) -> list[str]:
    return [" -> ".join([*circle, circle[0]]) for circle in circles(tree)]


def names_come_from_where_they_are_defined(tree: Tree) -> list[str]:
    return [
        f"{found}, which is defined elsewhere"
        for found, module in tree.own
        if found.name and module == found.module and found.name not in tree.defines(module)
    ]


def packages_of_others_have_owners(tree: Tree) -> list[str]:
    wrong = []
    for found in tree.imports:
        name = f"{found.module}.{found.name}" if found.name else found.module
        package = longest_prefix(name, list(OWNERS))
        if package and not any(found.path.startswith(owner) for owner in OWNERS[package]):
            wrong.append(str(found))
    return wrong


def optional_packages_are_imported_late(tree: Tree) -> list[str]:
    early = [
        found
        for found in tree.imports
        if longest_prefix(found.module, OPTIONAL) and not found.path.startswith(KERNELS)
    ]
    early += [found for found, module in tree.own if module.replace(".", "/").startswith(KERNELS)]
    return [f"{found} when the file itself is imported" for found in early if not found.late]


def the_exported_files_import_nothing_of_ours(tree: Tree) -> list[str]:
    return [
        str(found)
        for found, module in tree.own
        if found.path.startswith("inference/hf/") and not module.startswith("inference.hf")
    ]


def configuration_is_checked_without_megatron(tree: Tree) -> list[str]:
    """A wrong configuration is refused in seconds: megatron takes five to import."""
    begin = ("config", "validate", "checkpoint_dir", "log", "main")
    todo = [f"moss_train.{name}" for name in begin if f"moss_train.{name}" in tree.modules]
    seen: set[str] = set()
    wrong = []
    while todo:
        module = todo.pop()
        if module in seen or module not in tree.modules:
            continue
        seen.add(module)
        early = [i for i in tree.imports if dotted(i.path) == module and not i.late]
        wrong += [str(i) for i in early if longest_prefix(i.module, ["megatron.core"])]
        todo += [name for found, name in tree.own if found in early]
    return wrong


# Each rule with a small tree that breaks it, and what is said of that.
BROKEN: dict[Rule, tuple[dict[str, str], str]] = {
    imports_go_down: (
        {
            "moss_train/model/a.py": "def f():\n    from moss_train.train import b",
            "moss_train/train/b.py": "",
            "moss_train/evaluate/c.py": "from moss_train.train import b",
        },
        "moss_train/model/a.py:2: from moss_train.train import b"
        " goes from moss_train.model up to moss_train.train",
    ),
    packages_keep_apart: (
        {"inference/session/a.py": "import moss_train.log", "moss_train/log.py": ""},
        "inference/session/a.py:1: import moss_train.log",
    ),
    no_circles: (
        {
            "inference/engine/a.py": "import typing\nif typing.TYPE_CHECKING:\n"
            "    from inference.engine.b import B",
            "inference/engine/b.py": "from inference.engine.c import C\nclass B: ...",
            "inference/engine/c.py": "def f():\n    from inference.engine import a\nclass C: ...",
        },
        "inference.engine.a -> inference.engine.b -> inference.engine.c -> inference.engine.a",
    ),
    names_come_from_where_they_are_defined: (
        {
            "inference/engine/a.py": "from inference.engine.b import Sampling, Step, step_of",
            "inference/engine/b.py": "from inference.engine.c import Sampling\nStep = int\n"
            "try:\n    def step_of(): ...\nexcept ImportError:\n    pass",
            "inference/engine/c.py": "class Sampling: ...",
        },
        "inference/engine/a.py:1: from inference.engine.b import Sampling,"
        " which is defined elsewhere",
    ),
    packages_of_others_have_owners: (
        {
            "moss_train/model/a.py": "from megatron import core",
            "tools/b.py": "def f():\n    from megatron import core",
            "data_pipeline/index.py": "import megatron.energon.wrappers",
        },
        "tools/b.py:2: from megatron import core",
    ),
    optional_packages_are_imported_late: (
        {
            "data_pipeline/flash.py": "import flash_attn\n"
            "def f():\n    import transformer_engine.pytorch"
        },
        "data_pipeline/flash.py:1: import flash_attn when the file itself is imported",
    ),
    the_exported_files_import_nothing_of_ours: (
        {
            "inference/hf/a.py": "from .b import B\nfrom data_pipeline.images import MEAN",
            "inference/hf/b.py": "class B: ...",
            "data_pipeline/images.py": "MEAN = 0",
        },
        "inference/hf/a.py:2: from data_pipeline.images import MEAN",
    ),
    configuration_is_checked_without_megatron: (
        {
            "moss_train/config.py": "from data_pipeline import a\n"
            "def f():\n    import megatron.core.optimizer",
            "data_pipeline/a.py": "import megatron.core",
        },
        "data_pipeline/a.py:1: import megatron.core",
    ),
}


@pytest.fixture(scope="module")
def repository() -> Tree:
    return Tree(REPO)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule, repository: Tree) -> None:
    assert len(repository.files) > 100
    assert rule(repository) == []


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_rule_finds_what_breaks_it(rule: Rule, tmp_path: Path) -> None:
    files, expected = BROKEN[rule]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert rule(Tree(tmp_path)) == [expected]
