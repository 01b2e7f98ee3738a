"""megatron-core configurations of the two transformers, made from ours."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import gelu, silu

from moss_train import hardware
from moss_train.config import ParallelConfig
from moss_train.model.kernels import Kernels, LayerConfig
from moss_train.model_config import ModelConfig


def _common(
    model: ModelConfig,
    parallel: ParallelConfig,
    selective: bool,
    tensor: int,
    kernels: Kernels,
) -> dict:
    dtype = hardware.DTYPES[model.dtype]
    # In megatron's own layers, of several tensor ranks; else linear.py. They keep the weight where
    # the hooks of a recomputation hide from them that it has a main gradient.
    fused = kernels.accumulate is not None and tensor > 1 and parallel.recompute == "none"
    return {
        "tensor_model_parallel_size": tensor,
        "kernels": kernels,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are drawn by name, the same in every layout: see convert/random_init.py.
        "perform_initialization": False,
        # Without an explicit device, parameters can also be made on the meta device.
        "use_cpu_initialization": not hardware.on_accelerator(),
        # Fusions compile for tens of seconds; they pay on a GPU only.
        "bias_dropout_fusion": False,
        "bias_activation_fusion": hardware.on_accelerator(),
        "gradient_accumulation_fusion": fused,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        # The loss is divided by the global count of labels in model/loss.py, not by megatron.
        "calculate_per_token_loss": True,
        # Read in model/recompute.py, by our own norms and activations.
        "recompute_granularity": "selective" if selective else None,
        "recompute_modules": ["layernorm"],
    }


def decoder_config(
    model: ModelConfig, parallel: ParallelConfig, kernels: Kernels | None = None
) -> LayerConfig:
    """megatron's configuration of the decoder."""
    text, kernels = model.text, kernels or Kernels()
    if model.fp8 != "all":
        kernels = replace(kernels, fp8=None)
    interleaved = parallel.virtual > 1
    on_cpu = not hardware.on_accelerator()
    return LayerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        ffn_hidden_size=text.mlp_size,
        layernorm_epsilon=text.norm_eps,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=silu,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if interleaved else None,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=hardware.DTYPES[model.dtype],
        # With overlap_p2p_comm=False the interleaved schedule of two stages gives wrong gradients.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a wait for the device, which old releases of torch needed
        # Over gloo an overlapped send still reads the output when the schedule has freed it.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not (interleaved and on_cpu),
        **_common(model, parallel, parallel.recompute == "selective", parallel.tensor, kernels),
    )


def vision_config(
    model: ModelConfig, parallel: ParallelConfig, kernels: Kernels | None = None
) -> LayerConfig:
    """megatron's configuration of the vision tower's layers. Its pipeline has one stage on every
    rank."""
    vision = model.vision
    return LayerConfig(
        num_layers=vision.num_layers + vision.num_global_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.mlp_size,
        layernorm_epsilon=vision.norm_eps,
        normalization="LayerNorm",
        add_bias_linear=True,
        activation_func=gelu,
        **_common(
            model,
            parallel,
            parallel.recompute != "none",
            parallel.vision_slices,
            kernels or Kernels(),
        ),
    )
