"""The whole model as one rank holds it: the vision encoder and its chunks of the decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from moss_train import hardware
from moss_train.config import AdapterConfig, ParallelConfig
from moss_train.model.decoder import Chunk, Decoder
from moss_train.model.groups import Groups
from moss_train.model.hf_mapping import rules
from moss_train.model.kernels import Kernels
from moss_train.model.lora import adapt
from moss_train.model.projector import VisionEncoder
from moss_train.model.transformer_config import decoder_config, vision_config
from moss_train.model_config import ModelConfig


class MossVideo:
    """Vision encoder (whole, on every rank) and decoder chunks (one, or `parallel.virtual`)."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        groups: Groups,
        adapter: AdapterConfig | None = None,
        kernels: Kernels | None = None,
    ):
        """kernels: that the layers use; None: plain torch."""
        self.config, self.parallel, self.groups = config, parallel, groups
        with hardware.device():  # not on the CPU, where torch makes what names no device
            tower = vision_config(config, parallel, kernels)
            self.encoder = VisionEncoder(config, tower, groups.vision)
            mcore = decoder_config(config, parallel, kernels)
            self.chunks = [
                # Each chunk has its own config: megatron hangs schedule hooks on it.
                Decoder(
                    config, copy.copy(mcore), groups.decoder, chunk, parallel.recompute == "full"
                )
                for chunk in chunks_of_rank(config, parallel, groups.decoder.pp.rank())
            ]
            self.adapted = adapter is not None and adapter.name == "lora"
            if adapter is not None and self.adapted:
                adapt(self.layers, adapter)
        self._mark_sharded()

    def _mark_sharded(self) -> None:
        """Tells megatron which parameters are slices: its gradient norm counts the others once.

        (Its layers mark them while they initialize weights, which we do not let them do.)
        """
        split = {name: rule.split for name, rule in rules(self.config).items()}
        for name, parameter in self.named_parameters():
            sharded = split[name] is not None
            dimension = split[name] if sharded else -1
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, sharded, dimension, 1)

    @property
    def layers(self) -> list[nn.ModuleDict]:
        """The decoder layers of each of this rank's chunks, by global index."""
        return [chunk.layers for chunk in self.chunks]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank under their global names: vision.*, projector.*, decoder.*."""
        yield from self.encoder.named_parameters()
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                yield f"decoder.{name}", parameter


def chunks_of_rank(config: ModelConfig, parallel: ParallelConfig, stage: int) -> list[Chunk]:
    """The runs of layers on pipeline rank `stage`: chunk v of rank r is number v x pipeline + r."""
    total = config.text.num_layers
    size = total // (parallel.pipeline * parallel.virtual)
    chunks = []
    for virtual in range(parallel.virtual):
        first = (virtual * parallel.pipeline + stage) * size
        number = virtual if parallel.virtual > 1 else None
        chunks.append(Chunk(first, first + size, total, number))
    return chunks
