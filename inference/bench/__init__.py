"""Measures how fast the engine is, beside the same model run the way the published code runs it."""
