"""An export, opened by transformers, in place of the checkpoint that it was made from."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.commands import one_line
from moss_train import hardware
from moss_train.config import Config, HardwareConfig, ParallelConfig, from_dict
from moss_train.evaluate.controls import ModelInput
from moss_train.evaluate.items import EvaluationError
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.replica import likely_and_chances, sequence_scores
from moss_train.model.normalize import normalize
from moss_train.parallel.process_groups import build_groups
from moss_train.train.process import leave_process_group, start_process_group
from moss_train.trained_tokenizer import check_tokenizer
from moss_train.transfer import HostCopy, to_device

FRAMES_AT_ONCE = 16


class ExportedModel(TrainedModel):
    """A `TrainedModel` whose model is transformers', opened from an exported folder."""

    def __init__(self, config: Config, exported: Any, path: Path, step: int):
        """`exported`: a MossVideoForConditionalGeneration, whole on each rank that there is."""
        self.config, self.exported, self.path, self.step = config, exported, path, step
        self.groups = build_groups(ParallelConfig(), seed=0)

    @classmethod
    def open_with(
        cls,
        load: Callable[[Path], Any],
        checkpoint: Path,
        device: str = "auto",
        threads: int | None = None,
    ) -> ExportedModel:
        """Opens an exported folder.

        `load`: opens its model: `from_pretrained` of the class in `inference`, which runs no code
        of the folder.

        Raises EvaluationError where it does not say how samples were encoded, or cannot be opened;
        ConfigError where its tokenizer is not the one that it was exported with.
        """
        try:
            training = json.loads((checkpoint / "training.json").read_text())
            config = from_dict(training["config"])
        except (OSError, ValueError, KeyError) as error:
            raise EvaluationError(
                f"{checkpoint}: cannot read training.json ({one_line(error)}): "
                "give the export of a run"
            ) from None
        file = checkpoint / "tokenizer.json"
        check_tokenizer(training, checkpoint, file, str(file), "put back the export's")
        config.data.tokenizer = str(checkpoint)
        config.hardware = HardwareConfig(device=device, threads=threads)
        start_process_group(config)
        try:
            model = load(checkpoint).eval().to(hardware.device())
            opened = cls(config, model, checkpoint, training["step"])
        except BaseException as error:
            leave_process_group()
            if not isinstance(error, OSError | ValueError | RuntimeError):
                raise
            raise EvaluationError(f"{checkpoint}: transformers cannot open it: {error}") from None
        opened._leave = weakref.finalize(opened, leave_process_group)
        return opened

    @torch.no_grad()
    def encode(self, samples: Sequence[EncodedSample]) -> list[Tensor]:
        """Projected frames of each sample `[F, T x P, H]`."""
        vision = self.config.model.vision
        out = []
        for sample in samples:
            frames, ratios = to_device([sample.frames, sample.aspect_ratio_ids])
            pixels = normalize(frames, ratios, vision, self.exported.dtype)
            parts = [
                self.exported.get_image_features(part[None], ids[None])[0]
                for part, ids in zip(
                    pixels.split(FRAMES_AT_ONCE), ratios.split(FRAMES_AT_ONCE), strict=True
                )
                if len(part)
            ]
            none = pixels.new_zeros(0, 1, self.config.model.text.hidden_size)
            out.append(torch.cat(parts) if parts else none)
        return out

    def next_tokens(self, inputs: Sequence[ModelInput]) -> list[int]:
        """`Model.next_tokens`."""
        last = torch.stack([logits[-1] for _, logits in self._logits(inputs)])
        return [int(token) for token in HostCopy(last.argmax(-1)).wait()]

    def predict(self, inputs: Sequence[ModelInput]) -> list[tuple[Tensor, Tensor]]:
        """`Model.predict`."""
        found = self._logits(inputs)
        scored = [likely_and_chances(tokens, logits).cpu() for tokens, logits in found]
        return [sequence_scores(*rows) for rows in scored]

    def _logits(self, inputs: Sequence[ModelInput]) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens `[S]` and logits `[S, V]` of each sequence; its frames stand at its `<|image|>`
        tokens."""
        for one in inputs:
            count, tokens = len(one.positions), torch.tensor(list(one.tokens))
            (row, shown) = to_device([tokens, one.ratios[:count]])
            # A control without frames keeps its <|image|> tokens.
            frames: dict[str, Any] = {"marks_alone": True}
            if count:
                frames = {
                    "cross_attention_states": one.states[None, :count],
                    "aspect_ratio_ids": shown[None],
                }
            with torch.no_grad():
                yield row, self.exported(input_ids=row[None], use_cache=False, **frames).logits[0]
