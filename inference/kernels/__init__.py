"""The operations of a decoding pass: in plain torch, and as Triton kernels for a GPU."""
