"""All SQL of the package, raw, through aiopg."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import aiopg
import msgspec
import psycopg2

from tollerchat.config import Config
from tollerchat.database import FAILURES, OPTIONS, ConnectionWatch, connect, explain, has_answered, run_query
from tollerchat.errors import (
    ChannelLocked,
    ChatError,
    Forbidden,
    InvalidContent,
    NonceConflict,
    NotFound,
    Unavailable,
)
from tollerchat.protocol import OutgoingMessage

__all__ = ("NewMessage", "Repository", "SaveResult", "Saved", "apply_schema", "read_schema")

logger = logging.getLogger("tollerchat.repository")

# First key of the advisory locks, the second is the channel ("toll" in ASCII; schema.sql has it too).
LOCK_KEY = 0x746F6C6C

# RFC 3339; the time must be one in UTC.
_TIME_FORMAT = """'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""

# All queries have their index. A planner that knows nothing of a new table would sort a channel for each page.
_USE_INDEXES = "SET enable_seqscan = off; SET enable_bitmapscan = off;"

# Rows that came from elsewhere may lack a user or a time: the seed's columns are nullable.
_COLUMNS = f"""content, coalesce(user_id, 0), channel_id, id,
    to_char(coalesce(created_at, 'epoch') AT TIME ZONE 'UTC', {_TIME_FORMAT})"""

_LAST = f"SELECT {_COLUMNS} FROM messages WHERE channel_id = %s AND id <= %s ORDER BY id DESC LIMIT %s"
_AFTER = f"""
    SELECT {_COLUMNS} FROM messages WHERE channel_id = %s AND id > %s AND id <= %s
    ORDER BY id LIMIT %s"""
_NTH_NEWEST = """
    SELECT id FROM messages WHERE channel_id = %s AND id > %s AND id <= %s
    ORDER BY id DESC OFFSET %s LIMIT 1"""
_NONCES = """
    SELECT user_id, nonce, id FROM messages
    WHERE channel_id = %s AND (user_id, nonce) IN (SELECT * FROM unnest(%s::int[], %s::text[]))"""
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

# One round trip for a batch, and one transaction: first the locks, in sorted order; then, in a statement
# of its own so that its snapshot has all that was committed under those locks, the rows.
_SAVE = "EXECUTE tollerchat_lock (%s); EXECUTE tollerchat_save (%s, %s)"

_LOCKED = f"""
    SELECT channel_id FROM unnest(%s::int[]) AS asked (channel_id)
    WHERE NOT pg_try_advisory_xact_lock({LOCK_KEY}, channel_id)"""

# The ids are taken here and not by the column's default, so that each row of the answer knows its own.
# The first row has what each channel had before: main queries do not see what CTEs insert.
_PREPARE_SAVE = f"""
    SET tollerchat.writer = 'on';
    SET lock_timeout = '100ms';
    SET plan_cache_mode = force_generic_plan;
    SET enable_hashjoin = off; SET enable_mergejoin = off;
    {_USE_INDEXES}
    PREPARE tollerchat_lock (int[]) AS
    SELECT pg_advisory_xact_lock({LOCK_KEY}, channel_id) FROM unnest($1) AS sorted (channel_id);
    PREPARE tollerchat_save (json, int[]) AS
    WITH moment AS MATERIALIZED (SELECT clock_timestamp() AS now),
    incoming AS MATERIALIZED (
        SELECT n, new.channel_id, new.user_id, new.content, new.nonce,
            old.id AS old_id, old.content AS old_content, old.created_at AS old_created_at,
            CASE WHEN old.id IS NULL THEN nextval(%(sequence)s::regclass) END AS id
        FROM ROWS FROM (
            json_to_recordset($1) AS (channel_id int, user_id int, content text, nonce text)
        ) WITH ORDINALITY AS new (channel_id, user_id, content, nonce, n)
        LEFT JOIN messages AS old
            ON old.channel_id = new.channel_id AND old.user_id = new.user_id AND old.nonce = new.nonce
        ORDER BY n
    ),
    stored AS (
        INSERT INTO messages (id, channel_id, user_id, content, nonce, created_at)
        SELECT id, channel_id, user_id, content, nonce, (SELECT now FROM moment)
        FROM incoming WHERE id IS NOT NULL ORDER BY id
    )
    SELECT id, old_id, old_content,
        CASE WHEN old_id IS NOT NULL
            THEN to_char(old_created_at AT TIME ZONE 'UTC', {_TIME_FORMAT})
            ELSE (SELECT to_char(now AT TIME ZONE 'UTC', {_TIME_FORMAT}) FROM moment) END,
        CASE WHEN n = 1 THEN ARRAY(
            SELECT coalesce((SELECT max(id) FROM messages WHERE messages.channel_id = asked.channel_id), 0)
            FROM unnest($2) WITH ORDINALITY AS asked (channel_id, place) ORDER BY place) END
    FROM incoming ORDER BY n"""

