"""Parallelism: process groups, packing, the frame exchange, schedules, gradient reduction."""
