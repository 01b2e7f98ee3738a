"""Shards to batches: mixed, shuffled, packed, and resumed exactly."""
