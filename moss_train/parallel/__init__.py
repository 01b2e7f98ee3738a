"""Parallelism: process groups, the frame exchange, gradients that cross ranks."""
