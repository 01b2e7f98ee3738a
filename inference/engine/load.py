"""Opening an exported folder: the model with this package's code, never with the folder's.

    engine = load_engine("checkpoint", max_sessions=4)

This is the only file that knows how many processes there are.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from data_pipeline import devices
from data_pipeline.ranks import ranks_of
from data_pipeline.tokenizer_identity import TokenizerIdentity, identify
from inference.engine.choose_attend import choose, needs_of
from inference.engine.engine import Engine
from inference.engine.engine_config import EngineConfig
from inference.engine.quantize import quantize_decoder, take_scales
from inference.engine.sharded import ShardedEngine, join
from inference.engine.staging import move
from inference.engine.tensor_parallel import check_divisible, shard
from inference.engine.weights import Reading, has_safetensors, read_model, today_name
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.processing_moss_video import MossVideoProcessor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

ADAPTER = ("config.json", "model.safetensors", "model.bin")
# Numbers that follow from config.json, which older tools save beside the weights.
BUFFERS = re.compile(r".*(inv_freq|rope\.freqs|position_ids)$")

# Without this transformers asks at the terminal whether to run the folder's code.
AutoConfig.register("moss_video", MossVideoConfig, exist_ok=True)


class RankFinished(Exception):
    """This process is not rank 0: it has served rank 0 until that ended, and nothing is left to
    do."""


def load_engine(
    checkpoint: str | Path,
    config: EngineConfig | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    **changes: Any,
) -> Engine:
    """The engine of an exported folder.

    Under torchrun each process holds a slice of the model (tensor parallelism). Rank 0 gets the
    engine; other ranks stay in this call and serve rank 0 until it ends.

    Args:
        config: `changes` are fields of it.
        device: `auto` (the best that there is), a kind of device, or one of several: `cuda:1`.
        dtype: one of `DTYPES`; None: the checkpoint's on CUDA, fp32 on a CPU.
        quantize: `int8`, `fp8` or `int4`: weights of the decoder's linear layers.

    Raises:
        ValueError: the folder is not a checkpoint of this model, an argument is wrong, or the
            ranks cannot share the model's heads.
        RankFinished: on other ranks than 0, when rank 0 has ended.
    """
    config = replace(config or EngineConfig(), **changes)
    where = devices.find(device)
    check_attention(Path(checkpoint), config.attention, where, dtype)
    if config.kv_dtype == "fp8":
        _check_eight_bit("kv_dtype=fp8: keys and values in 8 bits run", where)
    if config.vision_dtype == "fp8":
        _check_vision_dtype(where)
    rank, ranks = join(where.type)
    _check_tokenizer(Path(checkpoint))
    model = load_model(checkpoint, device, dtype, quantize, rank, ranks)
    processor = load_processor(checkpoint)
    if ranks == 1:
        return Engine(model, processor, config)
    engine = ShardedEngine(model, processor, config)
    if engine.leads:
        return engine
    engine.follow()
    raise RankFinished(f"rank {rank} of {ranks} has served rank 0 to its end")


def load_model(
    checkpoint: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> MossVideoForConditionalGeneration:
    """The model of a folder on `device`; of several ranks, this rank's slice of it.

    Raises:
        ValueError: names the folder and what is wrong with it.
    """
    folder = Path(checkpoint)
    wrong = _wrong_folder(folder)
    if wrong is not None:
        raise ValueError(f"{folder}: {wrong}")
    where = devices.find(device)
    if quantize is not None:
        _check_eight_bit(f"quantize={quantize}: quantized weights run", where)
    config = read_config(folder)
    stored = config.__dict__.pop("quantization_config", None)
    if stored is not None and ranks > 1:
        raise ValueError(f"{folder}: is quantized; several ranks need full weights (--quantize)")
    if ranks > 1:
        check_divisible(config, ranks)
        number = int(os.environ.get("LOCAL_RANK", rank))
        if reason := devices.lacking(where.type, number):
            raise ValueError(f"device={where.type}: {reason}")
        where = devices.select(where.type, number)
    # What is quantized must not take the device's memory in full before.
    first = where if quantize is None and stored is None else torch.device("cpu")
    try:
        read = _read(folder, config, find_dtype(dtype, where), first, rank, ranks)
        _check_names(folder, read, stored is not None)
        if stored is not None:
            _restore_quantized(read.model, folder, stored, quantize)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded: {error}") from error
    if quantize is not None and stored is None:
        quantize_decoder(read.model, quantize, where)
    move(read.model, where)
    return read.model.eval()


def _check_eight_bit(what: str, device: torch.device) -> None:
    if not devices.has_eight_bit(device):
        runs = " and ".join(devices.EIGHT_BIT)
        raise ValueError(f"{what} on {runs}, not on {device.type}: leave it out (bf16)")


def _check_vision_dtype(device: torch.device) -> None:
    what, ranks = "vision_dtype=fp8", ranks_of().size
    if not devices.has_fp8(device):
        raise ValueError(
            f"{what}: {devices.name(device)} does not multiply in FP8 (GPUs of compute capability "
            "8.9 and later do): leave it out"
        )
    if ranks > 1:
        raise ValueError(f"{what}: needs the whole vision tower on one rank, not on {ranks}")


def check_attention(
    folder: Path, attention: str, device: torch.device, dtype: str | torch.dtype | None
) -> None:
    """Raises ValueError where a folder's model cannot attend so, before anything is loaded."""
    if attention == "auto" or _wrong_folder(folder) is not None:  # told by load_model
        return
    config = read_config(folder)
    stored = getattr(config, "dtype", None) or torch.float32
    choose(attention, device, find_dtype(dtype, device) or stored, *needs_of(config))


