"""OpenAI's own client of a server."""

from __future__ import annotations

from collections.abc import Iterator

import openai

from tests.inference.serve.serving import Running


def openai_client(server: Running) -> Iterator[openai.OpenAI]:
    """Yields a client that asks once; for a fixture."""
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as made:
        yield made
