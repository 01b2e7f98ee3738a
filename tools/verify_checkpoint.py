"""Compares an export with the checkpoint it was made from: logits, loss, greedy tokens.

Both compute the same inputs; the exit code is 1 where they differ by more than the tolerance.
--inputs takes a file of tensors with Hugging Face's names (input_ids, attention_mask, labels,
pixel_values, aspect_ratio_ids, cross_attention_mask); without --megatron the export is compared
with the `logits` of that file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.imports import uncollected

with uncollected():
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from torch import Tensor

    from data_pipeline.batch import IGNORED_LABEL
    from data_pipeline.commands import (
        CommandParser,
        describe,
        finite_number,
        report_error,
        whole_number,
    )
    from inference.hf.configuration_moss_video import MossVideoConfig
    from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
    from moss_train.checkpoint_dir import find, read_run
    from moss_train.config import Config, ConfigError, HardwareConfig, ParallelConfig, from_dict
    from moss_train.convert.hf_config import kind_of
    from moss_train.convert.job import check_manifest
    from moss_train.convert.source import ConversionError, read_json
    from moss_train.hardware import DTYPES, KINDS
    from moss_train.trained_tokenizer import check_tokenizer
    from moss_train.validate import check_layout, for_reading
    from moss_train.verify.case import Case, ForwardJob, VerificationError, make_case, read_case

PROGRAM = "python -m tools.verify_checkpoint"
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}  # of logits; the loss has a tenth


@dataclass
class Difference:
    """What two models, or a model and a file, made of a case."""

    logits_max: float
    logits_mean: float
    losses: tuple[float, float] | None
    greedy: tuple[list[int], list[int]] | None

    def problems(self, tolerance: float) -> list[str]:
        """A line for each thing that exceeds the tolerance."""
        wrong = []
        if not self.logits_max <= tolerance:  # NaN is
            wrong.append(f"logits differ by {self.logits_max:.2e}, allowed is {tolerance:.0e}")
        if self.losses and not abs(self.losses[0] - self.losses[1]) <= tolerance / 10:
            wrong.append(f"losses differ by {abs(self.losses[0] - self.losses[1]):.2e}")
        if self.greedy and self.greedy[0] != self.greedy[1]:
            wrong.append("greedy tokens differ")
        return wrong

    def table(self, names: tuple[str, str]) -> str:
        """The differences as lines of text."""
        lines = [f"logits  max {self.logits_max:.2e}  mean {self.logits_mean:.2e}"]
        if self.losses:
            off = abs(self.losses[0] - self.losses[1])
            pair = ", ".join(f"{n} {v:.6f}" for n, v in zip(names, self.losses, strict=True))
            lines.append(f"loss    {pair}, difference {off:.2e}")
        if self.greedy:
            lines += [
                f"greedy  {name}: {' '.join(map(str, tokens))}"
                for name, tokens in zip(names, self.greedy, strict=True)
            ]
        return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compares; returns 1 where something exceeds the tolerance, or cannot be compared."""
    options = _parse(arguments)
    try:
        if options.hashes:
            problems = check_manifest(options.hf)
            if problems:
                raise ConversionError("\n".join(problems))
        difference, names = compare(options)
    except (ConversionError, ConfigError, VerificationError) as error:
        return report_error(PROGRAM, error)
    except OSError as error:
        return report_error(PROGRAM, describe(error))
    print(difference.table(names))
    tolerance = options.tolerance or TOLERANCE[options.dtype]
    problems = difference.problems(tolerance)
    print("\n".join(problems) if problems else f"equal within {tolerance:.0e}")
    return 1 if problems else 0


def compare(options: argparse.Namespace) -> tuple[Difference, tuple[str, str]]:
    """Runs both sides; returns their difference and names."""
    checkpoint = None
    if options.megatron is not None:
        checkpoint = find(options.megatron)
        if checkpoint is None:
            raise VerificationError(f"{options.megatron}: no complete checkpoint there")
        check_parallel(checkpoint, options.layout)
        if (options.hf / "tokenizer.json").is_file():
            run, mend = read_run(checkpoint), "it was exported from another one: export this one"
            check_tokenizer(run, checkpoint, options.hf, f"--hf {options.hf}", mend)
    model = load_hf(options.hf, DTYPES[options.dtype], options.trust_remote_code)
    case = the_case(model.config, options.inputs)
    if checkpoint is None and "logits" not in case.expected:
        raise VerificationError(f"{options.inputs}: has no logits to compare with: give --megatron")
    greedy = len(case.expected["greedy"]) if "greedy" in case.expected else options.greedy
    mine = run_hf(model, case, greedy if checkpoint or "greedy" in case.expected else 0)
    if checkpoint is None:
        return difference(case, mine, case.expected), ("hf", "file")
    del model
    other = run_megatron(checkpoint, case, options, greedy)
    return difference(case, mine, other), ("hf", "megatron")


