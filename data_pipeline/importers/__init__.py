"""What users bring, in its many forms, to samples of our shards."""
