"""Hugging Face's form <-> ours: mapping.py is the table, to_megatron.py and to_hf.py the ways."""
