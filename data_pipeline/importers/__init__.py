"""Data sets of many forms to samples of our shards: forms.py finds the form of a source."""
