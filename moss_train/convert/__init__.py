"""Parameter names and shapes of Hugging Face's Mllama and ours."""
