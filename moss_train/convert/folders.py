"""Tells what a folder is that is not what was asked for, and what to do with it."""

from __future__ import annotations

import json
from pathlib import Path

from moss_train.checkpoint_dir import flaw

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Files that tell other forms: pattern, what the folder is, what to do.
FORMS = (
    ("checkpoints/step_*", "is a run folder of this project", "give it to megatron-to-hf"),
    ("complete.json", "is a checkpoint of this project", "give it to megatron-to-hf"),
    (
        "global_step*",
        "holds DeepSpeed's shards",
        "run its zero_to_fp32.py with --safe_serialization, and convert what that writes",
    ),
    (
        "*zero_pp_rank_*",
        "holds DeepSpeed's shards",
        "run the zero_to_fp32.py of the folder above, and convert what that writes",
    ),
    (
        "*.distcp",
        "holds shards of torch.distributed (FSDP, megatron)",
        "merge them (accelerate merge-weights), and convert what that writes",
    ),
    (
        "pytorch_model_fsdp_*",
        "holds shards of FSDP",
        "merge them (accelerate merge-weights), and convert what that writes",
    ),
    ("mp_rank_*", "holds shards of Megatron or DeepSpeed", "export them to Hugging Face's form"),
    ("consolidated.*", "has the form of Meta's own code", "fetch the one for transformers"),
    ("*.gguf", "is GGUF", "fetch the safetensors that it was made of"),
    ("*.h5", "has TensorFlow's weights", "fetch the safetensors"),
    ("*.msgpack", "has Flax's weights", "fetch the safetensors"),
    (
        "snapshots/*/config.json",
        "is of the hub's cache",
        "give the folder below snapshots",
    ),
    ("checkpoint-*/config.json", "holds several checkpoints", "give one of its checkpoint-*"),
    ("*/config.json", "has its model in a folder below", "give that folder"),
)


def foreign_form(folder: Path) -> str | None:
    """What `folder` is, with what to do; None where that is not known.

    Only to be asked where it is not what was expected: the first pattern of `FORMS` counts.
    """
    if folder.is_file():
        return "is a file: give the folder that holds it"
    if not folder.is_dir():
        return "cannot be read: No such file or directory"
    if any((folder / name).is_file() for name in ADAPTER):
        return f"is an adapter of {_base(folder)}: {merge_advice()}"
    for pattern, what, mend in FORMS:
        if next(folder.glob(pattern), None) is not None:
            return f"{what}: {mend}"
    return None


def why_no_checkpoint(folder: Path) -> str:
    """What a folder is in which training finds no complete checkpoint, with what to do."""
    if not folder.exists():
        return "does not exist: give a run folder (a hub's model is fetched and converted before)"
    if (folder / "complete.json").is_file():
        return f"is a checkpoint that is damaged: {flaw(folder)}"
    if (folder / ".metadata").is_file():
        return "is a checkpoint without its complete.json: it was not written to its end"
    ours = (folder / "checkpoints").is_dir()
    form = None if ours or not folder.is_dir() else foreign_form(folder)
    if (folder / "config.json").is_file() and adapter_beside(folder) is None:
        form = (
            "is in Hugging Face's form: convert it (python -m tools.convert_checkpoint "
            "hf-to-megatron FOLDER OUT), and give OUT"
        )
    return form or "no complete checkpoint there: give a run folder"


def merge_advice() -> str:
    """What to do with PEFT's adapters."""
    return (
        "merge it into its model (peft: model.merge_and_unload().save_pretrained(FOLDER)), and "
        "convert that folder"
    )


def adapter_beside(folder: Path) -> str | None:
    """The adapter's file in a folder that holds a whole model too, if there is one."""
    return next((name for name in ADAPTER if (folder / name).is_file()), None)


def _base(folder: Path) -> str:
    try:
        values = json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8"))
        return str(values["base_model_name_or_path"] or "a model")
    except (OSError, ValueError, KeyError, TypeError):
        return "a model"
