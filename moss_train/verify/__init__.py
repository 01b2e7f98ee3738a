"""One batch through the training model, to compare a checkpoint with its export."""
