"""A job's first seconds: megatron-core is imported without what no job uses."""

from __future__ import annotations

import subprocess
import sys

import torch

from moss_train.imports import quick_imports

IMPORT = """
import sys
from moss_train.imports import quick_imports
with quick_imports():
    import moss_train.train.loop
heavy = [name for name in ("wandb", "torch._dynamo", "torch._inductor") if name in sys.modules]
assert not heavy, heavy
import wandb
"""


def test_a_job_imports_neither_torch_s_compiler_nor_wandb() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=240)


def test_what_is_decorated_meanwhile_is_compiled_when_it_is_called() -> None:
    compile, calls = torch.compile, []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append(len(inputs))
        return module.forward

    with quick_imports():

        @torch.compile(backend=backend)
        def doubled(x: torch.Tensor) -> torch.Tensor:
            """Twice x."""
            return x * 2

    assert torch.compile is compile
    assert (calls, doubled.__name__, doubled.__doc__) == ([], "doubled", "Twice x.")
    for _ in range(2):
        assert doubled(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert calls == [1]
