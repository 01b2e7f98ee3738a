"""Checks that a run survives what machines do to it: faults drawn by a seed, losses of a quiet
run."""
