"""The command that evaluates models, and compares evaluations."""
