"""Real-time samples of videos, written and checked by models behind an OpenAI-compatible server."""
