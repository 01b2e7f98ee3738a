"""The four stages from random weights to a real-time model, on the toy world."""
