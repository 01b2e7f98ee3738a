"""A trained model in one process: from a checkpoint of any layout to next-token logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.encode import SampleEncoder
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.checkpoint_dir import find, read_run
from moss_train.config import Config, HardwareConfig, ParallelConfig, from_dict
from moss_train.evaluate.items import EvaluationError
from moss_train.model.frame_plan import plan_frames
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model.vision import tiles_used
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.process_groups import build_groups
from moss_train.train.checkpoint import load_weights
from moss_train.train.data import encode_config
from moss_train.train.process import start_process_group


class TrainedModel:
    """A model's weights, its tokenizer and its way to encode samples."""

    def __init__(self, config: Config, model: MossVideo, path: Path, step: int):
        """Takes a model that is alone in its groups. `path`, `step`: where its weights are from."""
        self.config, self.model, self.path, self.step = config, model, path, step
        self.exchange = FrameExchange(config.model, model.encoder, model.groups)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.encoder = SampleEncoder(encode_config(config), self.tokenizer)

    @classmethod
    def open(
        cls, checkpoint: Path, device: str = "auto", threads: int | None = None
    ) -> TrainedModel:
        """Opens a run folder or checkpoint of any layout, once in a process.

        Raises EvaluationError where there is none.
        """
        source = find(checkpoint)
        if source is None:
            raise EvaluationError(f"{checkpoint}: no complete checkpoint there: give a run folder")
        saved = read_run(source)
        config = from_dict(saved["config"])
        config.parallel = ParallelConfig()
        config.hardware = HardwareConfig(device=device, threads=threads)
        start_process_group(config)
        model = MossVideo(config.model, config.parallel, build_groups(config.parallel, seed=0))
        load_weights(model, source)
        return cls(config, model, source, saved["step"])

    @torch.no_grad()
    def encode(self, samples: Sequence[EncodedSample]) -> list[Tensor]:
        """Projected frames of each sample `[F, T x P, H]`."""
        frames = torch.cat([sample.frames for sample in samples]).to(hardware.device())
        ratios = torch.cat([sample.aspect_ratio_ids for sample in samples]).to(hardware.device())
        step = StepBatch([], frames, ratios, [len(frames)])
        if not len(frames):
            width = self.config.model.text.hidden_size
            return [torch.zeros(0, 1, width, device=hardware.device()) for _ in samples]
        return list(self.exchange.states(step).split([len(sample.frames) for sample in samples]))

    @torch.no_grad()
    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        states: Sequence[Tensor],
        ratios: Sequence[Tensor],
    ) -> list[Tensor]:
        """Next-token logits `[S, V]` of each sequence of tokens.

        `positions` are the indexes of a sequence's `<|image|>` tokens, `states` and `ratios` its
        frames in that order, of which there may be more than tokens: the later ones stay unseen.
        """
        lengths, device = [len(sequence) for sequence in sequences], hardware.device()
        counts = [len(where) for where in positions]
        model, tiles = self.config.model, self.config.data.max_tiles
        seen = torch.cat([ratio[:count] for ratio, count in zip(ratios, counts, strict=True)])
        frames = plan_frames(
            torch.arange(len(sequences)).repeat_interleave(torch.tensor(counts)),
            torch.tensor([place for where in positions for place in where], dtype=torch.int64),
            lengths,
            sum(lengths),
            tiles=tiles_used(seen, model.vision).clamp(max=tiles),
            max_tiles=tiles,
            attend_all=model.tokens_before_first_frame == "attend_all",
        ).to(device)
        shown = [state[:count] for state, count in zip(states, counts, strict=True) if count]
        frames.states = torch.cat(shown) if shown else states[0][:0]
        tokens = torch.tensor(list(chain.from_iterable(sequences)), device=device)
        (decoder,) = self.model.chunks
        return list(decoder(PackedText(tokens, lengths), frames).float().split(lengths))
