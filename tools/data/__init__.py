"""`moss-data import` and `moss-data show`: other people's data, and what is in shards."""
