"""`Repository`: messages, channels and users in PostgreSQL, in raw SQL through aiopg."""

import asyncio
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import aiopg

from tollerchat.config import Config
from tollerchat.connection import FAILURES, OPTIONS, Connection, ConnectionWatch, Pool
from tollerchat.database import TIME_FORMAT, explain, prepare, run_query
from tollerchat.errors import ChatError, Forbidden, NotFound, Unavailable
from tollerchat.protocol import MAX_ID, OutgoingMessage
from tollerchat.saving import SAVE_AND_TELL, NewMessage, Saver, SaveResult

__all__ = ("Repository",)

SAVERS: Final = 2  # connections for storing: batches of different channels can be stored at the same time

# Rows that came from elsewhere may lack a user or a time: the seed's columns are nullable.
_COLUMNS = f"""content, coalesce(user_id, 0), channel_id, id,
    to_char(coalesce(created_at, 'epoch') AT TIME ZONE 'UTC', {TIME_FORMAT})"""

_LAST = f"SELECT {_COLUMNS} FROM messages WHERE channel_id = %s AND id <= %s ORDER BY id DESC LIMIT %s"
_AFTER = f"""
    SELECT {_COLUMNS} FROM messages WHERE channel_id = %s AND id > %s AND id <= %s
    ORDER BY id LIMIT %s"""
_NTH_NEWEST = """
    SELECT id FROM messages WHERE channel_id = %s AND id > %s AND id <= %s
    ORDER BY id DESC OFFSET %s LIMIT 1"""
_NONCES = "SELECT id, nonce FROM messages WHERE channel_id = %s AND id = ANY (%s) AND nonce IS NOT NULL"
_NEWEST = """
    SELECT channel_id, (SELECT max(id) FROM messages WHERE messages.channel_id = asked.channel_id)
    FROM unnest(%s::int[]) AS asked (channel_id)"""
_ACCESS = """
    SELECT asked.channel_id, asked.user_id, channels.id IS NOT NULL, users.id IS NOT NULL,
        NOT channels.is_private OR channel_users.user_id IS NOT NULL
    FROM unnest(%s::int[], %s::int[]) AS asked (channel_id, user_id)
    LEFT JOIN channels ON channels.id = asked.channel_id
    LEFT JOIN users ON users.id = asked.user_id
    LEFT JOIN channel_users
        ON channel_users.channel_id = asked.channel_id AND channel_users.user_id = asked.user_id"""


