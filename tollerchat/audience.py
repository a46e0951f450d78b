"""`Audience`: the connections of one room, and how they are given what is new."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from tollerchat.logs import Seldom
from tollerchat.tail import Page
from tollerchat.websocket import write_some

if TYPE_CHECKING:
    from tollerchat.client import Client
    from tollerchat.outbox import Outbox

__all__ = ("Audience",)

logger = logging.getLogger("tollerchat.audience")
logger.addFilter(Seldom())  # it may be about many at once

TYPING_INTERVAL: Final = 1.0  # seconds
TYPING_RATE: Final = 5000  # deliveries a second, in one room: each is a call of the system


class Audience:
    """All clients of a room, live or catching up."""

    def __init__(self, channel_id: int) -> None:
        self._channel_id = channel_id
        self.clients: set[Client] = set()  # all connections
        # Those whose cursor is the room's head, each with the descriptor that may be written to, or -1: most of what
        # it costs to deliver is memory that has to be fetched, so of a client that only listens nothing is touched.
        self.live: dict[Client, int] = {}
        # When typing may be passed on again, in loop time: of a user, over whichever connection, and of all.
        self._next_typing: dict[int, float] = {}
        self._next_typing_of_all = 0.0

    def add(self, client: Client) -> None:
        """Somebody joins; live later, when it has been given the log."""
        self.clients.add(client)

    def discard(self, client: Client) -> None:
        """Somebody leaves; harmless if it is not here."""
        self.clients.discard(client)
        self.live.pop(client, None)
        self._next_typing.pop(client.user_id, None)

    @property
    def doubts(self) -> bool:
        """Whether somebody's messages were refused, and may be stored all the same."""
        return any(outbox.doubts for outbox in self.outboxes())

    @property
    def owes(self) -> bool:
        """Whether somebody waits for an ack that stands behind other messages."""
        return any(outbox.owes for outbox in self.outboxes())

    def outboxes(self) -> list[Outbox]:
        """Of those who have sent a message."""
        return [client.outbox for client in self.clients if client.outbox is not None]

    def end_doubts(self, compared_at: float) -> None:
        """All that the log had at that time, by `time.monotonic()`, has come up."""
        for outbox in self.outboxes():
            outbox.end_doubts(compared_at)

    def deliver(self, page: Page, before: int) -> None:
        """Give a page, which begins behind `before`, to all live clients: one blob."""
        lagging = []
        # As write_some does, but a call of Python for each client would be a third of all that this costs in Python.
        blob, size, write = page.blob, len(page.blob), os.write
        for client, descriptor in self.live.items():
            written = 0
            try:
                if descriptor >= 0 and (written := write(descriptor, blob)) == size:
                    continue
            except OSError:  # it is full, or broken: the transport will see which
                pass
            try:
                if (changed := client.deliver(page, written)) is None:
                    lagging.append(client)
                else:
                    self.live[client] = changed
            except Exception:  # the rows are stored: one bad connection must not keep them from the others
                logger.exception("channel %d: a connection failed and was aborted", self._channel_id)
                client.abort()
        for client in lagging:
            self.live.pop(client, None)
            client.catch_up(before)

    def may_type(self, user_id: int, now: float) -> bool:
        """Whether what a user types is to be passed on, which is asked once."""
        if now < self._next_typing.get(user_id, 0.0) or now < self._next_typing_of_all:
            return False
        self._next_typing[user_id] = now + TYPING_INTERVAL
        self._next_typing_of_all = now + len(self.live) / TYPING_RATE
        return True

    def tell_others(self, sender: Client, data: bytes) -> None:
        """Pass a frame that is not stored to all live clients but its sender."""
        for client, descriptor in self.live.items():
            if client is not sender:
                written = write_some(descriptor, data)
                if written < len(data):
                    client.offer(data[written:])
