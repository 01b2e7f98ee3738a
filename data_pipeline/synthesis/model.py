"""Questions to the models: from the kept replies where they were asked before, else sent."""

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
    """Asks, keeps replies, counts tokens; at most `concurrency` requests at a time."""

    def __init__(
        self,
        config: SynthesisConfig,
        prompts: Prompts,
        store: Store,
        replied: Callable[[], None] = lambda: None,
    ) -> None:
        """`replied` is called after each reply that was sent for."""
        used = store.usage().values()
        self.ledger = Ledger(config.output, sum(u[1] for u in used), sum(u[2] for u in used))
        self.sent: Counter[str] = Counter()
        self.endpoint = Endpoint(config.endpoint, self._wasted)
        self._config, self._prompts, self._store = config.endpoint, prompts, store
        self._replied = replied
        self._places = asyncio.Semaphore(config.endpoint.concurrency)
        self._asked: dict[str, asyncio.Future[Any]] = {}  # under way

    async def ask(
        self, kind: str, data: Mapping[str, Any], seed: int = 0, frames: Frames = ()
    ) -> Any:
        """The reply to a request of prompts.yaml; the errors are those of Endpoint and Ledger.

        `seed` tells apart votes on the same question.
        """
        request = self._prompts.request(kind, data, self._config, seed, frames)
        known = self._store.reply(request.key)
        if known is not None:
            return known
        if request.key in self._asked:  # the same video twice
            return await asyncio.shield(self._asked[request.key])
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[request.key] = future
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
            del self._asked[request.key]

    async def close(self) -> None:
        """Waits for what is under way, which is paid for, and closes the connections."""
        while self._asked:
            await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self.endpoint.close()

    def _wasted(self, kind: str, tokens: Tokens) -> None:
        self._store.waste(kind, tokens)
        self.ledger.add(tokens)


async def vote(ask: Callable[[int], Awaitable[bool]], lead: int, most: int) -> bool | None:
    """Yes or no, as soon as one leads by `lead` votes; None: neither did after `most`.

    `ask` is given the number of the vote. The result depends on the votes' numbers alone, not on
    which reply comes first. Where a vote is wrong with probability p, the result is so with
    p^n / (p^n + (1 - p)^n), n = lead (gambler's ruin).
    """
    votes = list(await asyncio.gather(*(ask(number) for number in range(lead))))
    while True:
        ahead = 2 * sum(votes) - len(votes)
        if abs(ahead) >= lead:
            return ahead > 0
        if len(votes) >= most:
            return None
        # As many as are needed at least.
        more = min(lead - abs(ahead), most - len(votes))
        votes += await asyncio.gather(*(ask(len(votes) + n) for n in range(more)))
