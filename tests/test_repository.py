"""What queries cost, where the database's planner could choose badly."""

import asyncio
import contextlib
import dataclasses
import random

import psycopg2
import pytest

from tests.support import until
from tollerchat.errors import Unavailable
from tollerchat.protocol import MAX_BIGINT
from tollerchat.repository import Repository
from tollerchat.saving import NewMessage

OTHERS = 30_000  # messages of a busy channel

_READ = """
    SELECT (SELECT sum(idx_tup_read + idx_tup_fetch) FROM pg_stat_user_indexes)
        + (SELECT sum(seq_tup_read) FROM pg_stat_user_tables),
        (SELECT sum(idx_scan) FROM pg_stat_user_indexes)"""
_CONNECTED = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"""


async def test_quiet_channel_does_not_cost_what_busy_ones_have(config, database):
    """Where channels are few, the index of ids alone looks quick to the planner, and has all messages in it."""
    database.insert("first", "second", channel_id=2)
    database.execute(
        f"""SET session_replication_role = replica;
        INSERT INTO messages (channel_id, user_id, content) SELECT 1, 1, 'x' FROM generate_series(1, {OTHERS});
        SET session_replication_role = origin; ANALYZE"""
    )
    ((before, scans),) = database.execute(_READ)
    repository = Repository(config)
    try:
        assert len(await repository.load_last_messages(2, MAX_BIGINT, 51)) == 2
        assert len(await repository.load_messages_after(2, 0, MAX_BIGINT, 64)) == 2
        assert len(await repository.load_messages_after(3, 0, MAX_BIGINT, 64)) == 0
        assert await repository.nth_newest_id(2, 0, MAX_BIGINT, 1) is not None
        assert await repository.newest_ids([3]) == {3: 0}
        (saved,) = await repository.save_messages([NewMessage(2, 1, "third")], {})
        assert await repository.newest_ids([2]) == {2: saved.message.message_id}
        assert saved.previous < saved.message.message_id - OTHERS
    finally:
        repository.close()
    # They tell the statistics when they go.
    await until(lambda: database.execute(_CONNECTED) == [(0,)] and database.execute(_READ)[0][1] > scans)
    assert database.execute(_READ)[0][0] - before < OTHERS / 100


@pytest.mark.parametrize("messages", [[], ["one"]], ids=["empty", "small"])
async def test_statements_that_were_planned_for_small_tables_stay_quick_as_they_grow(
    config, database, messages
):
    """A plan is kept until the tables are analyzed again, which may be a minute later."""
    database.insert(*messages)
    database.execute("ANALYZE")
    repository = Repository(dataclasses.replace(config, db_pool_size=1))

    async def use_all(n):
        await asyncio.gather(  # both sessions of the saver
            *(
                repository.save_messages(
                    [NewMessage(channel_id, 1, "x", f"{n} {size} {each}") for each in range(size)],
                    {channel_id: 0},
                )
                for size in (1, 2)
                for channel_id in (1, 2)
            )
        )
        await repository.load_last_messages(2, MAX_BIGINT, 1)
        await repository.load_messages_after(2, 0, MAX_BIGINT, 1)
        await repository.refusals([(3, 1), (2, 8)])

    try:
        await use_all("first")
        database.execute(
            f"""SET session_replication_role = replica;
            INSERT INTO users (username) SELECT 'x' FROM generate_series(1, {OTHERS});
            INSERT INTO channels (name) SELECT 'x' FROM generate_series(1, {OTHERS});
            INSERT INTO channel_users (channel_id, user_id) SELECT 4, 9 + n FROM generate_series(1, {OTHERS}) AS n;
            INSERT INTO messages (channel_id, user_id, content, nonce)
            SELECT 4, 1, 'x', n FROM generate_series(1, {OTHERS}) AS n;
            SET session_replication_role = origin"""
        )
        ((before, scans),) = database.execute(_READ)
        for n in range(3):
            await use_all(n)
    finally:
        repository.close()
    await until(lambda: database.execute(_CONNECTED) == [(0,)] and database.execute(_READ)[0][1] > scans)
    assert database.execute(_READ)[0][0] - before < OTHERS / 100


@pytest.mark.parametrize("conforming", ["on", "off"])
async def test_any_text_is_stored_as_it_is(config, database, conforming):
    """Quoted in whatever way, and whatever the database's default for what a backslash means."""
    with contextlib.suppress(psycopg2.Error):  # later versions of PostgreSQL know but one
        database.execute(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET standard_conforming_strings = "
            f"{conforming}', current_database()); END $$"
        )
    pieces = (
        "'",
        "''",
        '"',
        "\\",
        "\\'",
        "\\u0027",
        "$$",
        "%s",
        "%%",
        "{",
        "}",
        ";",
        "--",
        "/*",
        "E'",
        "\x7f",
        "é",
    )
    rng = random.Random(1129)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(300)]
    repository = Repository(config)
    try:
        batch = [NewMessage(1, 1, text, f"{n}{text}") for n, text in enumerate(texts)]
        alone = [batch.pop() for _ in range(100)]
        results = await repository.save_messages(batch, {})
        again = await repository.save_messages(batch, {})
        for new in alone:
            results += await repository.save_messages([new], {})
            again += await repository.save_messages([new], {})
    finally:
        repository.close()
    rows = database.execute("SELECT content, nonce FROM messages ORDER BY id")
    assert rows == [(new.content, new.nonce) for new in batch + alone]
    assert [result.message for result in again] == [result.message for result in results]
    assert all(result.repeated for result in again)


async def test_query_that_is_cut_off_by_the_end_does_not_connect_again(config, database):
    repository = Repository(config)
    await repository.newest_ids([1])  # the connection is there
    with contextlib.closing(psycopg2.connect(database.url)) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE messages")
        query = asyncio.create_task(repository.newest_ids([1]))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        await until(lambda: database.execute(waiting) == [(1,)])
        repository.close()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(query, config.db_timeout / 2)
    await until(lambda: database.execute(_CONNECTED) == [(0,)])


async def test_altered_table_is_read_by_connections_that_knew_it_before(config, database):
    """Their prepared statements do not fit any more."""
    database.insert("first")
    repository = Repository(config)
    try:
        assert len(await repository.load_last_messages(1, MAX_BIGINT, 51)) == 1
        database.execute("ALTER TABLE messages ALTER content TYPE varchar(9000)")
        assert len(await repository.load_last_messages(1, MAX_BIGINT, 51)) == 1
    finally:
        repository.close()
