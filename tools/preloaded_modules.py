"""What the process of tools/preloaded.py imports, once for all of its forks, as a job does."""

from __future__ import annotations

from importlib import import_module

from moss_train.imports import quick_imports

MODULES = (
    "torch.distributed.run",
    "hydra",
    "moss_train.compose",
    "moss_train.validate",
    "moss_train.train.memory_check",
    "moss_train.train.loop",
    "moss_train.evaluate.exported",
    "inference.hf.modeling_moss_video",  # an evaluation, a stream; most of it is transformers
    "megatron.core.transformer.multi_token_prediction",  # a schedule's first forward pass
    "pyarrow.compute",  # the first image
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "jinja2",
)

with quick_imports():
    for name in MODULES:
        import_module(name)
    from moss_train.compose import load_config

    load_config()  # what Hydra and its grammar learn in their first composing, forks know
