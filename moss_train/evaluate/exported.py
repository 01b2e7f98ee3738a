"""An export, opened by transformers, in place of the checkpoint that it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.encode import SampleEncoder
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.config import Config, from_dict
from moss_train.evaluate.items import EvaluationError
from moss_train.evaluate.model import TrainedModel
from moss_train.model.normalize import normalize
from moss_train.train.data import encode_config
from moss_train.trained_tokenizer import check_tokenizer

FRAMES_AT_ONCE = 16


class ExportedModel(TrainedModel):
    """A `TrainedModel` whose model is transformers', opened from an exported folder."""

    def __init__(self, config: Config, exported: Any, path: Path, step: int):
        """`exported`: a MossVideoForConditionalGeneration."""
        self.config, self.exported, self.path, self.step = config, exported, path, step
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.encoder = SampleEncoder(encode_config(config), self.tokenizer)

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
                f"{checkpoint}: cannot read training.json ({error}): give the export of a run"
            ) from None
        file = checkpoint / "tokenizer.json"
        check_tokenizer(training, checkpoint, file, str(file), "put back the export's")
        config.data.tokenizer = str(checkpoint)
        where = hardware.activate(device)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            model = load(checkpoint)
        except (OSError, ValueError, RuntimeError) as error:
            raise EvaluationError(f"{checkpoint}: transformers cannot open it: {error}") from None
        return cls(config, model.eval().to(where), checkpoint, training["step"])

    @torch.no_grad()
    def encode(self, samples: Sequence[EncodedSample]) -> list[Tensor]:
        """Projected frames of each sample `[F, T x P, H]`."""
        device, vision = hardware.device(), self.config.model.vision
        out = []
        for sample in samples:
            ratios = sample.aspect_ratio_ids.to(device)
            pixels = normalize(sample.frames.to(device), ratios, vision, self.exported.dtype)
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

    @torch.no_grad()
    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        states: Sequence[Tensor],
        ratios: Sequence[Tensor],
    ) -> list[Tensor]:
        """`TrainedModel.logits`; the frames of a sequence stand at its `<|image|>` tokens."""
        device, out = hardware.device(), []
        for sequence, places, state, ids in zip(sequences, positions, states, ratios, strict=True):
            count = len(places)
            tokens = torch.tensor([list(sequence)], device=device)
            frames: dict[str, Tensor] = {}
            if count:
                frames = {
                    "cross_attention_states": state[None, :count],
                    "aspect_ratio_ids": ids[None, :count].to(device),
                }
            out.append(self.exported(input_ids=tokens, use_cache=False, **frames).logits[0].float())
        return out
