"""A trained model in one process: from a checkpoint of any layout to logits, text, an export."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.encode import SampleEncoder
from data_pipeline.prompts import trained_form
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.checkpoint_dir import find, read_run
from moss_train.config import Config, HardwareConfig, ParallelConfig, from_dict
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.evaluate.items import EvaluationError
from moss_train.evaluate.question import Clip, Image, answer
from moss_train.model.frame_plan import plan_frames
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model.shape_grid import rounds_lengths
from moss_train.model.vision import tiles_used
from moss_train.model_config import MOST_FRAMES_PER_CHUNK
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.process_groups import build_groups
from moss_train.train.checkpoint import load_weights
from moss_train.train.data import encode_config
from moss_train.train.process import leave_process_group, start_process_group
from moss_train.trained_tokenizer import check_tokenizer
from moss_train.transfer import move

# Files that an export carries, so that transformers can open it.
HF_CODE = Path(__file__).resolve().parents[2] / "inference" / "hf"


class TrainedModel:
    """A model's weights, its tokenizer and its way to encode samples.

    with TrainedModel.open("runs/first") as model:
        model.generate("Where is the circle?", images=["picture.jpg"])
        model.export("exports/first")
    """

    _leave: weakref.finalize | None = None

    def __init__(self, config: Config, model: MossVideo, path: Path, step: int):
        """Takes a model that is alone in its groups. `path`, `step`: where its weights are from."""
        self.config, self.model, self.path, self.step = config, model, path, step
        chunk = config.model.vision.frames_per_chunk or MOST_FRAMES_PER_CHUNK
        self.exchange = FrameExchange(config.model, model.encoder, model.groups, chunk)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.encoder = SampleEncoder(encode_config(config), self.tokenizer)

    @classmethod
    def open(
        cls, checkpoint: Path | str, device: str = "auto", threads: int | None = None
    ) -> TrainedModel:
        """Opens a run folder or checkpoint of any layout.

        Args:
            device: one of hardware.KINDS. A process that has worked on the CPU stays there.
            threads: of the CPU (default: all cores).

        Raises:
            EvaluationError: there is no complete checkpoint.
            ConfigError: its tokenizer's folder holds another one now.
        """
        source = find(Path(checkpoint))
        if source is None:
            raise EvaluationError(f"{checkpoint}: no complete checkpoint there: give a run folder")
        saved = read_run(source)
        config = from_dict(saved["config"])
        tokenizer = config.data.tokenizer
        mend = "put back the one that it was trained with"
        check_tokenizer(saved, source, tokenizer, f"data.tokenizer={tokenizer}", mend)
        config.parallel = ParallelConfig()
        config.hardware = HardwareConfig(device=device, threads=threads)
        start_process_group(config)
        try:
            model = MossVideo(config.model, config.parallel, build_groups(config.parallel, seed=0))
            load_weights(model, source)
            opened = cls(config, model, source, saved["step"])
        except BaseException:
            leave_process_group()
            raise
        opened._leave = weakref.finalize(opened, leave_process_group)
        return opened

    def generate(
        self,
        prompt: str,
        images: Sequence[Image] = (),
        video: Clip | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> str:
        """The most likely answer to `prompt`, after `images` and `video`, in the stage's form.

        Every token is a new pass over all tokens: `inference.load` of an export is the fast way.

        Args:
            images: files, their bytes, PIL images, uint8 [H, W, 3] arrays or [3, H, W] tensors.
            video: a file, from which as many frames are taken as in training, or its frames. A
                real-time model watches it in silence and is asked at its end.

        Raises:
            SampleError: a file cannot be decoded.
            OSError: a file cannot be read.
        """
        stage = self.config.stage
        watched = trained_form(stage.name, stage.prompt) == "realtime"
        return answer(self, prompt, images, video, watched=watched, max_new_tokens=max_new_tokens)

    def export(
        self, out: Path | str, *, dtype: str | None = None, quantize: str | None = None
    ) -> Path:
        """Writes the checkpoint in Hugging Face's form to the new folder `out`, which
        `inference.load` and transformers open.

        Args:
            dtype: fp32 or bf16 (default: as stored).
            quantize: int8 or fp8, of the decoder's linear layers.

        Raises:
            ConversionError: `out` is there already, or the checkpoint is damaged.
        """
        convert_megatron(ToHf(self.path, Path(out), HF_CODE, dtype=dtype, quantize=quantize))
        return Path(out)

    def close(self) -> None:
        """Leaves the process group, which ends with the last model of the process."""
        if self._leave is not None:
            self._leave()

    def __enter__(self) -> TrainedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        lengths = [len(sequence) for sequence in sequences]
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
            rounded=rounds_lengths(model),
        )
        tokens = torch.tensor(list(chain.from_iterable(sequences)))
        text = PackedText(tokens, lengths, rounds_lengths(model))
        move(frames, text)
        shown = [state[:count] for state, count in zip(states, counts, strict=True) if count]
        frames.states = torch.cat(shown) if shown else states[0][:0]
        (decoder,) = self.model.chunks
        return list(decoder(text, frames).float().split(lengths))
