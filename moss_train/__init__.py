"""moss_train: trains MOSS-Video, a streaming video language model, on Megatron Core."""
