"""How fast the engine is, beside the same model run the published way."""
