"""Reads which modules of a tree import which, without importing them: the facts of test_imports.

Imports inside functions and under `TYPE_CHECKING` count: a reader has to follow them too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = ("data_pipeline", "moss_train", "inference", "tools", "launch")


@dataclass(frozen=True)
class Import:
    """`from module import name` (or `import module`: no name) in the file `path`."""

    path: str
    line: int
    module: str
    name: str | None
    late: bool  # inside a function, so not when the file itself is imported

    def __str__(self) -> str:
        what = f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        return f"{self.path}:{self.line}: {what}"


class Tree:
    """The Python files below a folder."""

    def __init__(self, root: Path, packages: Sequence[str] = PACKAGES):
        self.files = {  # path from the root -> syntax tree
            str(path.relative_to(root)): ast.parse(path.read_text(), str(path))
            for package in packages
            for path in sorted((root / package).rglob("*.py"))
        }
        self.packages = tuple(packages)

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """Dotted name -> path."""
        return {dotted(path): path for path in self.files}

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of every file."""
        return [found for path in self.files for found in self._imports(path)]

    @cached_property
    def own(self) -> list[tuple[Import, str]]:
        """Imports of the tree's own modules, with the module that each one loads."""
        return [(i, self._loaded(i)) for i in self.imports if self._loaded(i) in self.modules]

    def defines(self, module: str) -> set[str]:
        """Names that a module defines at its top level; what it imports is not among them."""
        names: set[str] = set()
        for node in _top_level(self.files[self.modules[module]].body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        return names

    def _imports(self, path: str) -> Iterator[Import]:
        tree = self.files[path]
        late = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(path, node.lineno, alias.name, None, node in late)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module = _absolute(path, node)
                    yield Import(path, node.lineno, module, alias.name, node in late)

    def _loaded(self, found: Import) -> str:
        """The module that is loaded: `from package import module` loads the module."""
        inner = f"{found.module}.{found.name}"
        return inner if inner in self.modules else found.module


def dotted(path: str) -> str:
    """moss_train/model/loss.py -> moss_train.model.loss."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def longest_prefix(module: str, prefixes: Sequence[str]) -> str | None:
    """The longest of `prefixes` that is `module` or a package around it."""
    fitting = [p for p in prefixes if module == p or module.startswith(p + ".")]
    return max(fitting, key=len, default=None)


def circles(tree: Tree) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    graph: dict[str, set[str]] = {module: set() for module in tree.modules}
    for found, module in tree.own:
        if module != dotted(found.path):
            graph[dotted(found.path)].add(module)
    reach = {module: _reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(m for m in reach[module] if module in reach[m]))
        for module in graph
        if module in reach[module]
    }
    return sorted(map(list, groups))


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += graph[module]
    return seen


def _absolute(path: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = Path(path).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = node.handlers if isinstance(node, ast.Try) else []
            final = node.finalbody if isinstance(node, ast.Try) else []
            for block in (node.body, node.orelse, final, *(h.body for h in handlers)):
                yield from _top_level(block)
