"""Tests of inference.evaluate.streaming."""