def read_config(folder: Path) -> MossVideoConfig:
    """The configuration of a folder's model. Raises ValueError that names the folder."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no mapping")
    kind = values.get("model_type", MossVideoConfig.model_type)
    if kind not in (MossVideoConfig.model_type, "mllama"):
        raise ValueError(
            f"{folder}: is of {kind}, not of this model: convert it (hf-to-megatron, "
            "megatron-to-hf), and give the export"
        )
    return MossVideoConfig.from_pretrained(folder)


def _check_names(folder: Path, read: Reading, packed: bool) -> None:
    """Every tensor of the model must be in the folder, and none beside them."""
    missing, unknown = sorted(read.missing), []
    for name in sorted(read.unexpected):
        if not BUFFERS.match(name) and not (packed and name.endswith("_scale")):
            unknown.append(name)
    kind = str((read.model.config.architectures or [""])[0])
    if missing and kind.endswith("Model"):
        raise ValueError(
            f"{folder}: is a {kind}, which has no output head: save the whole model "
            "(AutoModelForImageTextToText)"
        )
    for names, what in ((missing, "lacks"), (unknown, "beside the model's, it has")):
        if names:
            raise ValueError(f"{folder}: {what} {len(names)} tensors: {', '.join(names[:5])}")


def _wrong_folder(folder: Path) -> str | None:
    """What a folder is that holds no model, or more than one, with what to do."""
    if any((folder / f"adapter_{name}").is_file() for name in ADAPTER):
        beside = "; remove its files if the weights have it already"
        return (
            "holds an adapter of PEFT: merge it into its model (merge_and_unload), convert that "
            "(hf-to-megatron, megatron-to-hf), and give the export"
        ) + (beside if has_safetensors(folder) else "")
    if (folder / "config.json").is_file():
        return None
    if (folder / "run.json").is_file() or (folder / "checkpoints").is_dir():
        return "is a checkpoint of training: export it (megatron-to-hf), and give the export"
    return "no config.json: give a folder of tools.convert_checkpoint"


def _read(
    folder: Path,
    config: MossVideoConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    rank: int,
    ranks: int,
) -> Reading:
    """The model with the numbers of the files as its weights."""
    if has_safetensors(folder):
        return read_model(folder, config, dtype, device, rank, ranks)
    model, info = MossVideoForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=dtype or "auto", output_loading_info=True
    )
    if ranks > 1:
        shard(model, rank, ranks)
    return Reading(model, list(info["missing_keys"]), list(info["unexpected_keys"]))


def _restore_quantized(
    model: MossVideoForConditionalGeneration,
    folder: Path,
    stored: Any,
    quantize: str | None,
) -> None:
    """Makes the quantized layers of an export that is quantized (compressed-tensors, one scale
    per row)."""
    kind = {"int-quantized": "int8", "float-quantized": "fp8"}.get(dict(stored).get("format", ""))
    if kind is None:
        raise ValueError(
            f"{folder}: config.json: quantization_config is none of tools.convert_checkpoint's"
        )
    if quantize not in (None, kind):
        raise ValueError(f"{folder}: quantize={quantize}: the checkpoint is quantized as {kind}")
    scales = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                if name.endswith(".weight_scale"):
                    scales[_layer(name)] = opened.get_tensor(name).flatten()
    take_scales(model, scales, kind)


def _layer(name: str) -> str:
    """The module of a scale, in either layout of names."""
    return today_name(name).removesuffix(".weight_scale")


def _check_tokenizer(folder: Path) -> None:
    """The folder's tokenizer is the one that its weights were trained with, where it says which."""
    training, file = folder / "training.json", folder / "tokenizer.json"
    if not (training.is_file() and file.is_file()):
        return
    try:
        kept = json.loads(training.read_text()).get("tokenizer")
        saved = None if kept is None else TokenizerIdentity.from_dict(kept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{training}: tokenizer: cannot be read: {error!r}") from None
    differences = "" if saved is None else identify(file).differences(saved)
    if differences:
        raise ValueError(
            f"{file}: is not the tokenizer that the model was trained with ({differences}): put "
            "back the export's"
        )


def load_processor(checkpoint: str | Path) -> Any:
    """The folder's processor; None where it has no tokenizer. Raises ValueError."""
    if not (Path(checkpoint) / "tokenizer.json").is_file():
        return None
    try:
        return MossVideoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"{checkpoint}: its processor cannot be loaded: {reason}") from error


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype of weights; None: the checkpoint's. CPUs compute in fp32: others are slow there."""
    if dtype is None:
        return None if devices.is_accelerator(device) else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: allowed: {', '.join(DTYPES)}")
    return DTYPES[dtype]
