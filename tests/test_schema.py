"""schema.sql: idempotent, and an upgrade of the original's tables that loses nothing."""

import asyncio
import contextlib
import dataclasses
import re
import uuid

import aiohttp
import psycopg2
import pytest

from tests.faults import in_thread
from tests.support import SEED_DDL, psql, until
from tollerchat.database import apply_schema, read_schema


@pytest.fixture
def seed(database):
    """An empty database with the original's tables and no more."""
    database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    database.execute(SEED_DDL)
    database.execute("INSERT INTO users (username) VALUES ('alice'), ('bob')")
    database.execute("INSERT INTO channels (name) VALUES ('open'), ('closed')")
    return database


def column_types(database):
    return dict(
        database.execute(
            """SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute
            WHERE attrelid = 'messages'::regclass AND attnum > 0 AND NOT attisdropped"""
        )
    )


def test_schema_may_be_applied_again_and_again(database):
    database.insert("kept")
    for _ in range(3):
        database.execute(read_schema())
    assert database.contents() == ["kept"]


def test_upgrade_widens_ids_and_times(seed):
    seed.execute("SET TIME ZONE 'America/New_York'")  # whatever the zone, the original's times are UTC
    seed.execute(
        "INSERT INTO messages (channel_id, user_id, content, created_at) VALUES (1, 1, 'old', '2024-05-06 07:08:09')"
    )
    seed.execute(read_schema())
    types = column_types(seed)
    assert types["id"] == "bigint"
    assert types["created_at"] == "timestamp with time zone"
    assert types["nonce"] == "text"
    ((created_at,),) = seed.execute("SELECT created_at AT TIME ZONE 'UTC' FROM messages")
    assert str(created_at) == "2024-05-06 07:08:09"
    assert seed.execute("SELECT data_type FROM pg_sequences WHERE sequencename = 'messages_id_seq'") == [
        ("bigint",)
    ]


def test_channels_that_had_members_become_private(seed):
    seed.execute("INSERT INTO channel_users (user_id, channel_id) VALUES (1, 2)")
    seed.execute(read_schema())
    assert seed.execute("SELECT id, is_private FROM channels ORDER BY id") == [(1, False), (2, True)]
    seed.execute("INSERT INTO channel_users (user_id, channel_id) VALUES (1, 1)")
    seed.execute(read_schema())
    assert seed.execute("SELECT is_private FROM channels WHERE id = 1") == [(False,)]


def test_long_messages_are_not_compressed_unless_somebody_wants_it(seed):
    seed.execute("DROP TABLE messages CASCADE")
    seed.execute(read_schema())
    long = "INSERT INTO messages (channel_id, user_id, content) VALUES (1, 1, repeat('x', 8000))"
    seed.execute(long)
    seed.execute("ALTER TABLE messages RESET (toast_tuple_target)")
    seed.execute(read_schema())
    seed.execute(long)
    compressed = seed.execute("SELECT pg_column_compression(content) IS NOT NULL FROM messages ORDER BY id")
    assert compressed == [(False,), (True,)]
    assert seed.execute("SELECT sum(length(content)) FROM messages") == [(16000,)]


async def test_rows_without_user_or_time_are_readable(database, serve, config):
    """The original's columns are nullable, so there may be such rows."""
    database.execute("INSERT INTO messages (channel_id, content, created_at) VALUES (1, 'bare', NULL)")
    server = await serve(config)
    frame = await (await server.connect(1)).receive()
    assert (frame["content"], frame["user_id"], frame["created_at"][:4]) == ("bare", 0, "1970")


@pytest.mark.parametrize(
    ("time", "told"),
    [
        ("infinity", "9999-12-31T23:59:59.999999Z"),
        ("12026-01-01 00:00+00", "9999-12-31T23:59:59.999999Z"),
        ("0044-03-15 12:00+00 BC", "0001-01-01T00:00:00.000000Z"),
        ("-infinity", "0001-01-01T00:00:00.000000Z"),
        ("2024-05-06 07:08:09+02", "2024-05-06T05:08:09.000000Z"),
        (None, "1970-01-01T00:00:00.000000Z"),
    ],
)
async def test_times_that_rfc_3339_has_not_are_told_as_the_nearest_that_it_has(server, database, time, told):
    sql = (
        "INSERT INTO messages (channel_id, user_id, content, nonce, created_at) VALUES (1, 1, 'old', 'n', %s)"
    )
    database.execute(sql, time)
    alice, (message,) = await server.join(1)
    await alice.send("old", nonce="n")
    assert message["created_at"] == (await alice.receive())["created_at"] == told


def test_ids_ascend_in_commit_order_whoever_writes(database):
    """A transaction that took its id first but commits last gets a new one."""
    sql = "INSERT INTO messages (channel_id, user_id, content) VALUES (1, 1, %s) RETURNING id"
    ((early_id,),) = database.execute("SELECT nextval('messages_id_seq')")
    psql(database.url, sql, "committed first")
    database.execute(
        "INSERT INTO messages (id, channel_id, user_id, content) VALUES (%s, 1, 1, 'late')", early_id
    )
    assert database.contents() == ["committed first", "late"]


def test_two_transactions_of_one_channel_wait_for_each_other(database):
    sql = "INSERT INTO messages (channel_id, user_id, content) VALUES (%s, 1, 'x')"
    with contextlib.closing(psycopg2.connect(database.url)) as slow, slow.cursor() as cursor:
        cursor.execute(sql, (1,))
        database.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            database.execute(sql, 1)
        database.execute(sql, 2)
        slow.rollback()
    database.execute(sql, 1)


