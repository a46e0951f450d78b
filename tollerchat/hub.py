"""`Hub`: the rooms of this server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tollerchat.access import Access
from tollerchat.config import Config
from tollerchat.errors import NotFound, Unavailable
from tollerchat.protocol import MAX_BIGINT, CloseCode
from tollerchat.repository import Repository
from tollerchat.room import Room
from tollerchat.saving import Saved
from tollerchat.tasks import end_tasks, rest

if TYPE_CHECKING:
    from tollerchat.client import Client

__all__ = ("Hub",)

logger = logging.getLogger("tollerchat.hub")

CATCHING_UP = 0.1  # of the time for shutting down, for clients to catch up
PATIENCE = 0.8  # of the time for closing all connections; those that are left then are aborted


class Hub:
    """Who is connected to which channel. Who joins or leaves holds the lock; nothing is awaited meanwhile."""

    def __init__(self, config: Config, repository: Repository) -> None:
        self.rooms: dict[int, Room] = {}
        self.draining = False  # if true, nobody is let in any more
        self.compare_soon = asyncio.Event()  # something may be in the log that nobody tells of
        self.access = Access(repository)
        self._config = config
        self._repository = repository
        self._lock = asyncio.Lock()
        self._asking = asyncio.Lock()  # whether ids have started again
        self._told = 0  # the newest message id that a server told
        self._leaving: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    # -- membership --------------------------------------------------------------------------------

    async def register(self, client: Client) -> Room:
        """Put a client into its room. Raises `Unavailable`. Pair it with `unregister`."""
        async with self._lock:
            if self.draining:
                raise Unavailable("the server is shutting down: connect again")
            room = self.rooms.get(client.channel_id)
            if room is None:
                room = Room(client.channel_id, self._repository, self._config.history_size)
                self.rooms[client.channel_id] = room
                self._empty.clear()
            room.audience.add(client)
            return room

    async def unregister(self, client: Client) -> None:
        """Take a client out of its room; harmless if it is not in one."""
        async with self._lock:
            room = self.rooms.get(client.channel_id)
            if room is None:
                return
            room.audience.discard(client)
            if room.audience.clients:
                return
            del self.rooms[client.channel_id]
            if not self.rooms:
                self._empty.set()
        await room.close()

    def dismiss(self, client: Client) -> None:
        """Take out a client whose connection is lost, in the background."""
        task = asyncio.create_task(self._dismiss(client))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _dismiss(self, client: Client) -> None:
        await end_tasks(client.pump)
        await self.unregister(client)

    # -- what happens in the log -------------------------------------------------------------------

    def begin_commit(self, channel_ids: Iterable[int]) -> list[Room]:
        """Messages of these channels are on their way to the database; pair it with `end_commit`."""
        rooms = [room for channel_id in channel_ids if (room := self.rooms.get(channel_id)) is not None]
        for room in rooms:
            room.begin_commit()
        return rooms

    def end_commit(self, rooms: Iterable[Room]) -> None:
        """The database has answered, and the answer was dealt with."""
        for room in rooms:
            room.end_commit()

    def broadcast(self, channel_id: int, messages: Sequence[Saved]) -> None:
        """Give committed messages, in the order of their batch, to the clients of the channel."""
        if room := self.rooms.get(channel_id):
            was_suspect = room.is_suspect
            if not room.commit(messages):
                self._restart()
            elif room.is_suspect and not was_suspect:
                self.compare_soon.set()

    def hint(self, channel_id: int, message_id: int) -> None:
        """A server says that a channel's log has grown to `message_id`."""
        self._told = max(self._told, message_id)
        if room := self.rooms.get(channel_id):
            room.hint(message_id)

    async def settle_acks(self) -> None:
        """Wait until the rooms have read what they know to be in the log, where acks stand behind it; and a little
        while for those who are behind their room.
        """
        if reading := [
            room.catching_up for room in self.rooms.values() if room.catching_up and room.audience.owes
        ]:
            await asyncio.wait(reading)
        clients = self._clients()
        if pumps := [each.pump for each in clients if each.pump and each.outbox and each.outbox.owes]:
            await asyncio.wait(pumps, timeout=CATCHING_UP * self._config.shutdown_timeout)

    async def compare_with_log(self) -> None:
        """Find what no hint told: compare all rooms with the log. Raises `Unavailable`."""
        async with self._asking:  # no answer shall overtake another one
            rooms = self.rooms.values()
            stored = max(self._told, *(room.stored for room in rooms), 0)
            heads = {room.channel_id: MAX_BIGINT if room.is_suspect else room.head for room in rooms}
            if await self._repository.ids_restarted(stored, heads):
                self._restart()
        await self.compare(self.rooms)

    async def compare(self, channel_ids: Iterable[int]) -> None:
        """Compare some rooms, as far as they are here, with the log. Raises `Unavailable`."""
        if ours := self.rooms.keys() & channel_ids:
            now = time.monotonic()
            # What was refused may be under way yet, for as long as a standby does not answer, say.
            with_doubts = [channel_id for channel_id in ours if self.rooms[channel_id].audience.doubts]
            settled = await self._repository.unlocked(with_doubts) if with_doubts else ()
            for channel_id, newest in (await self._repository.newest_ids(ours)).items():
                if room := self.rooms.get(channel_id):
                    room.hint(newest)
                    if channel_id in settled and newest <= room.head:
                        room.audience.end_doubts(now)

    def forget(self, channel_id: int) -> None:
        """Messages of a channel were deleted or changed."""
        if room := self.rooms.get(channel_id):
            room.forget()

    def _restart(self) -> None:
        """Ids have started again: everybody has to, too."""
        self.access.forget()
        self._told = 0
        for client in self._clients():
            client.close(CloseCode.GOING_AWAY, "the ids of messages start again: connect again")
        for room in self.rooms.values():  # which live on if somebody is slow to leave
            room.restart()

    # -- who may stay ------------------------------------------------------------------------------

    def channel_deleted(self, channel_id: int) -> None:
        """Close all connections of a channel that is gone."""
        self.access.forget()
        if room := self.rooms.get(channel_id):
            for client in room.audience.clients:
                client.close(CloseCode.CHANNEL_DELETED, "the channel was deleted")

    def user_deleted(self, user_id: int) -> None:
        """Close all connections of a user who is gone."""
        self.access.forget()
        for client in self._clients():
            if client.user_id == user_id:
                client.close(CloseCode.ACCESS_WITHDRAWN, "the user was deleted")

    async def check_access(self, channel_ids: Iterable[int]) -> None:
        """Close the connections of those who may not be in a channel any more. Raises `Unavailable`."""
        self.access.forget()
        rooms = [room for channel_id in channel_ids if (room := self.rooms.get(channel_id)) is not None]
        pairs = {(room.channel_id, client.user_id) for room in rooms for client in room.audience.clients}
        refusals = await self._repository.refusals(pairs) if pairs else {}
        for (channel_id, user_id), refusal in refusals.items():
            if isinstance(refusal, NotFound):
                self.channel_deleted(channel_id)
            elif refusal is not None and (room := self.rooms.get(channel_id)) is not None:
                for client in room.audience.clients:
                    if client.user_id == user_id:
                        client.close(CloseCode.ACCESS_WITHDRAWN, "access to the channel was withdrawn")

    async def resync(self) -> None:
        """Find all that no notification told, after some may have been lost, or told all at once, by emptying a table.

        Raises `Unavailable`.
        """
        for room in self.rooms.values():
            room.forget()
        await self.check_access(self.rooms)
        await self.compare_with_log()

    # -- all clients -------------------------------------------------------------------------------

    async def keep_alive(self) -> None:
        """Ping clients, drop dead ones, close those whose token has expired; until cancelled.

        One task for all: a timer for each would cost more than the rest of an idle connection.
        """
        loop = asyncio.get_running_loop()
        tick = min(1.0, self._config.ping_interval / 4)
        while True:
            await rest(tick)
            now, unix_time = loop.time(), time.time()
            for client in [client for client in self._clients() if client.due <= now]:
                try:
                    client.check(now, unix_time)
                except Exception:  # one bad connection must not end this for all
                    logger.exception("a connection failed and was aborted")
                    client.abort()

    async def close_all(self, timeout: float) -> None:
        """Close all connections, in parallel, and return when they are gone, within `timeout`."""
        for client in self._clients():
            client.close(CloseCode.GOING_AWAY, "the server is going away")
        if not await self._empties(timeout * PATIENCE):
            for client in self._clients():
                client.abort()
            await self._empties(timeout * (1 - PATIENCE))

    async def _empties(self, timeout: float) -> bool:
        """Whether all clients are gone within `timeout`."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        await asyncio.gather(*self._leaving)
        return True

    def _clients(self) -> list[Client]:
        return [client for room in self.rooms.values() for client in room.audience.clients]
