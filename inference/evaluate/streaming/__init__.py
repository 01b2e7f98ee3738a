"""Evaluation of streaming models."""
