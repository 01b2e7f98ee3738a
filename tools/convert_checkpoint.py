"""python -m tools.convert_checkpoint hf-to-megatron SRC OUT | megatron-to-hf RUN OUT | --list

Between Hugging Face's form and checkpoints of training, tensor by tensor.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path
from types import FrameType

import yaml
from omegaconf import OmegaConf

import inference.hf
from moss_train.config import ConfigError, ModelConfig
from moss_train.convert.source import ConversionError
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.model.hf_mapping import Pattern, patterns, sizes

DTYPES = ("bf16", "fp32")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: list[str] | None = None) -> int:
    """Converts. 1 with a message where that cannot be done; nothing is left then."""
    options = _parse(arguments)
    if options.list:
        print(listing(read_model(options.model)))
        return 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        if options.direction == "hf-to-megatron":
            lines = convert_hf(
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
        else:
            lines = convert_megatron(
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
    except (ConversionError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, str(options.out)]))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tools.convert_checkpoint", usage=first, description=rest, allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="print the table of parameters")
    parser.add_argument("--model", type=Path, help="--list: of which model; conf/model/11b.yaml")
    parser.set_defaults(direction=None)
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION")
    theirs = directions.add_parser("hf-to-megatron", help="what `init_from` takes")
    theirs.add_argument("source", type=Path, metavar="SRC", help="folder with config.json")
    theirs.add_argument("out", type=Path, metavar="OUT", help="a new checkpoint")
    theirs.add_argument(
        "--arch", choices=("moss", "mllama"), help="what SRC is; as its config.json says"
    )
    theirs.add_argument(
        "--model",
        type=Path,
        metavar="FILE.yaml",
        help="text-only SRC: tower, projector and places of the cross-attention, as conf/model has "
        "them; 11b's",
    )
    theirs.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="give the embedding rows until N tensor ranks share them evenly; an export drops them",
    )
    theirs.add_argument("--seed", type=int, default=1234, help="text-only SRC: of what is drawn")
    theirs.add_argument(
        "--allow-pickle", action="store_true", help="also read *.bin, as weights alone"
    )
    ours = directions.add_parser("megatron-to-hf", help="what transformers opens")
    ours.add_argument("source", type=Path, metavar="RUN", help="run folder or checkpoint")
    ours.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    ours.add_argument("--target", choices=("moss", "mllama"), help="class that opens it; moss")
    ours.add_argument("--quantize", choices=("int8", "fp8"), help="the decoder's linear layers")
    ours.add_argument("--tokenizer", type=Path, help="folder; that of the run")
    ours.add_argument(
        "--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="of a file; 5GB"
    )
    for direction in (theirs, ours):
        direction.add_argument("--dtype", choices=DTYPES, help="cast; as stored")
        direction.add_argument("--stage", help="what the weights were trained for: pt1, sft, ...")
        direction.add_argument("--check-finite", action="store_true", help="refuse NaN")
        direction.add_argument("--workers", type=int, default=2, help="threads that write; 2")
    options = parser.parse_args(arguments)
    if options.direction is None and not options.list:
        parser.error("give hf-to-megatron, megatron-to-hf or --list")
    return options


def listing(model: ModelConfig) -> str:
    """The table as text: our names, shapes over tensor ranks, HF names."""
    rows = [("megatron", "split", "kind", "Hugging Face", "shape")]
    for pattern in patterns(model):
        rule = pattern.rule
        split = "" if rule.split is None else f"dim {rule.split}"
        first = (rule.ours, split, rule.kind, rule.hf[0], rule.shapes[0])
        rows.append(first)
        rows += [("", "", "", *rest) for rest in zip(rule.hf[1:], rule.shapes[1:], strict=True)]
    wide = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(size) for cell, size in zip(row, wide, strict=True)).rstrip()
        for row in rows
    ]
    words = ", ".join(f"{word} {size}" for word, size in sizes(model).items())
    return "\n".join([*lines, "", f"{{i}}: {_layers(patterns(model))}", f"sizes: {words}"])


def _layers(found: list[Pattern]) -> str:
    kinds: dict[str, tuple[int, ...]] = {}
    for pattern in found:
        if pattern.layers is not None:
            kind = pattern.rule.ours.partition(".{i}")[0]
            inside = "cross-attention" if "linear_kv" in pattern.rule.ours else kind
            kinds.setdefault(inside, pattern.layers)
    return "; ".join(f"{kind} {', '.join(map(str, layers))}" for kind, layers in kinds.items())


def read_model(path: Path | None) -> ModelConfig:
    """A file as in conf/model; without one, that of 11b."""
    if path is None:
        return ModelConfig()
    try:
        plain = yaml.safe_load(path.read_text())
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), plain))
    except Exception as error:  # yaml's and OmegaConf's
        raise SystemExit(f"--model {path}: {error}") from None
    assert isinstance(model, ModelConfig)
    return model


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text}: must be a size such as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
