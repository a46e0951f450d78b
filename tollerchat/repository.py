"""`Repository`: messages, channels and users in PostgreSQL, in raw SQL through aiopg."""

import asyncio
import logging
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from typing import Any

import psycopg2

from tollerchat.config import Config
from tollerchat.connection import Connection, ConnectionWatch
from tollerchat.database import any_time, rfc3339
from tollerchat.errors import ChatError, Forbidden, NotFound, Unavailable
from tollerchat.logs import Seldom
from tollerchat.pool import Pool
from tollerchat.protocol import MAX_BIGINT, OutgoingMessage
from tollerchat.saving import LOCK_KEY, NewMessage, Saver, SaveResult

__all__ = ("Repository",)

logger = logging.getLogger("tollerchat.repository")
logger.addFilter(Seldom())  # it is asked again and again

# Rows that came from elsewhere may lack a user: the seed's column is nullable.
_COLUMNS = f"content, coalesce(user_id, 0), channel_id, id, {rfc3339(any_time('created_at'))}"

# Channels are compared and ordered by together with ids, although there is but one: else the planner may take the
# index of ids alone, and go through the messages of all other channels for those of a quiet one.
_NTH_NEWEST = """
    SELECT id FROM messages
    WHERE (channel_id, id) > (%(channel_id)s, %(after)s) AND (channel_id, id) <= (%(channel_id)s, %(until)s)
    ORDER BY channel_id DESC, id DESC OFFSET %(n)s LIMIT 1"""
# Not only those that have one: the planner may take the index of nonces then, and read all of the channel's.
_NONCES = "SELECT id, nonce FROM messages WHERE channel_id = %s AND id = ANY (%s)"
_NEWEST = """
    SELECT asked.channel_id, (
        SELECT id FROM messages
        WHERE channel_id >= asked.channel_id AND (channel_id, id) <= (asked.channel_id, %s)
        ORDER BY channel_id DESC, id DESC LIMIT 1
    ) FROM unnest(%s::int[]) AS asked (channel_id)"""

# Of the sequence that ids come from: the file it is in, which is another one as soon as they start again; and the last
# id, NULL where it cannot be told: before the first, or by a role that may take ids, but not look at them.
_SEQUENCE = """
    SELECT pg_relation_filenode(sequence)::bigint,
        CASE WHEN has_sequence_privilege(sequence, 'USAGE, SELECT')
            THEN pg_sequence_last_value(sequence) END
    FROM (SELECT pg_get_serial_sequence('messages', 'id')::regclass AS sequence) AS asked"""

# Whoever stores a message of a channel holds its lock.
_UNLOCKED = f"""
    SELECT channel_id FROM unnest(%s::int[]) AS asked (channel_id)
    WHERE pg_try_advisory_xact_lock_shared({LOCK_KEY}, channel_id)"""

# What is asked whenever somebody joins is planned once for each connection: planning costs more than the answer.
# The tables may be small then, and grow: LIMIT keeps the planner from joins that read all of one.
_PREPARE = f"""
    SET plan_cache_mode = force_generic_plan;
    PREPARE tollerchat_last (int, bigint, int) AS
    SELECT {_COLUMNS} FROM messages WHERE channel_id >= $1 AND (channel_id, id) <= ($1, $2)
    ORDER BY channel_id DESC, id DESC LIMIT $3;
    PREPARE tollerchat_after (int, bigint, bigint, int) AS
    SELECT {_COLUMNS} FROM messages WHERE (channel_id, id) > ($1, $2) AND (channel_id, id) <= ($1, $3)
    ORDER BY channel_id, id LIMIT $4;
    PREPARE tollerchat_access (int[], int[]) AS
    SELECT asked.channel_id, asked.user_id, channel.id IS NOT NULL,
        (SELECT true FROM users WHERE id = asked.user_id LIMIT 1),
        NOT channel.is_private OR (
            SELECT true FROM channel_users
            WHERE channel_id = asked.channel_id AND user_id = asked.user_id LIMIT 1
        )
    FROM unnest($1, $2) AS asked (channel_id, user_id)
    LEFT JOIN LATERAL (SELECT id, is_private FROM channels WHERE id = asked.channel_id LIMIT 1) AS channel ON true;
    {_SEQUENCE}"""


