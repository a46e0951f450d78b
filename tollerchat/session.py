"""`Sessions`: connections to PostgreSQL that are made when needed, and kept, because statements are prepared on them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiopg
import psycopg2

from tollerchat.config import Config
from tollerchat.connection import FAILURES, OPTIONS, Connection, ConnectionWatch, connect, distrust
from tollerchat.database import explain, has_answered, prepare, run_query
from tollerchat.errors import Unavailable

__all__ = ("Sessions",)

Prepare = Callable[[aiopg.Cursor], Awaitable[None]]
Expects = Callable[[psycopg2.Error], bool]


class Sessions:
    """Runs queries, up to `size` at a time.

    `prepare` is for each new connection; it may raise one of `FAILURES`.
    """

    def __init__(self, config: Config, watch: ConnectionWatch, size: int, prepare: Prepare) -> None:
        self.size = size
        self._config = config
        self._watch = watch
        self._prepare = prepare
        self._sessions = [_Session() for _ in range(size)]
        # The one that was used last is used next: its memory is warm, here and there.
        self._idle = list(self._sessions)
        self._free = asyncio.Semaphore(size)
        self._closed = False

    def close(self) -> None:
        """Close the connections, and make none any more."""
        self._closed = True
        for session in self._sessions:
            session.close()

    async def run(
        self, sql: str, parameters: Any, *, expects: Expects = lambda exc: False
    ) -> list[tuple[Any, ...]]:
        """Run a query and return its rows, if it has any.

        Raises `psycopg2.Error` where the database refuses it, and `expects` knows the error; else `Unavailable`.
        """
        async with self._free:
            session = self._idle.pop()
            try:
                if self._closed:
                    raise Unavailable("the server has shut down")
                if session.connection is None or session.connection.closed:
                    session.connection = None
                    session.connection, session.cursor = await self._connect()
                return await run_query(session.cursor, sql, parameters)
            except FAILURES as exc:
                if has_answered(session.connection, exc):
                    if isinstance(exc, psycopg2.Error) and expects(exc):
                        raise
                    distrust(self._config.db_url)
                unavailable = explain(exc, session.connection)
                session.close()  # whatever its state is, and that of the prepared statements
                raise unavailable from exc
            finally:
                self._idle.append(session)

    async def _connect(self) -> tuple[Connection, aiopg.Cursor]:
        connection = await connect(self._config.db_url, timeout=self._config.db_timeout, **OPTIONS)
        try:
            self._watch.add(connection)
            await prepare(connection, self._config)
            cursor = await connection.cursor()
            await self._prepare(cursor)
            if self._closed:
                raise Unavailable("the server has shut down")
        except BaseException:
            connection.close()
            raise
        return connection, cursor


class _Session:
    """A place for a connection."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.cursor: aiopg.Cursor

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
