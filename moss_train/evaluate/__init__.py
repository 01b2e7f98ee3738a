"""Evaluates a trained model in one process: generation, scores, baselines."""
