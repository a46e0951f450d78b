"""The bus: hints that the log has grown, whoever wrote to it. They may be lost; the log is the truth."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Iterable
from typing import Any

import psycopg2

from tollerchat.config import Config
from tollerchat.connection import FAILURES, Connection
from tollerchat.database import open_connection, reason
from tollerchat.errors import Unavailable
from tollerchat.hub import Hub
from tollerchat.logs import Seldom
from tollerchat.protocol import MAX_BIGINT
from tollerchat.repository import Repository
from tollerchat.saving import SERVERS_KEY
from tollerchat.tasks import end_tasks

__all__ = ("PostgresBus",)

logger = logging.getLogger("tollerchat.bus")
logger.addFilter(Seldom())  # it tries again and again

RETRY_DELAY = 0.5  # seconds between attempts to connect
MAX_AT_ONCE = 100  # notifications, before others have their turn
DOUBT_DELAY = 0.1  # seconds, until a commit whose answer was lost is done, mostly
PROBE_INTERVAL = 5.0  # seconds between probes of the connection, which also look for lost hints

_FAILURES = (*FAILURES, Unavailable)

# These write also where the database is read-only by default: others may write messages all the same.
_LISTEN = f"""
    SET LOCAL transaction_read_only = off;
    SELECT pg_advisory_lock_shared({SERVERS_KEY}, %(id)s);
    INSERT INTO tollerchat_servers (id) VALUES (%(id)s) ON CONFLICT DO NOTHING;
    LISTEN tollerchat"""

# Granted when all who looked before we were in the table have committed. For a moment only: savers wait behind it.
_OUTWAIT = f"SET LOCAL lock_timeout = '50ms'; SELECT pg_advisory_xact_lock({SERVERS_KEY}, 0)"

# Forgets those who hold no lock any more, and tells whether we are still known.
_PROBE = f"""
    SET LOCAL transaction_read_only = off;
    DELETE FROM tollerchat_servers WHERE id::oid NOT IN (
        SELECT objid FROM pg_locks JOIN pg_database ON pg_database.oid = database
        WHERE locktype = 'advisory' AND classid = {SERVERS_KEY} AND datname = current_database()
    );
    SELECT 1 FROM tollerchat_servers WHERE id = %(id)s"""


class PostgresBus:
    """LISTENs to what other servers and the triggers of schema.sql notify, and tells the hub.

    Payloads: `grown <channel>:<newest id> ...` of a server, `grown <channel>` of anybody else, `changed <channel>`,
    `deleted <channel>`, `access <channel>`, `user <user>`, `truncated`.
    """

    def __init__(self, config: Config, hub: Hub, repository: Repository) -> None:
        self._config = config
        self._hub = hub
        self._repository = repository
        self._next_look = 0.0  # by time.monotonic(), while not listening

    async def run(self) -> None:
        """Listen, and connect again whenever the connection fails, until cancelled."""
        while True:
            try:
                connection = await self._open()
                with contextlib.closing(connection):
                    await self._execute(connection, _LISTEN)
                    # Whatever was notified before is found in the tables.
                    await self._resync(connection)
                    await self._listen(connection)
            except _FAILURES as exc:
                logger.warning("not listening to the database: %s", reason(exc))
            finally:
                self._forget_access()
            await self._look_without()
            await asyncio.sleep(RETRY_DELAY)

    async def _open(self) -> Connection:
        try:
            return await open_connection(self._config, self._repository.watch)
        except FAILURES:
            self._repository.spare()  # the database may have no more connections to give
            raise

    async def _look_without(self) -> None:
        """Find now and then, over other connections, what nobody tells now."""
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + PROBE_INTERVAL
            await self._try(self._hub.resync())

    async def _resync(self, connection: Connection) -> None:
        """Find what no notification told, as soon as the database can be asked, or the connection is closed.

        Meanwhile it listens all the same: whoever gives up a connection may not get another one.
        """
        while not connection.closed:
            self._hub.access.remembers = True
            if await self._try(self._hub.resync()):
                break
            self._forget_access()
            await asyncio.sleep(RETRY_DELAY)

    def _forget_access(self) -> None:
        """Who may join is to be asked each time: it is not told when that changes."""
        self._hub.access.remembers = False
        self._hub.access.forget()

    async def _try(self, look: Awaitable[None]) -> bool:
        """Look for what is not notified; returns whether the database could be asked."""
        try:
            await look
        except Unavailable as exc:
            logger.warning("what is not notified cannot be looked for: %s", exc)
            return False
        return True

    async def _listen(self, connection: Connection) -> None:
        probing = asyncio.create_task(self._probe(connection))
        try:
            while True:
                payloads = dict.fromkeys(await connection.notified(MAX_AT_ONCE))
                try:
                    await self._take(payloads)
                except Unavailable:
                    await self._resync(connection)
        finally:
            await end_tasks(probing)

    async def _probe(self, connection: Connection) -> None:
        """Close a connection that is dead but does not tell; else look for hints that were lost."""
        try:
            known = False  # to all who commit
            while True:
                if not await self._execute(connection, _PROBE):
                    raise Unavailable("the database has forgotten this server")
                known = known or await self._outwait(connection)
                await self._try(self._hub.compare_with_log())
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._hub.compare_soon.wait(), PROBE_INTERVAL if known else RETRY_DELAY
                    )
                    await asyncio.sleep(DOUBT_DELAY)
                self._hub.compare_soon.clear()
        except _FAILURES as exc:
            logger.warning("a probe of the database failed: %s", reason(exc))
            connection.close()

    async def _outwait(self, connection: Connection) -> bool:
        """Whether all who commit have ended their earlier transactions, and so know that we listen."""
        try:
            await self._execute(connection, _OUTWAIT)
        except psycopg2.errors.LockNotAvailable:
            return False
        return True

    async def _execute(self, connection: Connection, sql: str) -> list[tuple[Any, ...]]:
        rows = await connection.query(sql, {"id": self._repository.server_id})
        connection.look()
        return rows

    async def _take(self, payloads: Iterable[str]) -> None:
        grown: set[int] = set()  # channels of which nobody told the newest id
        for payload in payloads:
            try:
                await self._dispatch(payload, grown)
            except (ValueError, IndexError):  # anybody may notify anything
                logger.warning("a notification that is not understood: %.100r", payload)
        await self._hub.compare(grown)

    async def _dispatch(self, payload: str, grown: set[int]) -> None:
        verb, *arguments = payload.split()
        if verb == "grown":
            for argument in arguments:
                channel_id, _, message_id = argument.partition(":")
                if message_id:
                    if (newest := int(message_id)) > MAX_BIGINT:
                        raise ValueError
                    self._hub.hint(int(channel_id), newest)
                else:
                    grown.add(int(channel_id))
        elif verb == "changed":
            self._hub.forget(int(arguments[0]))
        elif verb == "deleted":
            self._hub.channel_deleted(int(arguments[0]))
        elif verb == "access":
            await self._hub.check_access([int(arguments[0])])
        elif verb == "user":
            self._hub.user_deleted(int(arguments[0]))
        elif verb == "truncated":
            await self._hub.resync()
