"""Compiles the Triton kernels for an H100 or H200, which needs no GPU; prints each."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from data_pipeline import triton_fp8
from inference.kernels import triton_attention, triton_products, triton_rows
from moss_train.model import triton_kernels

TARGET = GPUTarget("cuda", 90, 32)
WHOLE_TENSORS = ("slot", "limit", "position", "length", "first", "last")
TYPES = dict.fromkeys(WHOLE_TENSORS, "*i64")
TYPES |= {"sums": "*fp32", "stats": "*fp32", "scale": "fp32", "eps": "fp32"}
FP8 = {"keys": "*fp8e4nv", "values": "*fp8e4nv", "scales": "*fp32"}
HEADS = {"KV": 8, "GROUP": 4, "D": 128, "D2": 128}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (triton_attention._attend_part, TYPES,
     HEADS | {"QUERIES": 16, "PARTS": 64, "KEYS": 64, "FRAMES": True, "EIGHT": False}),
    (triton_attention._attend_part, TYPES | FP8,
     HEADS | {"QUERIES": 64, "PARTS": 8, "KEYS": 64, "FRAMES": False, "EIGHT": True}),
    (triton_attention._join_parts, TYPES, HEADS | {"PARTS": 64}),
    (triton_rows._add_norm, TYPES | {"scale": "*bf16"},
     {"BLOCK": 4096, "ADD": True, "SCALED": True}),
    (triton_rows._swiglu, TYPES, {"BLOCK": 1024}),
    (triton_rows._rotate_and_keep, TYPES,
     {"HEADS": 32, "KV": 8, "HALF": 64, "BLOCK": 64, "EIGHT": False}),
    (triton_rows._rotate_and_keep, TYPES | FP8,
     {"HEADS": 32, "KV": 8, "HALF": 64, "BLOCK": 64, "EIGHT": True}),
    (triton_rows._norm_and_rotate, TYPES,
     {"HEADS": 32, "HALF": 64, "BLOCK": 64, "ROTATED": True}),
]  # fmt: skip
WHOLE = {
    "places", "patches", "window", "new", "H", "inner", "N", "K", "groups", "outs", "size", "heads",
    "to_row", "to_outer", "to_inner",
}  # fmt: skip
FLOATS = dict.fromkeys(
    ("log_sum", "picked", "total", "to_log_sum", "to_picked", "to_total"), "*fp32"
)
FLOATS |= {"own": "*i64", "sign": "fp32"}
KERNELS += [
    (triton_kernels._swiglu, FLOATS, {"BLOCK": 1024}),
    (triton_kernels._swiglu_backward, FLOATS, {"BLOCK": 1024}),
    (triton_kernels._rotate, FLOATS, {"HALF": 64, "BLOCK": 64, "HEADS": 8}),
    (triton_kernels._statistics, FLOATS, {"BLOCK": 4096}),
    (triton_kernels._statistics_backward, FLOATS, {"BLOCK": 4096}),
]
ROUNDED = {"values": "*fp8e4nv", "scale": "*fp32", "eps": "fp32"}
KERNELS += [
    (triton_fp8._round, ROUNDED, {"BLOCK": 4096}),
    (triton_fp8._norm, ROUNDED, {"BLOCK": 2048}),
    (triton_fp8._gelu, ROUNDED, {"BLOCK": 8192}),
]
for stored in ("*i8", "*fp8e4nv"):
    kinds = TYPES | {"weight": stored, "scale": "*bf16"}
    KERNELS += [
        (triton_products._one_token, kinds, {"OUT": 4, "BLOCK": 1024}),
        (triton_products._several_tokens, kinds, {"TOKENS": 16, "OUT": 32, "BLOCK": 128}),
        (triton_products._several_tokens, kinds, {"TOKENS": 128, "OUT": 128, "BLOCK": 64}),
    ]
FOUR_BITS = TYPES | {"weight": "*u8", "scale": "*bf16"}
KERNELS += [
    (triton_products._one_token_4, FOUR_BITS, {"OUT": 4, "GROUPS": 16, "HALF": 64}),
    (triton_products._several_tokens_4, FOUR_BITS, {"TOKENS": 16, "OUT": 32, "HALF": 64}),
    (triton_products._several_tokens_4, FOUR_BITS, {"TOKENS": 128, "OUT": 128, "HALF": 64}),
]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> int:
    """Bytes of the machine code for tensors in bf16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "i32" if name in WHOLE else "*bf16") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return len(triton.compile(source, target=TARGET).asm["cubin"])


if __name__ == "__main__":
    for kernel, types, constants in KERNELS:
        print(kernel.__name__, compiled(kernel, types, constants))
