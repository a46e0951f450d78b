"""`Pool`: connections to PostgreSQL that are made when needed, and kept, because statements are prepared on them."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import psycopg2

from tollerchat.config import Config
from tollerchat.connection import FAILURES, Connection, ConnectionWatch, distrust
from tollerchat.database import explain, has_answered, open_connection, reason
from tollerchat.errors import Unavailable
from tollerchat.logs import Seldom

__all__ = ("Pool",)

logger = logging.getLogger("tollerchat.pool")
logger.addFilter(Seldom())  # it may be about many at once

RETRY_DELAY: Final = 5.0  # seconds, until one more connection is tried to be made after that failed

Prepare = Callable[[Connection], Awaitable[None]]
Expects = Callable[[psycopg2.Error], bool]


class Pool:
    """Runs queries, up to `size` at a time.

    `prepare` is for each new connection; it may raise one of `FAILURES`. `refused` is called where none can be made.
    """

    def __init__(
        self,
        config: Config,
        watch: ConnectionWatch,
        size: int,
        prepare: Prepare,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self._config = config
        self._watch = watch
        self._prepare = prepare
        self._refused = refused
        self._next_try = 0.0  # by time.monotonic(): to make one more connection, where there are some
        self._slots = [_Slot() for _ in range(size)]
        # The one that was used last is used next: its memory is warm, here and there.
        self._idle = list(self._slots)
        self._waiting: deque[asyncio.Future[_Slot]] = deque()  # for one that is idle
        self._closed = False

    def close(self) -> None:
        """Close the connections, and make none any more."""
        self._closed = True
        for slot in self._slots:
            slot.close()

    def spare(self) -> None:
        """Close an idle connection, so that others can have one, unless it is the last."""
        if sum(slot.is_connected for slot in self._slots) > 1 and (idle := self._connected_idle()):
            idle.close()
            self._next_try = time.monotonic() + RETRY_DELAY
            self._pass_on(idle)

    async def run(
        self, sql: str | bytes, parameters: Any, *, expects: Expects = lambda exc: False
    ) -> list[tuple[Any, ...]]:
        """Run a query and return its rows, if it has any.

        Raises `psycopg2.Error` where the database refuses it, and `expects` knows the error; else `Unavailable`.
        """
        slot = self._idle.pop() if self._idle else await self._next_idle()
        try:
            while (connection := slot.connection) is None or connection.closed:
                slot.connection = None
                if self._is_connected and time.monotonic() < self._next_try:
                    slot = await self._exchange(slot)
                else:
                    await self._connect_one_more(slot)
            return await connection.query(sql, parameters)
        except FAILURES as exc:
            if has_answered(slot.connection, exc):
                if isinstance(exc, psycopg2.Error) and expects(exc):
                    raise
                distrust(self._config.db_url)
            unavailable = explain(exc, slot.connection)
            slot.close()  # whatever its state is, and that of the prepared statements
            raise unavailable from exc
        finally:
            self._pass_on(slot)

    async def _next_idle(self) -> "_Slot":
        """Wait for one, in the order of asking, for no longer than a query may take."""
        turn: asyncio.Future[_Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait([turn], timeout=self._config.db_timeout)
            if not turn.done():
                raise Unavailable("too many queries wait for the database: try again later")
            return turn.result()
        except BaseException:
            if not turn.cancel():
                self._pass_on(turn.result())
            raise

    async def _exchange(self, slot: "_Slot") -> "_Slot":
        """Another one for a slot without a connection, most likely with one."""
        other = self._connected_idle() or await self._next_idle()
        self._pass_on(slot)
        return other

    async def _connect_one_more(self, slot: "_Slot") -> None:
        """Connect a slot, if that can be. Raises one of `FAILURES` where no slot is connected."""
        try:
            slot.connection = await self._connect()
            self._next_try = 0.0
        except FAILURES as exc:
            if not self._is_connected:
                self._refused()
                raise
            # The database may have no more connections to give: those that we have must do for a while.
            logger.warning("no more connections to the database: %s", reason(exc))
            self._next_try = time.monotonic() + RETRY_DELAY

    @property
    def _is_connected(self) -> bool:
        """Whether there is a connection at all."""
        return any(slot.is_connected for slot in self._slots)

    def _connected_idle(self) -> "_Slot | None":
        for slot in reversed(self._idle):
            if slot.is_connected:
                self._idle.remove(slot)
                return slot
        return None

    def _pass_on(self, slot: "_Slot") -> None:
        if not slot.is_connected and self._is_connected:
            self._idle.insert(0, slot)  # the last to be used
            return
        while self._waiting:
            if not (turn := self._waiting.popleft()).done():  # else it has been given up
                turn.set_result(slot)
                return
        self._idle.append(slot)

    async def _connect(self) -> Connection:
        if self._closed:
            raise Unavailable("the server has shut down")
        try:
            connection = await open_connection(self._config, self._watch)
            try:
                await self._prepare(connection)
                if self._closed:
                    raise Unavailable("the server has shut down")
            except BaseException:
                connection.close()
                raise
        except FAILURES:
            distrust(self._config.db_url)  # it may take connections, and still not be what we need
            raise
        return connection


class _Slot:
    """A place for a connection."""

    def __init__(self) -> None:
        self.connection: Connection | None = None

    @property
    def is_connected(self) -> bool:
        return self.connection is not None and not self.connection.closed

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
