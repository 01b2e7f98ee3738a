"""Converts checkpoints between Hugging Face's format and training's, tensor by tensor."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from data_pipeline.imports import uncollected

with uncollected():
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    import inference.hf
    from data_pipeline.commands import (
        STOPPED,
        WRONG_USAGE,
        CommandParser,
        report_error,
        whole_number,
    )
    from data_pipeline.signal_handlers import handling
    from data_pipeline.tables import format_table
    from moss_train.config import RENAMED, ConfigError
    from moss_train.convert.hf_config import ARCHITECTURES
    from moss_train.convert.source import ConversionError
    from moss_train.convert.to_hf import ToHf, convert_megatron
    from moss_train.convert.to_megatron import FromHf, convert_hf
    from moss_train.hardware import DTYPES
    from moss_train.model.hf_mapping import Pattern, patterns, sizes
    from moss_train.model_config import ModelConfig

PROGRAM = "python -m tools.convert_checkpoint"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: list[str] | None = None) -> int:
    """Converts; returns 1, with a message and nothing left behind, where that cannot be done."""
    options = _parse(arguments)
    if options.list:
        print(listing(read_model(options.model)))
        return 0
    try:
        with handling([signal.SIGTERM], _stop):
            lines = _convert(options)
    except (ConversionError, ConfigError) as error:
        return report_error(PROGRAM, error)
    except OSError as error:
        return report_error(PROGRAM, f"{error.filename or options.out}: {error.strerror or error}")
    print("\n".join([*lines, str(options.out)]))
    return 0


def _convert(options: argparse.Namespace) -> list[str]:
    """Lines that say what was made."""
    if options.direction == "hf-to-megatron":
        return convert_hf(
            FromHf(
                options.source,
                options.out,
                arch=options.arch,
                dtype=options.dtype,
                stage=options.stage,
                grow_into=read_model(options.model) if options.model else None,
                tensor_parallel=options.tensor_parallel,
                seed=options.seed,
                check_finite=options.check_finite,
                allow_pickle=options.allow_pickle,
                workers=options.workers,
            )
        )
    return convert_megatron(
        ToHf(
            options.source,
            options.out,
            Path(inference.hf.__file__).parent,
            target=options.target,
            dtype=options.dtype,
            quantize=options.quantize,
            stage=options.stage,
            tokenizer=options.tokenizer,
            max_shard_size=options.max_shard_size,
            check_finite=options.check_finite,
            workers=options.workers,
        )
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the table of parameters")
    parser.add_argument("--model", type=Path, metavar="FILE.yaml",
                        help="model of --list, as in conf/model (default: 11b's)")  # fmt: skip
    parser.set_defaults(direction=None)
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION")
    to_megatron = directions.add_parser(
        "hf-to-megatron", help="SRC in Hugging Face's format to a checkpoint for `init_from`"
    )
    to_hf = directions.add_parser(
        "megatron-to-hf", help="a run's checkpoint to a folder that transformers opens"
    )
    _add_to_megatron(to_megatron.add_argument)
    _add_to_hf(to_hf.add_argument)
    for direction in (to_megatron, to_hf):
        add = direction.add_argument
        add("--dtype", choices=tuple(DTYPES), help="dtype to cast to (default: as stored)")
        add("--stage", help="training stage that made the weights (default: as SRC or RUN says)")
        add("--check-finite", action="store_true", help="refuse weights with NaN or infinity")
        add("--workers", type=whole_number(above=0), default=2, help="threads that read and write")
    options = parser.parse_args(arguments)
    if options.direction is None and not options.list:
        parser.error("give hf-to-megatron, megatron-to-hf or --list")
    return options


def _add_to_megatron(add: Callable[..., object]) -> None:
    add("source", type=Path, metavar="SRC", help="folder with config.json")
    add("out", type=Path, metavar="OUT", help="checkpoint to make; must not exist")
    add(
        "--arch",
        choices=ARCHITECTURES,
        help="format of SRC (default: as its config.json says)",
    )
    add("--model", type=Path, metavar="FILE.yaml",
        help="for a text-only SRC: sizes of the tower and the projector and the layers with "
        "cross-attention, as in conf/model (default: 11b's)")  # fmt: skip
    add("--tensor-parallel", type=whole_number(above=0), default=1, metavar="N",
        help="pad the embedding to rows that N tensor ranks share evenly; an export drops the "
        "padding")  # fmt: skip
    add(
        "--seed",
        type=whole_number(least=0),
        default=1234,
        help="for a text-only SRC: seed of the new weights",
    )
    add("--allow-pickle", action="store_true", help="also read *.bin, with weights_only")


def _add_to_hf(add: Callable[..., object]) -> None:
    add("source", type=Path, metavar="RUN", help="run folder or checkpoint")
    add("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add("--target", choices=ARCHITECTURES, help="model class of the export (default: moss)")
    add("--quantize", choices=("int8", "fp8"), help="quantize the decoder's linear layers")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: the run's)")
    add("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE",
        help="maximum size of a weight file")  # fmt: skip


def listing(model: ModelConfig) -> str:
    """The table of parameters as text: our names, shapes over tensor ranks, Hugging Face's
    names."""
    rows = [("megatron", "split", "kind", "Hugging Face", "shape")]
    for pattern in patterns(model):
        rule = pattern.rule
        split = "" if rule.split is None else f"dim {rule.split}"
        first = (rule.ours, split, rule.kind, rule.hf[0], rule.shapes[0])
        rows.append(first)
        rows += [("", "", "", *rest) for rest in zip(rule.hf[1:], rule.shapes[1:], strict=True)]
    words = ", ".join(f"{word} {size}" for word, size in sizes(model).items())
    return "\n".join(
        [format_table(rows, "l"), "", f"{{i}}: {_layers(patterns(model))}", f"sizes: {words}"]
    )


def _layers(rules: list[Pattern]) -> str:
    kinds: dict[str, tuple[int, ...]] = {}
    for pattern in rules:
        if pattern.layers is not None:
            kind = pattern.rule.ours.partition(".{i}")[0]
            inside = "cross-attention" if "linear_kv" in pattern.rule.ours else kind
            kinds.setdefault(inside, pattern.layers)
    return "; ".join(f"{kind} {', '.join(map(str, layers))}" for kind, layers in kinds.items())


def read_model(path: Path | None) -> ModelConfig:
    """The model of a file as in conf/model; without a file, that of 11b."""
    if path is None:
        return ModelConfig()
    try:
        plain = yaml.safe_load(path.read_text())
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), plain))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        key = getattr(error, "full_key", None)
        line = next(iter(str(error).splitlines()), type(error).__name__)
        if f"model.{key}" in RENAMED:
            line = f"{key} is called {RENAMED[f'model.{key}'].removeprefix('model.')} now"
        report_error(PROGRAM, f"--model {path}: {line}")
        raise SystemExit(WRONG_USAGE) from None
    assert isinstance(model, ModelConfig)
    return model


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: must be a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
