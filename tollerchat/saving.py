"""`Saver`: how a batch of messages is stored, and each of them gets a result of its own."""

import functools
import itertools
import operator
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import psycopg2

from tollerchat.config import Config
from tollerchat.connection import Connection, ConnectionWatch
from tollerchat.database import any_time, explain_refusal, is_of_rows, rfc3339
from tollerchat.errors import ChannelLocked, ChatError, NonceConflict, Unavailable
from tollerchat.pool import Pool
from tollerchat.protocol import MAX_ID, OutgoingMessage

__all__ = ("LANES", "LOCK_KEY", "SERVERS_KEY", "NewMessage", "SaveResult", "Saved", "Saver")

# Batches at a time: one with the database while one is delivered; or, of few messages, both with the database.
LANES: Final = 2

# First key of the advisory locks, the second is the channel ("toll" in ASCII; schema.sql has it too).
LOCK_KEY = 0x746F6C6C

# Of the lock under which servers tell that they listen.
SERVERS_KEY = LOCK_KEY + 1

# One round trip for a batch, and one transaction: settings, if any; the locks, in sorted order; then, in a statement
# of its own so that its snapshot has all that was committed under those locks, the rows.
_AT_ONCE = b"SET LOCAL lock_timeout = '5ms'; "
_LOCK = b"EXECUTE tollerchat_lock ('{%s}'); "
_SAVE = b"EXECUTE tollerchat_save (%s, %d)"
_SAVE_ONE = b"EXECUTE tollerchat_save_one (%d, %d, %s, %s, %d, %d)"

_LOCKED = f"""
    SELECT channel_id FROM unnest(%s::int[]) AS asked (channel_id)
    WHERE NOT pg_try_advisory_xact_lock({LOCK_KEY}, channel_id)"""

# The ids are taken here and not by the column's default, so that each row of the answer knows its own.
# The first message of each channel asks what was written behind the head that we know, for which the index has an
# answer at once; no query sees what its own statement inserts.
_UNKNOWN = """
    SELECT id FROM messages
    WHERE (messages.channel_id, id) > ({channel_id}, {head}) AND messages.channel_id <= {channel_id}
    ORDER BY messages.channel_id DESC, id DESC LIMIT 1"""

# We tell our own clients; only if there are other servers, they are notified: of many channels at a time, but a payload
# must stay under 8,000 bytes. A server that begins to listen enters itself in the table, and then waits for all who
# hold the first of the locks: they may have looked before, and tell it nothing.
_OTHERS = "FROM tollerchat_servers AS server WHERE server.id <> {told_by}"

# A message alone is stored by the last of these, in 0.85 of the time.
_PREPARE = f"""
    SET tollerchat.writer = 'on';
    SET lock_timeout = '100ms';
    SET plan_cache_mode = force_generic_plan; SET standard_conforming_strings = on;
    SET enable_hashjoin = off; SET enable_mergejoin = off;
    SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') = 'off';  -- or what is acked would not be safe
    PREPARE tollerchat_lock (int[]) AS
    SELECT pg_advisory_xact_lock_shared({SERVERS_KEY}, 0), pg_advisory_xact_lock({LOCK_KEY}, channel_id)
    FROM unnest($1) AS sorted (channel_id);
    PREPARE tollerchat_save (json, int) AS
    WITH moment AS MATERIALIZED (SELECT clock_timestamp() AS now),
    incoming AS MATERIALIZED (
        SELECT n, new.channel_id, new.user_id, new.content, new.nonce,
            old.id AS old_id, old.content AS old_content, old.created_at AS old_created_at,
            CASE WHEN old.id IS NULL THEN nextval(%(sequence)s::regclass) END AS id,
            CASE WHEN head IS NOT NULL THEN ({_UNKNOWN.format(channel_id="new.channel_id", head="head")}) END AS unknown
        FROM ROWS FROM (
            json_to_recordset($1) AS (channel_id int, user_id int, content text, nonce text, head bigint)
        ) WITH ORDINALITY AS new (channel_id, user_id, content, nonce, head, n)
        LEFT JOIN LATERAL (
            SELECT id, content, created_at FROM messages
            WHERE channel_id = new.channel_id AND user_id = new.user_id AND nonce = new.nonce
            LIMIT 1  -- one by one: a join may read the whole index, which was small when it was planned
        ) AS old ON true
        ORDER BY n
    ),
    stored AS (
        INSERT INTO messages (id, channel_id, user_id, content, nonce, created_at)
        SELECT id, channel_id, user_id, content, nonce, (SELECT now FROM moment)
        FROM incoming WHERE id IS NOT NULL
    ),
    told AS MATERIALIZED (
        SELECT pg_notify('tollerchat', 'grown ' || string_agg(entry, ' '))
        FROM (
            SELECT channel_id || ':' || max(id) AS entry, row_number() OVER () / 200 AS part
            FROM incoming WHERE id IS NOT NULL GROUP BY channel_id
        ) AS entries
        WHERE EXISTS (SELECT {_OTHERS.format(told_by="$2")})
        GROUP BY part
    )
    SELECT coalesce(id, old_id), unknown,
        CASE WHEN old_id IS NOT NULL
            THEN {rfc3339(any_time("old_created_at"))} ELSE (SELECT {rfc3339("now")} FROM moment) END,
        old_content
    FROM incoming, (SELECT count(*) FROM told) AS telling ORDER BY n;
    PREPARE tollerchat_save_one (int, int, text, text, bigint, int) AS
    INSERT INTO messages (id, channel_id, user_id, content, nonce, created_at)
    VALUES (nextval(%(sequence)s::regclass), $1, $2, $3, $4, clock_timestamp())
    ON CONFLICT (channel_id, user_id, nonce) WHERE nonce IS NOT NULL DO NOTHING
    RETURNING id, coalesce(
            -- Always NULL: it has no column of its own, which would cost more than it does.
            (SELECT CASE WHEN pg_notify('tollerchat', 'grown ' || $1 || ':' || messages.id) IS NULL THEN 0 END
                {_OTHERS.format(told_by="$6")} LIMIT 1),
            ({_UNKNOWN.format(channel_id="$1", head="$5")})
        ),
        {rfc3339("created_at")}"""


