"""The model: vision tower, projector, gated cross-attention decoder, loss."""
