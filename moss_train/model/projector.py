"""Pooling of the patch grid and the projection to the decoder's width."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torch.nn.utils import skip_init

from moss_train import hardware
from moss_train.model.vision import VisionTower, concatenate_states
from moss_train.model_config import ModelConfig


def pooled_tokens(model: ModelConfig) -> int:
    """Vision tokens of one tile after pooling: the class token and the pooled grid."""
    if model.projector.pool == "none":
        return model.vision.num_patches
    return (model.vision.grid // model.projector.stride) ** 2 + 1


class Projector(nn.Module):
    """`[N, T, P, D]` states -> `[N, T x pooled P, H]`."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.pool, self.stride = model.projector.pool, model.projector.stride
        width = model.vision.output_size
        made = {"dtype": dtype, "device": hardware.device()}
        self.linear = skip_init(nn.Linear, width, model.text.hidden_size, **made)
        self.merge = None
        if self.pool == "channel_fusion":
            kernel = self.stride
            self.merge = skip_init(
                nn.Conv2d, width, width, kernel, stride=kernel, bias=False, **made
            )

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features `[N, T, P, D]` (see `pool_states`) -> `[N, T x P, H]`."""
        if self.merge is not None:
            features = self._pool(features)
        return self.linear(features).flatten(1, 2)

    def pool_states(self, final: Tensor, intermediate: list[Tensor]) -> Tensor:
        """Pools each state, then concatenates them: `[N, T, P, D x (1 + n)]`.

        Average, max and bilinear pooling work on each channel alone, so that pooling first gives
        the same numbers with stride^2 less memory. `channel_fusion` mixes channels and is trained:
        it is applied by `forward`, after the concatenation.
        """
        if self.pool not in ("none", "channel_fusion"):
            final, intermediate = self._pool(final), [self._pool(x) for x in intermediate]
        return concatenate_states(final, intermediate)

    def _pool(self, x: Tensor) -> Tensor:
        frames, tiles, patches, _ = x.shape
        grid = int((patches - 1) ** 0.5)
        image = x[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, (grid, grid))
        image = self._pool_grid(image)  # [N * T, D, g, g]
        image = image.flatten(2).transpose(1, 2).unflatten(0, (frames, tiles))
        return torch.cat((x[:, :, :1], image), dim=2)

    def _pool_grid(self, image: Tensor) -> Tensor:
        if self.merge is not None:
            return self.merge(image)
        if self.pool == "average":
            return avg_pool2d(image, self.stride)
        if self.pool == "max":
            return max_pool2d(image, self.stride)
        size = image.shape[-1] // self.stride
        return interpolate(image.float(), size=(size, size), mode="bilinear").to(image.dtype)


class VisionEncoder(MegatronModule):
    """Tower, pooling and projector: what turns frames into the states that the decoder attends."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ):
        super().__init__(config)
        self.tp_group = groups.tp
        self.vision = VisionTower(model, config, groups)
        self.projector = Projector(model, config.params_dtype)

    def features(self, pixels: Tensor, ratio_ids: Tensor) -> Tensor:
        """The tower's states, pooled: `[N, T, 3, h, w]` -> `[N, T, P, D]`. Frozen in stage pt1."""
        return self.projector.pool_states(*self.vision(pixels, ratio_ids))

    def forward(self, pixels: Tensor, ratio_ids: Tensor) -> Tensor:
        """Normalized frames `[N, T, 3, h, w]` -> `[N, T x P, H]`."""
        return self.projector(self.features(pixels, ratio_ids))
