"""Samples, shards, prompts, frames and the loader: everything that knows data and no training."""
