"""Who may import whom: see docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "moss_train", "inference", "tools", "launch")
ALLOWED = {  # package -> packages of ours that it may import
    "data_pipeline": {"data_pipeline"},
    "moss_train": {"moss_train", "data_pipeline"},
    "inference": {"inference", "data_pipeline"},
    "tools": set(PACKAGES),
    "launch": {"launch", "moss_train"},
}
OPTIONAL = {"transformer_engine", "flash_attn"}
SWITCH = "moss_train/model/attention.py"
HYDRA = {"moss_train/config.py", "launch/train.py"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether that happens when the file is imported."""
    tree = ast.parse(path.read_text(), str(path))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node not in late))
    return found


def files(package: str) -> list[Path]:
    return sorted((REPO / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down_only(package: str) -> None:
    for path in files(package):
        for module, _ in imports(path):
            root = module.split(".")[0]
            if root in PACKAGES:
                assert root in ALLOWED[package], f"{path} imports {module}"


def test_megatron_core_is_imported_only_in_moss_train() -> None:
    for package in ("data_pipeline", "inference", "launch"):
        for path in files(package):
            for module, _ in imports(path):
                assert not module.startswith("megatron.core"), f"{path} imports {module}"


def test_hydra_is_imported_only_where_runs_are_configured() -> None:
    for package in PACKAGES:
        for path in files(package):
            name = str(path.relative_to(REPO))
            if any(module.split(".")[0] == "hydra" for module, _ in imports(path)):
                assert name in HYDRA or package == "tools", f"{name} imports hydra"


def test_optional_packages_are_imported_only_behind_their_switch() -> None:
    for package in PACKAGES:
        for path in files(package):
            name = str(path.relative_to(REPO))
            for module, at_import in imports(path):
                if module.split(".")[0] in OPTIONAL:
                    assert name == SWITCH, f"{name} imports {module}"
                    assert not at_import, f"{name} imports {module} before it is chosen"


def test_configuration_is_checked_without_importing_megatron() -> None:
    """A wrong configuration is refused in seconds: megatron takes ten to import."""
    seen: set[Path] = set()

    def visit(path: Path) -> None:
        if path in seen or not path.exists():
            return
        seen.add(path)
        for module in (name for name, at_import in imports(path) if at_import):
            assert not module.startswith("megatron.core"), f"{path} imports {module}"
            if module.split(".")[0] in ("moss_train", "data_pipeline"):
                visit(REPO / (module.replace(".", "/") + ".py"))

    for name in ("config", "validate", "checkpoint_dir", "log", "main"):
        visit(REPO / f"moss_train/{name}.py")