def difference(case: Case, mine: dict[str, Tensor], other: dict[str, Tensor]) -> Difference:
    """The difference of two sides' results; logits are compared where there is no padding."""
    kept = case.attention_mask.bool()
    off = (mine["logits"][kept] - other["logits"][kept].float()).abs()
    losses = greedy = None
    if "loss" in mine and "loss" in other and bool((case.labels != IGNORED_LABEL).any()):
        losses = (float(mine["loss"]), float(other["loss"]))
    if "greedy" in mine and "greedy" in other:
        greedy = (mine["greedy"].tolist(), other["greedy"].tolist())
    return Difference(float(off.max()), float(off.mean()), losses, greedy)


def load_hf(folder: Path, dtype: torch.dtype, trusted: bool = False) -> Any:
    """The model of an export, of a published Llama-3.2-Vision, or of a folder in their form.

    `trusted`: with the code in the folder; else with that of `inference`, of which it is a copy.
    """
    if kind_of(folder) != "vision":
        raise ConversionError(f"{folder}: is a text-only Llama: it sees no frames")
    plain, options = read_json(folder / "config.json"), {}
    if plain.get("model_type") == "mllama":
        config = transformers.AutoConfig.from_pretrained(folder)
        _shift_intermediate_layers(config)
        kind: Any = transformers.MllamaForConditionalGeneration
    elif trusted and "auto_map" in plain:
        options = {"trust_remote_code": True}
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        kind = transformers.AutoModelForImageTextToText
    else:
        config, kind = MossVideoConfig(**plain), MossVideoForConditionalGeneration
    try:
        model = kind.from_pretrained(folder, config=config, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{folder}: transformers cannot open it: {error}") from None
    return model.eval()


def _shift_intermediate_layers(config: Any) -> None:
    """transformers 5 keeps the states that leave the named layers; Llama-3.2-Vision's, as in its
    own code and in transformers up to 4.46, are those that enter them.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        return
    layers = config.vision_config.intermediate_layers_indices
    if 0 in layers:
        raise ConversionError(
            "vision_config.intermediate_layers_indices has layer 0: transformers 5 cannot give the "
            "state that enters it"
        )
    config.vision_config.intermediate_layers_indices = [layer - 1 for layer in layers]


def the_case(config: Any, path: Path | None) -> Case:
    """The case in a file, or one that is made here."""
    image = config.image_token_index
    silence = getattr(config, "silence_token_id", None)
    weight = getattr(config, "silence_weight", None)
    silence_loss = (-1 if silence is None else silence, 1.0 if weight is None else float(weight))
    if path is not None:
        return read_case(path, image, *silence_loss)
    vision, text = config.vision_config, config.text_config
    tiles = vision.max_num_tiles
    return make_case(image, text.vocab_size, vision.image_size, tiles, *silence_loss)


@torch.no_grad()
def run_hf(model: Any, case: Case, greedy: int) -> dict[str, Tensor]:
    """The `logits`, `loss`, and `greedy` tokens after the first row, each of these from a full
    forward pass."""
    tiles = case.mask.any(1).long()  # [B, F, T]
    tiles[..., 0] = 1  # no image counts as one tile, as in transformers' processor
    inputs = {
        "input_ids": case.tokens,
        "attention_mask": case.attention_mask,
        "pixel_values": case.pixels,
        "aspect_ratio_ids": case.ratio_ids,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": case.mask,
    }
    out = model(**inputs, labels=case.labels, use_cache=False)
    results = {"logits": out.logits.float(), "loss": out.loss.float().view(1)}
    length = case.lengths[0]
    row = {name: tensor[:1] for name, tensor in inputs.items()}
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        row[name] = row[name][:, :length]
    new = []
    for _ in range(greedy):
        best = model(**row, use_cache=False).logits[0, -1].argmax()
        new.append(best)
        row["input_ids"] = torch.cat((row["input_ids"], best[None, None]), 1)
        for name in ("attention_mask", "cross_attention_mask"):
            row[name] = torch.cat((row[name], row[name][:, -1:]), 1)
    return {**results, "greedy": torch.stack(new)} if new else results


def check_parallel(checkpoint: Path, layout: str) -> None:
    """Raises ConfigError where the checkpoint's model does not fit the layout."""
    config = from_dict(read_run(checkpoint)["config"])
    hardware = HardwareConfig()
    model = for_reading(config.model, hardware.device)
    checked = Config(model=model, parallel=parallel_of(layout), hardware=hardware)
    problems = list(check_layout(checked, ranks_of(layout)))
    if problems:
        raise ConfigError(problems)


def parallel_of(layout: str) -> ParallelConfig:
    """The parallel sizes of a layout: `single`, or words such as `tp2_pp2_sp`.

    Raises:
        VerificationError: it is none of these.
    """
    fields = {"tp": "tensor", "pp": "pipeline"}
    values: dict[str, Any] = {}
    for word in [] if layout == "single" else layout.split("_"):
        match = re.fullmatch(r"(tp|pp)([1-9]\d*)|sp", word)
        if match is None:
            raise VerificationError(f"--layout {layout}: must be single, or such as tp2, tp2_pp2")
        values |= {"sequence": True} if word == "sp" else {fields[match[1]]: int(match[2])}
    return ParallelConfig(**values)


def ranks_of(layout: str) -> int:
    """The number of ranks of a layout."""
    parallel = parallel_of(layout)
    return parallel.tensor * parallel.pipeline


def run_megatron(
    checkpoint: Path, case: Case, options: argparse.Namespace, greedy: int
) -> dict[str, Tensor]:
    """The results of `run_hf` for a checkpoint, computed by the ranks of a layout, under
    torchrun."""
    with tempfile.TemporaryDirectory(prefix="moss-verify-") as folder:
        inputs, out = Path(folder) / "case.safetensors", Path(folder) / "out.safetensors"
        save_file(_tensors(case), inputs)
        job = ForwardJob(
            str(checkpoint.absolute()), str(inputs), str(out), asdict(parallel_of(options.layout)),
            options.dtype, options.device, -1, case.silence_id, case.silence_weight, greedy,
        )  # fmt: skip
        (Path(folder) / "job.json").write_text(json.dumps(asdict(job)))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(ranks_of(options.layout)),
            "-m", "moss_train.verify.forward", str(Path(folder) / "job.json"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise VerificationError(f"{checkpoint}: the ranks failed\n{done.stderr[-4000:]}")
        return load_file(out)


def _tensors(case: Case) -> dict[str, Tensor]:
    tensors = {
        "input_ids": case.tokens,
        "labels": case.labels,
        "attention_mask": case.attention_mask,
        "pixel_values": case.pixels,
        "aspect_ratio_ids": case.ratio_ids,
        "vision_position_ids": case.positions,
        "cross_attention_mask": case.mask,
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="export in Hugging Face's format")
    add("--megatron", type=Path, metavar="RUN", help="run folder or checkpoint")
    add("--layout", default="single", help="layout of RUN's ranks, such as tp2_pp2")
    add("--inputs", type=Path, metavar="FILE", help="inputs (default: some of our own)")
    add("--dtype", default="fp32", choices=tuple(DTYPES), help="dtype of both models")
    add(
        "--greedy",
        type=whole_number(least=0),
        metavar="N",
        default=8,
        help="greedy tokens to compare",
    )
    add("--tolerance", type=finite_number(above=0), metavar="X",
        help="allowed difference of logits (default: 1e-4 in fp32, 0.25 in bf16)")  # fmt: skip
    add("--device", default="cpu", choices=KINDS, help="device of RUN's ranks")
    add("--trust-remote-code", action="store_true", help="run the code in DIR, not our own")
    add("--hashes", action="store_true", help="check DIR/manifest.json first")
    options = parser.parse_args(arguments)
    if options.megatron is None and options.inputs is None:
        parser.error("give --megatron, or --inputs with logits")
    return options


if __name__ == "__main__":
    sys.exit(main())
