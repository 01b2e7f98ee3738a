"""A trained model: from a checkpoint of any layout, in this or another one, to text, an export."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from data_pipeline.prompts import trained_form
from moss_train.checkpoint_dir import find, read_run
from moss_train.config import Config, ConfigError, HardwareConfig, ParallelConfig, from_dict
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.evaluate.items import EvaluationError
from moss_train.evaluate.question import Clip, Image, answer
from moss_train.evaluate.replica import ReplicaModel
from moss_train.model.moss_video import MossVideo
from moss_train.model_config import MOST_FRAMES_PER_CHUNK
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.process_groups import build_groups
from moss_train.train.checkpoint import load_weights
from moss_train.train.process import leave_process_group, start_process_group, started_ranks
from moss_train.trained_tokenizer import check_tokenizer
from moss_train.validate import check_layout, for_reading

# Files that an export carries, so that transformers can open it.
HF_CODE = Path(__file__).resolve().parents[2] / "inference" / "hf"


class TrainedModel(ReplicaModel):
    """A model's weights, its tokenizer and its way to encode samples.

    with TrainedModel.open("runs/first") as model:
        model.generate("Where is the circle?", images=["picture.jpg"])
        model.export("exports/first")
    """

    _leave: weakref.finalize | None = None

    def __init__(self, config: Config, model: MossVideo, path: Path, step: int):
        """`path`, `step`: where the weights are from."""
        self.model, self.path, self.step = model, path, step
        chunk = config.model.vision.frames_per_chunk or MOST_FRAMES_PER_CHUNK
        exchange = FrameExchange(config.model, model.encoder, model.groups, chunk)
        super().__init__(config, model.chunks, exchange, model.groups)

    @classmethod
    def open(
        cls,
        checkpoint: Path | str,
        device: str = "auto",
        threads: int | None = None,
        *,
        tensor: int = 1,
        pipeline: int = 1,
    ) -> TrainedModel:
        """Opens a run folder or checkpoint of any layout.

        Args:
            device: one of hardware.KINDS. A process that has worked on the CPU stays there.
            threads: of the CPU (default: all cores).
            tensor, pipeline: ranks over which the model is split, in processes that torchrun has
                started. All of them call what the model is asked.

        Raises:
            EvaluationError: there is no complete checkpoint.
            ConfigError: its tokenizer's folder holds another one now; or model, layout and ranks do
                not fit together.
        """
        source = find(Path(checkpoint))
        if source is None:
            raise EvaluationError(f"{checkpoint}: no complete checkpoint there: give a run folder")
        saved = read_run(source)
        config = from_dict(saved["config"])
        tokenizer = config.data.tokenizer
        mend = "put back the one that it was trained with"
        check_tokenizer(saved, source, tokenizer, f"data.tokenizer={tokenizer}", mend)
        config.parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
        config.hardware = HardwareConfig(device=device, threads=threads)
        config.model = for_reading(config.model, device)
        world = dist.get_world_size() if dist.is_initialized() else started_ranks().size
        if problems := list(check_layout(config, world)):
            raise ConfigError(problems)
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
