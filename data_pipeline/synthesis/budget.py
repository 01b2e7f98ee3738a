"""Counts what has been spent, and holds the next request back where the budget may not allow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from data_pipeline.synthesis.config import OutputConfig


class BudgetReached(Exception):
    """The next request could cost more than what is left of the budget."""


class Ledger:
    """Counts tokens and their cost. Requests under way are counted at the most they can cost, so
    that the budget is never exceeded."""

    def __init__(self, config: OutputConfig, tokens_in: int = 0, tokens_out: int = 0) -> None:
        self.tokens_in, self.tokens_out = tokens_in, tokens_out
        self._config = config
        self._held = 0.0
        self._changed = asyncio.Condition()

    @property
    def cost(self) -> float:
        """What was spent, in the currency of the prices."""
        return self.price(self.tokens_in, self.tokens_out)

    def price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self._config.price_in + tokens_out * self._config.price_out) / 1e6

    def add(self, tokens: tuple[int, int]) -> None:
        self.tokens_in += tokens[0]
        self.tokens_out += tokens[1]

    @asynccontextmanager
    async def hold(self, tokens_in: int, tokens_out: int) -> AsyncIterator[None]:
        """Reserves the cost of a request of at most so many tokens while the context is open.

        Waits where the request fits only once others under way cost less than is reserved for
        them; raises BudgetReached where it cannot fit.
        """
        budget, most = self._config.budget, self.price(tokens_in, tokens_out)
        async with self._changed:
            while budget is not None and self.cost + self._held + most > budget:
                if not self._held:
                    raise BudgetReached
                await self._changed.wait()
            self._held += most
        try:
            yield
        finally:
            async with self._changed:
                self._held -= most
                if self._held < 1e-12:
                    self._held = 0.0
                self._changed.notify_all()
