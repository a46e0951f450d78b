"""`Access`: who may join which channel."""

from __future__ import annotations

import asyncio
from typing import Final

from tollerchat.errors import ChatError, Unavailable
from tollerchat.repository import Repository
from tollerchat.tasks import end_tasks

__all__ = ("Access",)

MAX_KNOWN: Final = 50_000  # pairs of channel and user, some 150 bytes each

Pair = tuple[int, int]  # channel_id, user_id


class Access:
    """Asks the database who may join; once for all who ask meanwhile, and again only if it may have changed.

    What it knows is good for as long as the bus, which tells of changes, is connected: `remembers`.
    """

    def __init__(self, repository: Repository) -> None:
        self.remembers = False
        self._repository = repository
        self._known: set[Pair] = set()  # who may join
        self._gathering: set[Pair] | None = None  # what the next query will ask
        self._asking: asyncio.Task[dict[Pair, ChatError | None]] | None = None
        self._one_query = asyncio.Lock()

    async def check(self, channel_id: int, user_id: int) -> None:
        """Raise `NotFound` without such a channel, `Forbidden` if the user may not join it; or `Unavailable`."""
        pair = (channel_id, user_id)
        if pair in self._known:
            return
        if self._gathering is None or self._asking is None:
            self._gathering = set()
            self._asking = asyncio.create_task(self._ask(self._gathering))
        self._gathering.add(pair)
        # One who stops waiting must not stop the query for the others.
        refusals = await asyncio.shield(self._asking)
        if (error := refusals[pair]) is not None:
            raise error

    async def _ask(self, pairs: set[Pair]) -> dict[Pair, ChatError | None]:
        async with self._one_query:
            self._gathering = None
            known = self._known  # another one, as soon as earlier answers are stale
            try:
                refusals = await self._repository.refusals(pairs)
            except Unavailable as exc:
                return dict.fromkeys(pairs, exc)
        if self.remembers and known is self._known:
            if len(known) > MAX_KNOWN:
                known.clear()
            known.update(pair for pair in pairs if refusals[pair] is None)
        return refusals

    async def close(self) -> None:
        """Ask no more; nobody waits for the answer."""
        await end_tasks(self._asking)

    def forget(self) -> None:
        """Somebody may have lost access."""
        self._known = set()
