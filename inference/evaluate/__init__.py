"""Benchmarks against an exported model: what is asked, what was answered, tables, comparisons."""
