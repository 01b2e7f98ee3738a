"""MOSS-Video without megatron: the model as transformers loads it, and the streaming engine."""
