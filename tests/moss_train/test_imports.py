"""The first seconds of what imports megatron-core: it comes without what nothing here uses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moss_train.imports import quick_imports

# How each begins, and what of the compiler comes along: transformers imports a part of it.
STARTS = {
    "a job": (
        "from moss_train.imports import quick_imports\n"
        "with quick_imports():\n    import moss_train.train.loop",
        ("torch._dynamo", "torch._inductor"),
    ),
    "a rank of verify_checkpoint": (
        "import moss_train.verify.forward",
        ("torch._dynamo", "torch._inductor"),
    ),
    "an evaluation": (
        "from contextlib import suppress\nfrom tools.evaluate.__main__ import main\n"
        "with suppress(SystemExit):\n    main(['--help'])",
        ("torch._inductor.compile_fx",),
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_starts_imports_neither_torch_s_compiler_nor_wandb(start: str) -> None:
    begin, compiler = STARTS[start]
    code = f"""{begin}
import sys
assert "megatron.core" in sys.modules
heavy = [name for name in ("wandb", *{compiler}) if name in sys.modules]
assert not heavy, heavy
import wandb
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_a_configuration_is_read_and_refused_without_torch() -> None:
    code = """import sys
import tools.runs
from moss_train.__main__ import main
sys.argv = ["moss-train", "trainer.step=3"]
assert main() == 2
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=240, capture_output=True, text=True
    )
    assert "trainer.step: is not a field" in done.stderr


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
