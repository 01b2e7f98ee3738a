"""Hugging Face's form <-> ours, through the table of model/hf_mapping.py, tensor by tensor."""
