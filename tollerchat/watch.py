"""Finds database connections that broke without a word."""

import asyncio
import select
import weakref
from typing import Final

import aiopg

__all__ = ("ConnectionWatch",)

INTERVAL: Final = 0.2  # seconds


class ConnectionWatch:
    """Closes connections whose socket is in error, so that nothing waits for them until it times out.

    A server process that dies with our query unread resets the connection. libuv, below uvloop, reports
    that once and then stops to watch the socket; aiopg needs to be called again to see the end.
    """

    def __init__(self) -> None:
        self._connections: weakref.WeakSet[aiopg.Connection] = weakref.WeakSet()

    async def add(self, connection: aiopg.Connection) -> None:
        """Watch a connection for as long as it lives. Awaitable, as a pool's `on_connect` must be."""
        self._connections.add(connection)

    async def run(self) -> None:
        """Look at all connections again and again, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            for connection in list(self._connections):
                if not connection.closed and _is_broken(connection.raw.fileno()):
                    connection.close()  # whoever waits for it gets an OperationalError


def _is_broken(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows, which has no uvloop either
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are told unasked
    return bool(poll.poll(0))
