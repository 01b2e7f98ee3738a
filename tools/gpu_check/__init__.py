"""Checks what a machine's GPU does with this code: whether it is right, and how fast
(docs/gpu.md)."""
