"""The server: sessions over WebSockets, OpenAI's chat completions, a page."""