class Repository:
    """Messages, channels and users in PostgreSQL.

    Every method raises `Unavailable` within a bounded time, for as long as `watch.run` runs.
    """

    def __init__(self, config: Config) -> None:
        self.server_id: int  # by which servers on one database tell each other apart
        self.watch = ConnectionWatch()
        self._config = config
        self._readers: aiopg.Pool | None = None
        self._savers: list[Saver] = []

    async def open(self) -> None:
        """Get ready to connect. It connects when first used: a database that is away now may come back."""
        # Here, because processes may be forked from one that has the parts. Not 0: that lock is for all servers.
        self.server_id = 1 + secrets.randbelow(MAX_ID)
        self._savers = [Saver(self._config, self.watch, self.server_id) for _ in range(SAVERS)]
        self._readers = await Pool.from_pool_fill(
            self._config.db_url,
            minsize=0,
            maxsize=self._config.db_pool_size,
            timeout=self._config.db_timeout,
            on_connect=self.prepare,
            echo=False,
            pool_recycle=-1,
            **OPTIONS,
        )

    async def prepare(self, conn: Connection) -> None:
        """Watch a new connection, and make it independent of the database's defaults. Raises one of `FAILURES`."""
        await self.watch.add(conn)
        await prepare(conn, self._config)

    async def close(self) -> None:
        for saver in self._savers:
            saver.close()
        if self._readers is not None:
            self._readers.terminate()  # close() alone would wait for a database that does not answer
            await self._readers.wait_closed()

    # -- channels and users ------------------------------------------------------------------------

    async def refusals(self, pairs: Collection[tuple[int, int]]) -> dict[tuple[int, int], ChatError | None]:
        """For each pair of a channel and a user: None, or why the user may not join the channel."""
        asked = list(pairs)
        parameters = ([channel_id for channel_id, _ in asked], [user_id for _, user_id in asked])
        refusals: dict[tuple[int, int], ChatError | None] = {}
        for channel_id, user_id, channel_exists, user_exists, may_join in await self._read(
            _ACCESS, parameters
        ):
            refusal: ChatError | None = None
            if not channel_exists:
                refusal = NotFound(f"channel {channel_id} does not exist")
            elif not user_exists:
                refusal = Forbidden(f"user {user_id} does not exist")
            elif not may_join:
                refusal = Forbidden(f"channel {channel_id} is private and user {user_id} is not a member")
            refusals[channel_id, user_id] = refusal
        return refusals

    async def ping(self) -> None:
        """Raise `Unavailable` unless the database answers and has our tables."""
        await self._read(
            "SELECT FROM messages, channels, users, channel_users, tollerchat_servers LIMIT 0", ()
        )

    # -- reading the log ---------------------------------------------------------------------------

    async def load_last_messages(self, channel_id: int, until: int, limit: int) -> list[OutgoingMessage]:
        """The newest `limit` messages with an id of at most `until`, oldest first."""
        rows = await self._read(_LAST, (channel_id, until, limit))
        return [OutgoingMessage(*row) for row in reversed(rows)]

    async def load_messages_after(
        self, channel_id: int, after: int, until: int, limit: int
    ) -> list[OutgoingMessage]:
        """The first `limit` messages with `after` < id <= `until`, oldest first."""
        rows = await self._read(_AFTER, (channel_id, after, until, limit))
        return [OutgoingMessage(*row) for row in rows]

    async def nth_newest_id(self, channel_id: int, after: int, until: int, n: int) -> int | None:
        """The id of the message that has exactly `n` newer ones among `after` < id <= `until`, if any."""
        rows = await self._read(_NTH_NEWEST, (channel_id, after, until, n))
        return rows[0][0] if rows else None

    async def nonces_of(self, channel_id: int, message_ids: list[int]) -> dict[int, str]:
        """The nonces of these messages, as far as they have one."""
        return dict(await self._read(_NONCES, (channel_id, message_ids)))

    async def newest_ids(self, channel_ids: Iterable[int]) -> dict[int, int]:
        """The newest message id of each channel, 0 for an empty one."""
        rows = await self._read(_NEWEST, (list(channel_ids),))
        return {channel_id: newest or 0 for channel_id, newest in rows}

    async def _read(self, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        # After a restart of the database, pooled connections are dead and only tell when used.
        for _ in range(self._config.db_pool_size):
            try:
                return await self._read_once(sql, parameters)
            except Unavailable as exc:
                if not exc.sent or isinstance(exc.__cause__, asyncio.TimeoutError):
                    raise
        return await self._read_once(sql, parameters)

    async def _read_once(self, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        assert self._readers is not None, "open() was not awaited"
        conn = None
        try:
            async with self._readers.acquire() as conn, conn.cursor() as cursor:
                return await run_query(cursor, sql, parameters)
        except FAILURES as exc:
            raise explain(exc, conn) from exc

    # -- writing -----------------------------------------------------------------------------------

    async def save_message(self, message: NewMessage) -> OutgoingMessage:
        """Store one message, which all servers, this one too, are notified of; returns it as committed.

        Raises what `save_messages` returns.
        """
        (result,) = await self._saver().save([message], {}, SAVE_AND_TELL)
        if isinstance(result, ChatError):
            raise result
        return result.message

    async def save_messages(self, batch: Sequence[NewMessage], heads: Mapping[int, int]) -> list[SaveResult]:
        """Store a batch in one transaction; one result per message, in order: see `Saver.save`.

        Telling our own clients is left to the caller.
        """
        return await self._saver().save(batch, heads)

    def _saver(self) -> Saver:
        """One that is not busy, if there is one; then always the same, whose connection is warm."""
        assert self._savers, "open() was not awaited"
        return next((saver for saver in self._savers if not saver.busy), self._savers[0])
