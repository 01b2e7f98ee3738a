"""Golden numbers made with transformers, and the script that made them."""
