"""Imports megatron-core without the modules that no job here uses, in half the time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data_pipeline.imports import uncollected


@contextmanager
def quick_imports() -> Iterator[None]:
    """The first import of megatron-core goes into this block.

    - megatron's inference engine, which comes along, imports wandb where it is installed. Our own
      logger imports it when it is asked for.
    - It decorates functions with torch.compile, which imports torch's compiler at once. Here that
      happens when such a function is first called.
    - Python's collector is kept away (data_pipeline/imports.py).
    """
    with uncollected():
        import torch

        compile, hides = torch.compile, "wandb" not in sys.modules
        torch.compile = _compiled_when_called(compile)
        if hides:
            sys.modules["wandb"] = None  # type: ignore[assignment]  # an import of it fails
        try:
            yield
        finally:
            torch.compile = compile
            if hides:
                del sys.modules["wandb"]


def _compiled_when_called(compile: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile as a decorator, whose work begins with the first call of what it decorates."""

    def decorate(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(decorate, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    return decorate