# What the server may say about single rows of a batch: a foreign key, a check, a trigger, an encoding.
_ROW_REFUSALS = (psycopg2.DataError, psycopg2.IntegrityError, psycopg2.errors.RaiseException)
_REFUSALS = (*_ROW_REFUSALS, psycopg2.errors.LockNotAvailable)


class NewMessage(msgspec.Struct, gc=False):
    """A message that is to be stored."""

    channel_id: int
    user_id: int
    content: str
    nonce: str | None = None


class Saved(NamedTuple):
    """A committed message."""

    message: OutgoingMessage
    repeated: bool  # stored by an earlier call, under the same nonce
    previous: int  # the id that the channel had right before it, 0 if none; if repeated, of no meaning


SaveResult = Saved | ChatError


class Repository:
    """Messages, channels and users in PostgreSQL. Every method raises `Unavailable` within a bounded time."""

    def __init__(self, config: Config) -> None:
        self.watch = ConnectionWatch()
        self._config = config
        self._readers: aiopg.Pool | None = None
        self._writer: aiopg.Connection | None = None
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Get ready to connect. It connects when first used: a database that is away now may come back."""
        self._readers = await aiopg.create_pool(
            self._config.db_url,
            minsize=0,
            maxsize=self._config.db_pool_size,
            timeout=self._config.db_timeout,
            on_connect=self._prepare_reader,
            **OPTIONS,
        )

    async def _prepare_reader(self, conn: aiopg.Connection) -> None:
        await self.watch.add(conn)
        async with conn.cursor() as cursor:
            await cursor.execute(_USE_INDEXES)

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
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
        await self._read("SELECT FROM messages, channels, users, channel_users LIMIT 0", ())

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

    async def ids_of_nonces(
        self, channel_id: int, names: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], int]:
        """The ids of the messages with these users and nonces, as far as they are stored."""
        parameters = (channel_id, [user_id for user_id, _ in names], [nonce for _, nonce in names])
        rows = await self._read(_NONCES, parameters)
        return {(user_id, nonce): message_id for user_id, nonce, message_id in rows}

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
        """Store one message and return it as committed. Raises what `save_messages` returns."""
        (result,) = await self.save_messages([message])
        if isinstance(result, ChatError):
            raise result
        return result.message

    async def save_messages(self, batch: Sequence[NewMessage]) -> list[SaveResult]:
        """Store a batch in one transaction, and return one result per message, in order.

        A message that cannot be stored gets its error and leaves the others alone. A nonce that was
        seen before gives the original message, or `NonceConflict` if the content differs; `batch`
        must not have the same nonce of the same user and channel twice.
        """
        channel_ids = sorted({message.channel_id for message in batch})
        payload = msgspec.json.encode(batch).decode()
        array = "{" + ",".join(map(str, channel_ids)) + "}"  # psycopg2 would adapt each number by itself
        try:
            rows = await self._write(_SAVE, (array, payload, array))
        except psycopg2.errors.LockNotAvailable:
            # Somebody holds channels for long, an idle transaction say: the others must not suffer.
            error: ChatError = ChannelLocked("the channel is locked by another transaction")
            if len(channel_ids) == 1:
                return [error] * len(batch)
            locked = await self._read(_LOCKED, (channel_ids,))
            if not locked:  # it was another lock, of a row maybe
                return await self._save_parts(batch, lambda _, message: message.channel_id, {})
            return await self._save_parts(
                batch, lambda *_: 0, {channel_id: error for (channel_id,) in locked}
            )
        except _ROW_REFUSALS as exc:
            if len(batch) == 1:
                return [_explain_refusal(exc)]
            return await self._save_parts(batch, lambda n, _: n * 2 // len(batch), {})
        return _results(batch, rows, channel_ids)

    async def _save_parts(
        self,
        batch: Sequence[NewMessage],
        part_of: Callable[[int, NewMessage], int],
        stopped: dict[int, ChatError],
    ) -> list[SaveResult]:
        """Store a batch that failed as a whole in smaller parts.

        `stopped` has the channels for which it is not tried. A channel where a message has to be tried
        again is stopped, too: what follows it must not overtake it.
        """
        parts: dict[int, list[int]] = {}
        for n, message in enumerate(batch):
            parts.setdefault(part_of(n, message), []).append(n)
        results: dict[int, SaveResult] = {}
        for numbers in parts.values():
            tried = [n for n in numbers if batch[n].channel_id not in stopped]
            try:
                saved = await self.save_messages([batch[n] for n in tried]) if tried else []
            except Unavailable as exc:  # not of the parts before, which are committed
                saved = [exc] * len(tried)
            results.update(zip(tried, saved, strict=True))
            results.update((n, stopped[batch[n].channel_id]) for n in numbers if n not in results)
            for n, result in zip(tried, saved, strict=True):
                if isinstance(result, ChannelLocked):
                    stopped[batch[n].channel_id] = result
                elif isinstance(result, Unavailable):
                    stopped[batch[n].channel_id] = Unavailable(str(result))  # the rest was not sent
        return [results[n] for n in range(len(batch))]

    async def _write(self, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        """Run a query on the connection that is kept for writing; raises some of `_REFUSALS` as they are."""
        async with self._writing:
            try:
                if self._writer is None or self._writer.closed:
                    self._writer = None
                    self._writer = await self._connect_writer()
                return await run_query(self._writer_cursor, sql, parameters)
            except FAILURES as exc:
                if isinstance(exc, _REFUSALS) and has_answered(self._writer, exc):
                    raise
                unavailable = explain(exc, self._writer)
                if self._writer is not None:
                    self._writer.close()  # whatever its state is, and that of the prepared statement
                raise unavailable from exc

    async def _connect_writer(self) -> aiopg.Connection:
        conn: aiopg.Connection = await connect(self._config, self._config.db_timeout)
        try:
            await self.watch.add(conn)
            cursor = await conn.cursor()
            await cursor.execute("SELECT pg_get_serial_sequence('messages', 'id')")
            (sequence,) = await cursor.fetchone()
            await cursor.execute(_PREPARE_SAVE, {"sequence": sequence})
        except BaseException:
            conn.close()
            raise
        self._writer_cursor = cursor
        return conn


def _results(
    batch: Sequence[NewMessage], rows: Sequence[tuple[Any, ...]], channel_ids: Iterable[int]
) -> list[SaveResult]:
    """Read the answer of `tollerchat_save`."""
    results: list[SaveResult] = []
    newest = dict(zip(channel_ids, rows[0][4], strict=True))  # as the rows are gone through
    for new, (message_id, old_id, old_content, created_at, _) in zip(batch, rows, strict=True):
        if old_id is None:
            stored = OutgoingMessage(new.content, new.user_id, new.channel_id, message_id, created_at)
            results.append(Saved(stored, repeated=False, previous=newest[new.channel_id]))
            newest[new.channel_id] = message_id
        elif old_content == new.content:
            stored = OutgoingMessage(new.content, new.user_id, new.channel_id, old_id, created_at)
            results.append(Saved(stored, repeated=True, previous=0))
        else:
            results.append(NonceConflict("this nonce was used for a message with other content"))
    return results


def _explain_refusal(exc: psycopg2.Error) -> ChatError:
    """Why the database did not take a message."""
    if isinstance(exc, psycopg2.errors.ForeignKeyViolation):
        return NotFound("the channel or the user does not exist any more")
    logger.warning("the database refused a message: %s", exc.pgcode)
    return InvalidContent("the database refused the message")


def read_schema() -> str:
    """The SQL of schema.sql."""
    return resources.files("tollerchat").joinpath("schema.sql").read_text("utf-8")


async def apply_schema(config: Config) -> None:
    """Apply schema.sql to `config.db_url`. Raises `psycopg2.Error`."""
    async with connect(config, timeout=60.0) as conn, conn.cursor() as cursor:
        await cursor.execute(read_schema())
