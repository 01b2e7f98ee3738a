"""The streaming engine: slots, key/value caches, CUDA graphs, tensor parallelism, sampling."""
