"""Requests to the models: answered from the stored replies where there is one, else sent."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from data_pipeline.synthesis.budget import Ledger
from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.synthesis.endpoint import Endpoint, Tokens
from data_pipeline.synthesis.prompts import Prompts
from data_pipeline.synthesis.store import Store

Frames = Sequence[tuple[int, str]]  # seconds, and `data:` URLs of their pictures


class Model:
    """Sends requests, at most `concurrency` at a time; stores the replies and counts tokens."""

    def __init__(
        self,
        config: SynthesisConfig,
        prompts: Prompts,
        store: Store,
        replied: Callable[[], None] = lambda: None,
    ) -> None:
        """`replied` is called after each reply that a server, not the store, has given."""
        used = store.usage().values()
        self.ledger = Ledger(config.output, sum(u[1] for u in used), sum(u[2] for u in used))
        self.sent: Counter[str] = Counter()
        self.endpoint = Endpoint(config.endpoint, self._wasted)
        self._config, self._prompts, self._store = config.endpoint, prompts, store
        self._replied = replied
        self._places = asyncio.Semaphore(config.endpoint.concurrency)
        self._pending: dict[str, asyncio.Future[Any]] = {}  # replies under way, by request key

    async def ask(
        self, kind: str, data: Mapping[str, Any], seed: int = 0, frames: Frames = ()
    ) -> Any:
        """The reply to the request of this kind in prompts.yaml.

        `seed` tells votes on the same question apart. Raises what Endpoint and Ledger raise.
        """
        request = self._prompts.request(kind, data, self._config, seed, frames)
        stored = self._store.reply(request.key)
        if stored is not None:
            return stored
        if request.key in self._pending:  # the same video twice
            return await asyncio.shield(self._pending[request.key])
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[request.key] = future
        try:
            async with self._places, self.ledger.hold(request.tokens, request.max_tokens):
                reply, tokens = await self.endpoint.ask(request)
                self._store.keep(request.key, kind, reply, tokens)
                self.ledger.add(tokens)
            self.sent[kind] += 1
            self._replied()
            future.set_result(reply)
            return reply
        except BaseException as error:
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # others may not wait for it
            else:
                future.cancel()
            raise
        finally:
            del self._pending[request.key]

    async def close(self) -> None:
        """Waits for replies under way, which are paid for, and closes the connections."""
        while self._pending:
            await asyncio.gather(*self._pending.values(), return_exceptions=True)
        await self.endpoint.close()

    def _wasted(self, kind: str, tokens: Tokens) -> None:
        self._store.waste(kind, tokens)
        self.ledger.add(tokens)


async def vote(ask: Callable[[int], Awaitable[bool]], lead: int, most: int) -> bool | None:
    """The verdict of repeated votes, as soon as yes or no leads by `lead`; None where neither does
    after `most` votes.

    `ask` gets the number of the vote, from 0. The verdict depends on the replies alone, not on
    the order in which they come. Where a vote is wrong with probability p, the verdict is wrong
    with p^n / (p^n + (1 - p)^n), n = lead (gambler's ruin).
    """
    votes = list(await asyncio.gather(*(ask(number) for number in range(lead))))
    while True:
        ahead = 2 * sum(votes) - len(votes)
        if abs(ahead) >= lead:
            return ahead > 0
        if len(votes) >= most:
            return None
        # The fewest votes that can decide it, so that none is paid for in vain.
        more = min(lead - abs(ahead), most - len(votes))
        votes += await asyncio.gather(*(ask(len(votes) + n) for n in range(more)))