def test_sequence_that_hands_out_ids_in_lots_is_mended(database):
    """Two servers would each have ids of their own to give, and the order would be lost."""
    database.execute("ALTER SEQUENCE messages_id_seq CACHE 20 INCREMENT 5 CYCLE")
    database.execute(read_schema())
    assert database.execute(
        "SELECT cache_size, increment_by, cycle FROM pg_sequences WHERE sequencename = 'messages_id_seq'"
    ) == [(1, 1, False)]


async def test_rows_that_brought_their_ids_do_not_hide_what_is_new(database, serve, config):
    database.execute(
        "SET session_replication_role = replica;"  # no triggers, as in a restore
        "INSERT INTO messages (id, channel_id, user_id, content) VALUES (1000, 1, 1, 'restored');"
        "RESET session_replication_role"
    )
    database.execute(read_schema())
    server = await serve(config)
    bob, history = await server.join(2)
    assert [frame["message_id"] for frame in history] == [1000]
    assert database.insert("new") > [1000]
    assert (await bob.receive())["content"] == "new"


OLD_TRIGGER = """
    CREATE FUNCTION tollerchat_messages_inserted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER tollerchat_messages_inserted AFTER INSERT ON messages
        FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_messages_inserted()"""


@pytest.mark.parametrize("version", ["", OLD_TRIGGER], ids=["again", "upgrade"])
@pytest.mark.parametrize(
    "first",
    [
        "SELECT max(id) FROM messages",
        "INSERT INTO channels (name) VALUES ('new')",
        "DELETE FROM channel_users",
    ],
)
async def test_schema_can_be_applied_while_others_are_at_work(database, first, version):
    """It waits, if it must, but nobody waits for it, and nobody ends in a deadlock."""
    database.execute(version or "SELECT 1")
    with contextlib.closing(psycopg2.connect(database.url)) as other, other.cursor() as cursor:
        cursor.execute(first)
        applying = asyncio.ensure_future(in_thread(psql, database.url, read_schema()))
        trying = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'messages'::regclass"
        sleeping = (
            "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        )
        await until(lambda: applying.done() or database.execute(trying) or database.execute(sleeping))
        database.execute(
            "SET statement_timeout = '2s'; INSERT INTO messages (channel_id, content) VALUES (1, '')"
        )
        cursor.execute("INSERT INTO messages (channel_id, content) VALUES (1, '')")
        other.commit()
    await applying


def test_schema_can_be_applied_by_one_who_does_not_own_the_users(database):
    role = f"role_{uuid.uuid4().hex}"
    database.execute(f"CREATE ROLE {role} LOGIN; GRANT ALL ON SCHEMA public TO {role}")
    database.execute(f"GRANT SELECT, REFERENCES, TRIGGER ON users TO {role}")
    try:
        for table in ("messages", "channels", "channel_users", "tollerchat_servers"):
            database.execute(f"ALTER TABLE IF EXISTS {table} OWNER TO {role}")
        for (function,) in database.execute("SELECT proname FROM pg_proc WHERE proname LIKE 'tollerchat%'"):
            database.execute(f"ALTER FUNCTION {function}() OWNER TO {role}")
        psql(re.sub("//[^@]*@", f"//{role}@", database.url), read_schema())
    finally:
        database.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_trigger_that_notified_of_what_servers_store_is_dropped(database):
    database.execute(
        """CREATE FUNCTION tollerchat_messages_inserted() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN RAISE ''it is there yet''; END';
        CREATE TRIGGER tollerchat_messages_inserted AFTER INSERT ON messages
            FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_messages_inserted()"""
    )
    database.execute(read_schema())
    database.insert("text")


def test_sequence_that_is_ahead_of_the_rows_stays_there(database):
    gone = database.insert("gone")
    database.execute("DELETE FROM messages")
    database.execute(read_schema())
    assert database.insert("new") > gone


@pytest.mark.parametrize("kind", ["int", "bigint"])
async def test_tables_that_an_application_has_are_taken_also_in_a_schema_beside_others(
    database, serve, config, kind
):
    """What README says of users, channels, and a table `messages` that is something else."""
    database.execute(
        f"""DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE SCHEMA chat;
        CREATE TABLE public.messages (subject text);
        CREATE TABLE chat.users (id {kind} GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text);
        CREATE TABLE chat.channels (id {kind} GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text)"""
    )
    config = dataclasses.replace(config, db_url=f"{config.db_url}&options=-csearch_path%3Dchat")
    apply_schema(config.db_url)
    database.execute(
        """INSERT INTO chat.users (email) VALUES ('alice@chat.example'), ('bob@chat.example');
        INSERT INTO chat.channels (title) VALUES ('general');
        INSERT INTO chat.channels (title, is_private) VALUES ('team', true)"""
    )
    server = await serve(config)
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("hello")
    assert await bob.receive_contents(1) == ["hello"]
    # From elsewhere, without the chat's schema in its path.
    database.execute("INSERT INTO chat.messages (channel_id, user_id, content) VALUES (1, 1, 'a row')")
    assert await bob.receive_contents(1) == ["a row"]
    with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        await server.connect(1, 2)
    assert database.execute("SELECT * FROM public.messages") == []


def test_database_that_is_not_in_utf8_is_refused(database):
    """Its text could not be read back, or not be compared."""
    name = f"latin_{uuid.uuid4().hex}"
    database.execute(f"CREATE DATABASE {name} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(psycopg2.errors.RaiseException, match="it must be UTF8"):
            psql(re.sub(r"/\w+\?", f"/{name}?", database.url), read_schema())
    finally:
        database.execute(f"DROP DATABASE {name}")
