"""`Sessions`: connections to PostgreSQL that are made when needed, and kept, because statements are prepared on them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiopg
import psycopg2

from tollerchat.config import Config
from tollerchat.connection import FAILURES, OPTIONS, Connection, ConnectionWatch, connect, distrust
from tollerchat.database import explain, has_answered, prepare, run_query

__all__ = ("Sessions",)

Prepare = Callable[[aiopg.Cursor], Awaitable[None]]
Expects = Callable[[psycopg2.Error], bool]


class Sessions:
    """Runs queries, up to `size` at a time.

    `prepare` is for each new connection; it may raise one of `FAILURES`.
    """

    def __init__(self, config: Config, watch: ConnectionWatch, size: int, prepare: Prepare) -> None:
        self.size = size
        self._sessions = [_Session(config, watch, prepare) for _ in range(size)]
        self._free = asyncio.Semaphore(size)

    def close(self) -> None:
        """Close the connections; they would be made again."""
        for session in self._sessions:
            session.close()

    async def run(
        self, sql: str, parameters: Any, *, expects: Expects = lambda exc: False
    ) -> list[tuple[Any, ...]]:
        """Run a query and return its rows, if it has any.

        Raises `psycopg2.Error` where the database refuses it, and `expects` knows the error; else `Unavailable`.
        """
        async with self._free:
            # The first that is free: mostly the same, whose memory is warm, here and there.
            session = next(session for session in self._sessions if not session.busy)
            return await session.run(sql, parameters, expects)


class _Session:
    def __init__(self, config: Config, watch: ConnectionWatch, prepare: Prepare) -> None:
        self.busy = False
        self._config = config
        self._watch = watch
        self._prepare = prepare
        self._connection: Connection | None = None
        self._cursor: aiopg.Cursor

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    async def run(self, sql: str, parameters: Any, expects: Expects) -> list[tuple[Any, ...]]:
        self.busy = True
        try:
            if self._connection is None or self._connection.closed:
                self._connection = None
                self._connection = await self._connect()
            return await run_query(self._cursor, sql, parameters)
        except FAILURES as exc:
            if has_answered(self._connection, exc):
                if isinstance(exc, psycopg2.Error) and expects(exc):
                    raise
                distrust(self._config.db_url)
            unavailable = explain(exc, self._connection)
            self.close()  # whatever its state is, and that of the prepared statements
            raise unavailable from exc
        finally:
            self.busy = False

    async def _connect(self) -> Connection:
        connection = await connect(self._config.db_url, timeout=self._config.db_timeout, **OPTIONS)
        try:
            self._watch.add(connection)
            await prepare(connection, self._config)
            self._cursor = await connection.cursor()
            await self._prepare(self._cursor)
        except BaseException:
            connection.close()
            raise
        return connection
