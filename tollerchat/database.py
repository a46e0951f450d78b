"""Connections to PostgreSQL: how they are made, and what their failures mean."""

import asyncio
import contextlib
import logging
import os
import select
import types
import weakref
from importlib import resources
from typing import Any, Final

import aiopg.connection
import psycopg2

from tollerchat.config import Config
from tollerchat.errors import Unavailable

__all__ = (
    "FAILURES",
    "OPTIONS",
    "SETTINGS",
    "TIME_FORMAT",
    "ConnectionWatch",
    "apply_schema",
    "connect",
    "explain",
    "has_answered",
    "read_schema",
    "run_query",
)

logger = logging.getLogger("tollerchat.database")

# AssertionError: aiopg, on a broken connection. RuntimeError: uvloop, on a descriptor reused too soon.
FAILURES = (psycopg2.Error, OSError, asyncio.TimeoutError, AssertionError, RuntimeError)

OPTIONS: Any = {
    "client_encoding": "utf8",
    # psycopg2's extra types would cost a query on each connect.
    "enable_json": False,
    "enable_hstore": False,
    "enable_uuid": False,
    "application_name": "tollerchat",
}

# What we rely on, whatever the database's defaults are: a snapshot for each statement; and indexes, because
# a planner that knows nothing of a new table would sort a channel for each page.
SETTINGS: Final = """
    SET default_transaction_isolation = 'read committed';
    SET enable_seqscan = off; SET enable_bitmapscan = off;"""

# RFC 3339; the time must be one in UTC.
TIME_FORMAT: Final = """'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""


def _check_descriptors(readable: list[int], *_: object) -> None:
    for descriptor in readable:
        os.fstat(descriptor)  # OSError with EBADF for a bad one


# When a query fails, aiopg asks select(2) whether its descriptor is a bad one. From 1024 on, select takes none
# at all, and whoever waits for the query would be left waiting.
vars(aiopg.connection)["select"] = types.SimpleNamespace(select=_check_descriptors)


def connect(config: Config, timeout: float) -> Any:
    """An aiopg connection outside the pools, as an awaitable context manager."""
    return aiopg.connect(config.db_url, timeout=timeout, **OPTIONS)


async def run_query(cursor: aiopg.Cursor, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
    """Run a query and return its rows, if it has any. Raises one of `FAILURES`, or `Unavailable`."""
    try:
        await cursor.execute(sql, parameters)
    except asyncio.CancelledError:
        if cursor.connection.closed:
            raise
        # aiopg's way to say that the server cancelled the query (statement_timeout, an operator)
        raise Unavailable("the database cancelled the query") from None
    except psycopg2.Error:
        if cursor.connection.closed:
            cursor.connection.close()  # now: its descriptor may soon be another's, and must not be watched
        raise
    rows: list[tuple[Any, ...]] = await cursor.fetchall() if cursor.description else []
    return rows


def has_answered(conn: "aiopg.Connection | None", exc: Exception) -> bool:
    """Whether an error came from the database, and not from a connection that failed."""
    return conn is not None and not conn.closed and isinstance(exc, psycopg2.Error) and exc.pgcode is not None


def explain(exc: Exception, conn: "aiopg.Connection | None") -> Unavailable:
    """What a failure on a connection means; without one, nothing was sent."""
    if isinstance(exc, psycopg2.ProgrammingError):
        logger.error("the database refused a query: %s", exc)
        return Unavailable("the database is not set up: run tollerchat init-db")
    if has_answered(conn, exc):
        return Unavailable("the database could not run the query")
    return Unavailable("the database is not reachable", sent=conn is not None)


WATCH_INTERVAL: Final = 0.2  # seconds


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
            await asyncio.sleep(WATCH_INTERVAL)
            for connection in list(self._connections):
                if not connection.closed and _is_broken(connection.raw.fileno()):
                    connection.close()  # whoever waits for it gets an OperationalError


def _is_broken(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows, which has no uvloop either
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are told unasked
    return bool(poll.poll(0))


def read_schema() -> str:
    """The SQL of schema.sql."""
    return resources.files("tollerchat").joinpath("schema.sql").read_text("utf-8")


def apply_schema(db_url: str) -> None:
    """Apply schema.sql, however long it takes to rewrite large tables. Raises `psycopg2.Error`."""
    with contextlib.closing(psycopg2.connect(db_url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(read_schema())
