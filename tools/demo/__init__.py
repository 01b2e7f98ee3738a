"""Trains a real-time model on the toy world in minutes, evaluates it, and lets it watch a clip."""
