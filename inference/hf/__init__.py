"""The model as transformers loads it: the files that an export copies. Imports nothing of ours."""
