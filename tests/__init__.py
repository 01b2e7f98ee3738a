"""Tests. They mirror the tree; torchrun.py starts those that need several processes."""
