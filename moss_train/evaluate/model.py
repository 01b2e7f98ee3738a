"""A trained model in one process: from a checkpoint of any layout to next-token logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.encode import SampleEncoder
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.config import Config, HardwareConfig, ParallelConfig, from_dict
from moss_train.evaluate.items import EvaluationError
from moss_train.model.frames import plan_frames
from moss_train.model.moss_video import MossVideo
from moss_train.model.pixels import tiles_used
from moss_train.model.text import PackedText
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.groups import build_groups
from moss_train.train.checkpoint import load_weights
from moss_train.train.data import encode_config
from moss_train.train.loop import start_process_group
from moss_train.train.saved import find, read_run


class TrainedModel:
    """The weights of a checkpoint, its tokenizer and its way to encode samples."""

    def __init__(self, checkpoint: Path, device: str = "auto", threads: int | None = None):
        """Opens a run folder or checkpoint. Raises EvaluationError where there is none."""
        found = find(checkpoint)
        if found is None:
            raise EvaluationError(f"{checkpoint}: no complete checkpoint there: give a run folder")
        self.path, saved = found, read_run(found)
        self.step: int = saved["step"]
        self.config: Config = from_dict(saved["config"])
        self.config.parallel = ParallelConfig()
        self.config.hardware = HardwareConfig(device=device, threads=threads)
        if not torch.distributed.is_initialized():
            start_process_group(self.config)
        groups = build_groups(self.config.parallel, seed=0)
        self.model = MossVideo(self.config.model, self.config.parallel, groups)
        load_weights(self.model, found)
        self.exchange = FrameExchange(self.config.model, self.model.encoder, groups)
        self.tokenizer = load_tokenizer(self.config.data.tokenizer)
        self.encoder = SampleEncoder(encode_config(self.config), self.tokenizer)

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
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        states: Sequence[Tensor],
        ratios: Sequence[Tensor],
    ) -> list[Tensor]:
        """Next-token logits `[S, V]` of each sequence of tokens.

        `positions` are the indexes of the frames' marks in a sequence, `states` and `ratios` its
        frames in that order, of which there may be more than marks: the later ones stay unseen.
        """
        lengths, device = [len(row) for row in rows], hardware.device()
        counts = [len(where) for where in positions]
        model, tiles = self.config.model, self.config.data.max_tiles
        seen = torch.cat([ratio[:count] for ratio, count in zip(ratios, counts, strict=True)])
        frames = plan_frames(
            torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)),
            torch.tensor([place for where in positions for place in where], dtype=torch.int64),
            lengths,
            sum(lengths),
            tiles=tiles_used(seen, model.vision).clamp(max=tiles),
            max_tiles=tiles,
            attend_all=model.blind_rows == "attend_all",
        ).to(device)
        shown = [state[:count] for state, count in zip(states, counts, strict=True) if count]
        frames.states = torch.cat(shown) if shown else states[0][:0]
        tokens = torch.tensor([token for row in rows for token in row], device=device)
        (decoder,) = self.model.chunks
        return list(decoder(PackedText(tokens, lengths), frames).float().split(lengths))
