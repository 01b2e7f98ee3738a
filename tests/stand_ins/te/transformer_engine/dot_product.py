"""DotProductAttention: signature and refusals of its source (at d0067d0d) as far as ours go,
computed in plain torch on any device.

OTHER_DTYPES: also fp32 and fp64 are taken, for tests that compare digits.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from tests.stand_ins import reference

OTHER_DTYPES = False
calls: list[str] = []


class DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
        qkv_format="sbhd", attn_mask_type="causal", window_size=None, bottom_right_diagonal=None,
        sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None,
        layer_number=None, attention_type="self", cp_group=None, cp_global_ranks=None,
        cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
        return_max_logit=False, name=None,
    ):  # fmt: skip
        super().__init__()
        assert attention_dropout == 0, "the stand-in has no dropout"
        assert attention_type == "self"
        groups = num_gqa_groups or num_attention_heads
        assert num_attention_heads % groups == 0, "heads must be divisible by GQA groups"
        ranks = tp_size if tp_group is None else torch.distributed.get_world_size(tp_group)
        self.groups, self.width = groups // ranks, kv_channels
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.scale = softmax_scale or kv_channels**-0.5
        allowed = bool(int(os.getenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")))
        self.deterministic = not allowed or torch.are_deterministic_algorithms_enabled()

    def forward(
        self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None,
        qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
        window_size=None, bottom_right_diagonal=None, checkpoint_core_attention=False,
        core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None,
        fast_zero_fill=True, inference_params=None, pad_between_seqs=None, fp8_output=False,
        bf16_backward=False, num_splits=1, score_mod=None, score_mod_bprop=None,
        score_mod_tensors=None, score_mod_bprop_tensors=None, qkv_layer=None, kv_layer=None,
        qkv_interleave_dim=-3,
    ):  # fmt: skip
        q, k, v = query_layer, key_layer, value_layer
        kind, form = attn_mask_type or self.attn_mask_type, qkv_format or self.qkv_format
        calls.append(form)
        assert attention_mask is None, "the stand-in takes no mask"
        assert (cu_seqlens_q_padded, cu_seqlens_kv_padded) == (None, None), "nothing between them"
        assert q.dtype == k.dtype == v.dtype, "Queries, keys and values must have the same type"
        half = q.dtype in (torch.float16, torch.bfloat16)
        if not half and not OTHER_DTYPES:
            raise ValueError("No dot product attention backend is available")
        assert k.shape == v.shape, "Keys and values must have the same sizes"
        assert q.shape[-1] == k.shape[-1] == self.width, f"Keys have head_dim = {k.shape[-1]}"
        assert k.shape[-2] == self.groups, f"num_gqa_group = {self.groups} heads, not {k.shape[-2]}"
        assert self.width <= 256
        assert self.width % 8 == 0
        if form == "thd":
            out = self._packed(q, k, v, kind, (cu_seqlens_q, cu_seqlens_kv), max_seqlen_q)
        else:
            assert form == "sbhd"
            assert q.dim() == k.dim() == v.dim() == 4, "must be 4D tensors"
            assert kind == "no_mask", kind
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            out = reference.attend(q, k, v, self.scale)[0].transpose(0, 1)
        return out.reshape(*out.shape[:-2], -1)

    def _packed(self, q, k, v, kind, bounds, longest):
        assert q.dim() == k.dim() == v.dim() == 3, "must be 3D tensors"
        assert "padding" in kind, "must be padding or padding_causal for qkv_format=thd!"
        for at, x in zip(bounds, (q, k), strict=True):
            assert at is not None, "cu_seqlens can not be None"
            assert at.dim() == 1
            assert at.dtype == torch.int32, "must both be in dtype torch.int32!"
            assert at.device == x.device
            assert int(at[-1]) == len(x)
        assert int(bounds[0].diff().max()) <= longest
        causal = kind == "padding_causal"
        return reference.packed(q, k, v, self.scale, tuple(b.tolist() for b in bounds), causal)