class Repository:
    """Messages, channels and users in PostgreSQL.

    Every method raises `Unavailable` within a bounded time, for as long as `watch.run` runs.
    """

    def __init__(self, config: Config) -> None:
        self.watch = ConnectionWatch()
        # They connect when first used: a database that is away now may come back.
        self._readers = Pool(config, self.watch, config.db_pool_size, self._prepare)
        self._saver = Saver(config, self.watch, self._readers.spare)
        self._sequence_file: int | None = None

    @property
    def server_id(self) -> int:
        """By which servers on one database tell each other apart."""
        return self._saver.server_id

    def spare(self) -> None:
        """Give up a connection that is not in use, for somebody who needs one more."""
        self._readers.spare()

    def close(self) -> None:
        """Close all connections."""
        self._saver.close()
        self._readers.close()

    async def _prepare(self, connection: Connection) -> None:
        ((sequence_file, _),) = await connection.query(_PREPARE)
        if self._sequence_file is None:  # nothing was read before
            self._sequence_file = sequence_file

    # -- channels and users ------------------------------------------------------------------------

    async def refusals(self, pairs: Collection[tuple[int, int]]) -> dict[tuple[int, int], ChatError | None]:
        """For each pair of a channel and a user: None, or why the user may not join the channel."""
        asked = list(pairs)
        parameters = ([channel_id for channel_id, _ in asked], [user_id for _, user_id in asked])
        refusals: dict[tuple[int, int], ChatError | None] = {}
        rows = await self._read("EXECUTE tollerchat_access (%s::int[], %s::int[])", parameters)
        for channel_id, user_id, channel_exists, user_exists, may_join in rows:
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
        rows = await self._read("EXECUTE tollerchat_last (%s, %s, %s)", (channel_id, until, limit))
        return [OutgoingMessage(*row) for row in reversed(rows)]

    async def load_messages_after(
        self, channel_id: int, after: int, until: int, limit: int
    ) -> list[OutgoingMessage]:
        """The first `limit` messages with `after` < id <= `until`, oldest first."""
        rows = await self._read(
            "EXECUTE tollerchat_after (%s, %s, %s, %s)", (channel_id, after, until, limit)
        )
        return [OutgoingMessage(*row) for row in rows]

    async def nth_newest_id(self, channel_id: int, after: int, until: int, n: int) -> int | None:
        """The id of the message that has exactly `n` newer ones among `after` < id <= `until`, if any."""
        parameters = {"channel_id": channel_id, "after": after, "until": until, "n": n}
        rows = await self._read(_NTH_NEWEST, parameters)
        return rows[0][0] if rows else None

    async def nonces_of(self, channel_id: int, message_ids: list[int]) -> dict[int, str]:
        """The nonces of these messages, as far as they have one."""
        rows = await self._read(_NONCES, (channel_id, message_ids))
        return {message_id: nonce for message_id, nonce in rows if nonce is not None}

    async def newest_ids(self, channel_ids: Iterable[int]) -> dict[int, int]:
        """The newest message id of each channel, 0 for an empty one."""
        rows = await self._read(_NEWEST, (MAX_BIGINT, list(channel_ids)))
        return {channel_id: newest or 0 for channel_id, newest in rows}

    async def unlocked(self, channel_ids: Iterable[int]) -> set[int]:
        """Those of the channels in which nobody is storing a message."""
        return {channel_id for (channel_id,) in await self._read(_UNLOCKED, (list(channel_ids),))}

    async def ids_restarted(self, stored: int, heads: Mapping[int, int]) -> bool:
        """Whether ids have started again, since this was asked before or since the log was first read.

        Or have gone back, because the database is a backup, or a standby that was behind: behind one that was stored,
        or one that was read, of which `heads` has the newest by channel; MAX_BIGINT where that is to be looked into.
        """
        sequence_file, last_id = await self._sequence()
        before, self._sequence_file = self._sequence_file, sequence_file
        if before != sequence_file:
            return True
        if last_id is None:
            return False
        if last_id < stored:
            return True
        if not (suspects := {channel_id for channel_id, head in heads.items() if head > last_id}):
            return False
        newest = await self.newest_ids(suspects)
        _, last_id = await self._sequence()  # only now: it has given the ids of all that are newest, or else:
        restored = {channel_id for channel_id in suspects if newest[channel_id] > (last_id or 0)}
        if restored:  # with ids of their own; new messages come before them, unseen
            logger.error("there are messages with ids that are to be given yet: run tollerchat init-db")
        return restored != suspects

    async def _sequence(self) -> tuple[int, int | None]:
        (row,) = await self._read(_SEQUENCE, ())
        return row[0], row[1]

    async def _read(self, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        # After a restart of the database, connections are dead and only tell when used.
        for _ in range(self._readers.size):
            try:
                return await self._readers.run(sql, parameters)
            except Unavailable as exc:
                if isinstance(exc.__cause__, psycopg2.errors.FeatureNotSupported):
                    continue  # a prepared plan of a table that was altered
                if not exc.sent or isinstance(exc.__cause__, asyncio.TimeoutError):
                    raise
        return await self._readers.run(sql, parameters)

    # -- writing -----------------------------------------------------------------------------------

    async def save_message(self, message: NewMessage) -> OutgoingMessage:
        """Store one message, which all servers, this one too, are notified of; returns it as committed.

        Raises what `save_messages` returns.
        """
        (result,) = await self._saver.save([message], {}, tell_all=True)
        if isinstance(result, ChatError):
            raise result
        return result.message

    def save_messages(
        self, batch: Sequence[NewMessage], heads: Mapping[int, int]
    ) -> Awaitable[list[SaveResult]]:
        """Store a batch in one transaction; one result per message, in order: see `Saver.save`.

        Telling our own clients is left to the caller.
        """
        return self._saver.save(batch, heads)