class NewMessage(msgspec.Struct, gc=False):
    """A message that is to be stored."""

    channel_id: int
    user_id: int
    content: str
    nonce: str | None = None
    head: int | None = None  # for the saver: of the channel, with the first message of each


class Saved(msgspec.Struct, gc=False):
    """A committed message."""

    message: OutgoingMessage
    repeated: bool  # stored by an earlier call, under the same nonce
    previous: int  # no message of the channel is between this id and its own; if repeated, of no meaning


SaveResult = Saved | ChatError

_channel_id = operator.attrgetter("channel_id")
_user_id = operator.attrgetter("user_id")


class Saver:
    """Stores messages."""

    def __init__(
        self,
        config: Config,
        watch: ConnectionWatch,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = Pool(config, watch, LANES, self._prepare, refused)

    @functools.cached_property
    def server_id(self) -> int:
        """By which servers on one database tell each other apart; not 0: that lock is for all servers.

        Drawn when first used, because processes may be forked from one that has the parts.
        """
        return 1 + secrets.randbelow(MAX_ID)

    def close(self) -> None:
        """Close the connections, and make none any more."""
        self._pool.close()

    async def save(
        self,
        batch: Sequence[NewMessage],
        heads: Mapping[int, int],
        *,
        tell_all: bool = False,
        settings: bytes = b"",
    ) -> list[SaveResult]:
        """Store a batch in one transaction, and return one result per message, in order.

        `heads` has the newest ids that are known, by channel, as far as any are. Other servers are notified; with
        `tell_all`, which is for one message alone, this one is, too.

        A message that cannot be stored gets its error and leaves the others alone. A nonce that was
        seen before gives the original message, or `NonceConflict` if the content differs; `batch`
        must not have the same nonce of the same user and channel twice.
        """
        previous: dict[int, int] = {}
        for new in batch:
            new.head = None
            if new.channel_id not in previous:
                new.head = previous[new.channel_id] = heads.get(new.channel_id, 0)
        channel_ids = sorted(previous)
        before = settings + _LOCK % b",".join([b"%d" % channel_id for channel_id in channel_ids])
        told_by = 0 if tell_all else self.server_id
        try:
            rows: list[tuple[Any, ...]] = []
            if len(batch) == 1:
                rows = [(*row, None) for row in await self._run(before + _save_one(batch[0], told_by))]
            if not rows:  # several, or its nonce was seen before
                rows = await self._run(before + _SAVE % (_quote(msgspec.json.encode(batch)), told_by))
        except psycopg2.errors.LockNotAvailable as exc:
            # It tells the query of a foreign key that had to wait.
            of_user = '"users"' in (exc.diag.context or "")
            return await self._save_unlocked(batch, heads, channel_ids, of_user=of_user)
        except psycopg2.Error as exc:
            if len(batch) == 1:
                return [explain_refusal(exc)]
            half = len(batch) // 2
            return await self._save_parts(
                batch, heads, [range(half), range(half, len(batch))], {}, settings=settings
            )
        return _results(batch, rows, previous)

    async def _save_unlocked(
        self,
        batch: Sequence[NewMessage],
        heads: Mapping[int, int],
        channel_ids: Sequence[int],
        *,
        of_user: bool,
    ) -> list[SaveResult]:
        """Store what can be: somebody holds channels, or users, for long, and the others must not suffer."""
        error: ChatError = ChannelLocked("another transaction holds the channel or the user")
        if len(channel_ids) == 1:
            # In the order of the batch, as ids must be.
            runs = [list(run) for _, run in itertools.groupby(range(len(batch)), lambda n: batch[n].user_id)]
            if len(runs) == 1 or not of_user:
                return [error] * len(batch)
            return await self._save_parts(batch, heads, runs, {}, by=_user_id, settings=_AT_ONCE)
        try:
            locked = await self._run(_LOCKED, (channel_ids,))
        except (Unavailable, psycopg2.Error) as exc:
            raise Unavailable(str(exc)) from exc  # whatever was sent: nothing of the batch is stored
        if locked:
            stopped = {channel_id: error for (channel_id,) in locked}
            return await self._save_parts(batch, heads, [range(len(batch))], stopped)
        # It was the lock of a row: by channel, without waiting so long again for each.
        parts: dict[int, list[int]] = {}
        for n, message in enumerate(batch):
            parts.setdefault(message.channel_id, []).append(n)
        return await self._save_parts(batch, heads, parts.values(), {}, settings=_AT_ONCE)

    async def _save_parts(
        self,
        batch: Sequence[NewMessage],
        heads: Mapping[int, int],
        parts: Iterable[Sequence[int]],
        stopped: dict[int, ChatError],
        *,
        by: Callable[[NewMessage], int] = _channel_id,
        settings: bytes = b"",
    ) -> list[SaveResult]:
        """Store a batch that failed as a whole in parts, given as indices.

        `stopped` has the channels, or the users, for which it is not tried. One that turns out to be locked is
        stopped, too: what follows must not overtake. Without a database, all of them are.
        """
        results: dict[int, SaveResult] = {}
        down: Unavailable | None = None
        for part in parts:
            tried = [n for n in part if down is None and by(batch[n]) not in stopped]
            try:
                tried_batch = [batch[n] for n in tried]
                saved = await self.save(tried_batch, heads, settings=settings) if tried else []
            except Unavailable as exc:  # not of the parts before, which are committed
                saved = [exc] * len(tried)
            results.update(zip(tried, saved, strict=True))
            for n in part:
                if n not in results:
                    # A lock first: what is behind a message that is parked must be parked behind it.
                    error = stopped.get(by(batch[n]), down)
                    assert error is not None
                    results[n] = error
            for n, result in zip(tried, saved, strict=True):
                if isinstance(result, ChannelLocked):
                    stopped[by(batch[n])] = result
                elif isinstance(result, Unavailable):
                    down = Unavailable(str(result))  # the rest was not sent
        return [results[n] for n in range(len(batch))]

    def _run(self, sql: str | bytes, parameters: Any = None) -> Awaitable[list[tuple[Any, ...]]]:
        """Run a query. Raises `psycopg2.Error` if it may be about single rows, else `Unavailable`."""
        return self._pool.run(sql, parameters, expects=is_of_rows)

    async def _prepare(self, connection: Connection) -> None:
        ((sequence,),) = await connection.query("SELECT pg_get_serial_sequence('messages', 'id')")
        if sequence is None:
            raise psycopg2.ProgrammingError(
                "messages.id has no sequence of its own: ALTER SEQUENCE ... OWNED BY messages.id"
            )
        await connection.query(_PREPARE, {"sequence": sequence})


def _save_one(new: NewMessage, told_by: int) -> bytes:
    nonce = b"NULL" if new.nonce is None else _quote(new.nonce.encode())
    return _SAVE_ONE % (new.channel_id, new.user_id, _quote(new.content.encode()), nonce, new.head, told_by)


def _quote(text: bytes) -> bytes:
    """A literal of SQL: psycopg2 would need longer to quote it than to send it."""
    return b"'%s'" % text.replace(b"'", b"''")


def _results(
    batch: Sequence[NewMessage], rows: Sequence[tuple[Any, ...]], newest: dict[int, int]
) -> list[SaveResult]:
    """Read the answer of what stored a batch; `newest` are the ids by channel, as the rows are gone through."""
    results: list[SaveResult] = []
    for new, (message_id, unknown, created_at, old_content) in zip(batch, rows, strict=True):
        if unknown is not None:
            newest[new.channel_id] = unknown
        repeated = old_content is not None
        if repeated and old_content != new.content:
            results.append(NonceConflict("this nonce was used for a message with other content"))
            continue
        message = OutgoingMessage(new.content, new.user_id, new.channel_id, message_id, created_at)
        results.append(Saved(message, repeated, previous=newest[new.channel_id]))
        if not repeated:
            newest[new.channel_id] = message_id
    return results
