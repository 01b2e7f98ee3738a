"""Commands `moss-data import`, `synthesize` and `show`."""
