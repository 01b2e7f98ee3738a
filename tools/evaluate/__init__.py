"""The command that evaluates models, and compares what it found."""
