"""An export, opened by transformers, in place of the checkpoint that it was made from."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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

    @torch.no_grad()
    def next_tokens(self, inputs: Sequence[ModelInput]) -> list[int]:
        """`Model.next_tokens`."""
        parts = [*self._parts(inputs)]
        found = []
        for part in parts:
            # Logits of the tokens that are the last of some sequence.
            ends = torch.tensor([len(inputs[number].tokens) - 1 for number in part])
            kept, place = to_device([*ends.unique(return_inverse=True)])
            _, logits = self._logits([inputs[number] for number in part], logits_to_keep=kept)
            found.append(logits.argmax(-1).gather(1, place[:, None])[:, 0])
        tokens = HostCopy(torch.cat(found)).wait() if found else []
        numbers = chain.from_iterable(parts)
        return [int(token) for _, token in sorted(zip(numbers, tokens, strict=True))]

    @torch.no_grad()
    def predict(self, inputs: Sequence[ModelInput]) -> list[tuple[Tensor, Tensor]]:
        """`Model.predict`."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for part in self._parts(inputs):
            tokens, logits = self._logits([inputs[number] for number in part])
            columns = likely_and_chances(tokens.flatten(), logits.flatten(0, 1)).cpu()
            for number, row in zip(part, columns.unflatten(1, tokens.shape).unbind(1), strict=True):
                found[number] = sequence_scores(*row[:, : len(inputs[number].tokens)])
        return [found[number] for number in range(len(inputs))]

    def _parts(self, inputs: Sequence[ModelInput]) -> Iterator[list[int]]:
        """Numbers of sequences for a pass: with as many frames each, and padded no more tokens and
        frames than a microbatch has, or one sequence."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(inputs):
            count = len(one.positions)
            alike.setdefault((count, *one.states.shape[1:]), []).append(number)
        for (count, *_), numbers in alike.items():
            numbers.sort(key=lambda number: -len(inputs[number].tokens))  # little padding
            while numbers:
                longest = len(inputs[numbers[0]].tokens)
                most = self.config.microbatch_tokens // longest
                if count:
                    most = min(most, self.config.microbatch_frames // count)
                yield numbers[: max(1, most)]
                numbers = numbers[max(1, most) :]

    def _logits(self, inputs: Sequence[ModelInput], **options: Any) -> tuple[Tensor, Tensor]:
        """Tokens `[B, S]` and logits `[B, S, V]` of sequences with as many frames each, which stand
        at their `<|image|>` tokens. No token sees the padding, which is behind it.

        options: of the model's pass.
        """
        count, tokens = len(inputs[0].positions), [torch.tensor(one.tokens) for one in inputs]
        ratios = torch.stack([one.ratios[:count] for one in inputs])
        (rows, ratio_ids) = to_device([pad_sequence(tokens, batch_first=True), ratios])
        # A control without frames keeps its <|image|> tokens.
        frames: dict[str, Any] = {"marks_alone": True}
        if count:
            states = torch.stack([one.states[:count] for one in inputs])
            frames = {"cross_attention_states": states, "aspect_ratio_ids": ratio_ids}
        return rows, self.exported(input_ids=rows, use_cache=False, **frames, **options).logits
