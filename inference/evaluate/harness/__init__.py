"""Runs lmms-eval, and benchmarks that it lacks, against a server that the run starts."""
