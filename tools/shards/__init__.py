"""Commands that look into folders of shards: `python -m tools.shards ls|show|stats|validate`."""
