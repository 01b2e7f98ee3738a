"""A real-time model on the toy world, in minutes: trained, evaluated, and watching a clip live."""
