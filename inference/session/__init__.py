"""Sessions: a live stream or an offline question, on an engine that many sessions share."""
