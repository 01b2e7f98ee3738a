"""What a machine's GPU does with this code: is it right, and how fast is it? See docs/gpu.md."""
