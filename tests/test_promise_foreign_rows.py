"""What anybody else writes into the tables goes live, in order and once; and who may not stay is closed."""

import asyncio
import contextlib
import dataclasses
import random
import time

import psycopg2
import pytest

from tests.checker import Log, check, rows_of
from tests.faults import Proxy, in_thread
from tests.raw_client import RawClient
from tests.support import SECRET, WAIT, Template, psql, until
from tollerchat import Config, bus
from tollerchat.app import hub_key, repository_key
from tollerchat.database import read_schema

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])


class Foreigner:
    """Another program, with a transaction that is open until `commit`."""

    def __init__(self, url, isolation_level=None):
        self._connection = psycopg2.connect(url)
        self.execute = self._connection.cursor().execute
        self._connection.set_session(isolation_level=isolation_level)
        self.commit = self._connection.commit
        self.rollback = self._connection.rollback
        self.close = self._connection.close

    def insert(self, *contents, channel_id=1):
        with self._connection.cursor() as cursor:
            for content in contents:
                cursor.execute(
                    "INSERT INTO messages (channel_id, user_id, content) VALUES (%s, 9, %s)",
                    (channel_id, content),
                )


@pytest.fixture
def foreigner(database):
    with contextlib.closing(Foreigner(database.url)) as foreigner:
        yield foreigner


async def joined(server, user_id=2, channel_id=1):
    """A client, and its log with all up to `ready`."""
    client, history = await server.join(user_id, channel_id)
    log = Log(f"user {user_id}", user_id, after=0)
    for frame in [*history, client.ready]:
        log.received(frame)
    return client, log


async def read_to(client, log, content):
    while log.events[-1][1].get("content") != content:
        log.received(await client.receive())
    log.complete = True


async def test_single_row_goes_live(server, database):
    bob, _ = await server.join(2)
    (message_id,) = database.insert("from psql")
    frame = await bob.receive()
    assert (frame["message_id"], frame["content"], frame["user_id"]) == (message_id, "from psql", 9)
    assert [frame["created_at"]] == [row.created_at for row in rows_of(database.url)]
    assert await bob.settled() == []


async def test_many_rows_of_many_channels_in_one_statement_go_live(server, database):
    (here, here_log), (there, there_log) = await joined(server, 2, 1), await joined(server, 2, 2)
    database.execute(
        """INSERT INTO messages (channel_id, user_id, content)
        SELECT 1 + n %% 2, 9, 'row ' || n FROM generate_series(1, %s) AS n""", 1000
    )  # fmt: skip
    await read_to(here, here_log, "row 1000")
    await read_to(there, there_log, "row 999")
    assert check([here_log], rows_of(database.url, 1)) is None
    assert check([there_log], rows_of(database.url, 2)) is None


async def test_rows_of_hundreds_of_channels_in_one_statement_go_live(server, database):
    """More than one notification can tell."""
    database.execute("INSERT INTO channels (name) SELECT 'many' FROM generate_series(1, 900)")
    (last,) = database.execute("SELECT max(id) FROM channels")[0]
    clients = [await server.join(2, channel_id) for channel_id in (4, last // 2, last)]
    database.execute(
        "INSERT INTO messages (channel_id, user_id, content) SELECT id, 9, 'hello' FROM channels"
    )
    for client, _ in clients:
        assert (await client.receive())["content"] == "hello"


async def test_rows_are_seen_when_they_are_committed_and_not_before(server, database, foreigner):
    bob, log = await joined(server)
    foreigner.insert("one", "two")
    assert await bob.settled() == []
    foreigner.commit()
    await read_to(bob, log, "two")
    foreigner.insert("never")
    foreigner.rollback()
    database.insert("three")
    await read_to(bob, log, "three")
    assert check([log], rows_of(database.url)) is None


async def test_transaction_that_commits_late_keeps_the_order_for_all(server, database, foreigner):
    """Ids are given before a commit; all the same, no id comes after a greater one that was seen before."""
    (alice, alice_log), (bob, bob_log) = await joined(server, 1), await joined(server, 2)
    for n in range(5):
        foreigner.insert(f"slow {n}")
        frame = {"type": "message", "content": f"meanwhile {n}", "nonce": f"{n}"}
        alice_log.sent(frame)
        await alice.send_frame(frame)
        await alice.send_frame({"type": "unknown"})
        while alice_log.events[-1][1]["type"] != "error":
            alice_log.received(await alice.receive())
        foreigner.insert(f"slow {n} too")
        foreigner.commit()
        await read_to(bob, bob_log, f"meanwhile {n}")
    database.insert("the end")
    await read_to(alice, alice_log, "the end")
    await read_to(bob, bob_log, "the end")
    assert check([alice_log, bob_log], rows_of(database.url)) is None
    assert len(rows_of(database.url)) == 16


async def waiting_for_a_lock(database):
    sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
    await until(lambda: database.execute(sql))


async def test_transaction_with_an_old_snapshot_keeps_the_order(server, database, foreigner):
    """Its id is from before the lock, and it does not see what was committed meanwhile."""
    bob, log = await joined(server)
    foreigner.insert("one")  # holds the lock of the channel
    with contextlib.closing(Foreigner(database.url, isolation_level="REPEATABLE READ")) as late:
        inserting = asyncio.ensure_future(in_thread(late.insert, "two"))
        await waiting_for_a_lock(database)
        foreigner.insert("one more")
        foreigner.commit()
        await inserting
        await read_to(bob, log, "one more")
        late.commit()
    await read_to(bob, log, "two")
    assert check([log], rows_of(database.url)) is None


async def test_order_does_not_depend_on_the_databases_default_isolation(serve, config, database, foreigner):
    database.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable',"
        " current_database()); END $$"
    )
    server = await serve(config)
    (alice, alice_log), (bob, bob_log) = await joined(server, 1), await joined(server, 2)
    for content in ("connects", "after"):
        alice_log.sent({"type": "message", "content": content})
    await alice.send("connects")
    alice_log.received(await alice.receive())
    foreigner.insert("before")  # holds the lock of the channel
    await alice.send("after")
    await waiting_for_a_lock(database)
    foreigner.commit()
    await read_to(bob, bob_log, "after")
    await read_to(alice, alice_log, "before")
    rows = rows_of(database.url)
    assert [row.content for row in rows] == ["connects", "before", "after"]
    assert check([alice_log, bob_log], rows) is None


async def test_rows_with_ids_of_their_own_choice_go_live_in_order(server, database):
    (alice, _), (bob, log) = await joined(server, 1), await joined(server, 2)
    for message_id in (1000, 1, 1001):
        database.execute(
            "INSERT INTO messages (id, channel_id, user_id, content) VALUES (%s, 1, 9, %s)",
            message_id,
            f"chosen {message_id}",
        )
        await alice.send(f"after {message_id}")
    await read_to(bob, log, "after 1001")
    assert check([log], rows_of(database.url)) is None
    assert len(rows_of(database.url)) == 6


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO messages (channel_id, user_id, content) VALUES (NULL, 9, 'of no channel')",
        "NOTIFY tollerchat",
        "NOTIFY tollerchat, 'grown 1:x'",
        "NOTIFY tollerchat, 'grown 1:9223372036854775808'",
        "NOTIFY tollerchat, 'deleted'",
        "NOTIFY tollerchat, 'unheard of'",
    ],
)
async def test_notifications_that_say_nothing_do_no_harm(server, database, sql):
    bob, _ = await server.join(2)
    database.execute(sql)
    database.insert("goes live")
    assert (await asyncio.wait_for(bob.receive(), bus.PROBE_INTERVAL / 2))["content"] == "goes live"


async def test_others_write_into_a_channel_that_the_server_writes_to(server, database):
    (alice, alice_log), (bob, bob_log) = await joined(server, 1), await joined(server, 2)
    rows = [[f"{name} {n}" for n in range(100)] for name in "xyz"]
    writing = asyncio.gather(
        *(in_thread(lambda contents=contents: [psql(database.url, INSERT, content) for content in contents])
          for contents in rows)
    )  # fmt: skip

    async def listen(client, log):
        while log.events[-1][1].get("content") != "the end":
            log.received(await client.receive())

    listening = asyncio.gather(listen(alice, alice_log), listen(bob, bob_log))
    n = 0
    while not writing.done():
        frame = {"type": "message", "content": f"alice {n}", "nonce": f"{n}"}
        alice_log.sent(frame)
        await alice.send_frame(frame)
        n += 1
        await asyncio.sleep(0.002)
    await writing
    await until(lambda: len(database.contents()) == 300 + n)
    database.insert("the end")
    await asyncio.wait_for(listening, WAIT)
    alice_log.complete = bob_log.complete = True
    assert check([alice_log, bob_log], rows_of(database.url)) is None


INSERT = "INSERT INTO messages (channel_id, user_id, content) VALUES (1, 9, %s)"


async def test_channel_locked_by_another_program_delays_no_other_channel(server, foreigner):
    (alice, _), (carol, _) = await server.join(1, 1), await server.join(3, 2)
    foreigner.insert("holds the lock of channel 1")
    for n in range(3):
        await alice.send("waits", nonce=f"a{n}")
        start = time.monotonic()
        await carol.send("does not", nonce=f"c{n}")
        assert (await carol.receive())["type"] == "ack"
        assert time.monotonic() - start < (1.0 if n == 0 else 0.8)
    foreigner.commit()
    kinds = [(await alice.receive())["type"] for _ in range(4)]
    assert kinds == ["message", "ack", "ack", "ack"]


@pytest.fixture
async def unheard(server, database, monkeypatch):
    """Alice and Bob are in a channel to which another program has written, and nothing tells of it."""
    (alice, _), (bob, _) = await server.join(1), await server.join(2)
    monkeypatch.setattr(server.app[hub_key], "hint", lambda channel_id, message_id: None)
    database.insert("unheard")
    return alice, bob


async def test_acks_come_behind_what_is_before_them_in_the_log(unheard):
    alice, bob = unheard
    await alice.send("a", nonce="a")
    await alice.send("b", nonce="b")
    frames = [await alice.receive() for _ in range(3)]
    assert [frame.get("content", frame.get("nonce")) for frame in frames] == ["unheard", "a", "b"]
    ids = [frame["message_id"] for frame in frames]
    assert ids == sorted(ids)
    assert await bob.receive_contents(3) == ["unheard", "a", "b"]


async def test_refusal_without_a_nonce_comes_behind_the_acks_of_what_was_sent_before(unheard, database):
    """Only the order tells which message it is of."""
    alice, _ = unheard
    database.execute("ALTER TABLE messages ADD CHECK (content <> 'bad')")
    await alice.send("good")
    await alice.send("bad")
    assert [(await alice.receive())["type"] for _ in range(3)] == ["message", "ack", "error"]


@pytest.fixture
def may_read(server, monkeypatch):
    """Until this event is set, nothing is read from the log."""
    repository = server.app[repository_key]
    load_messages_after, may_read = repository.load_messages_after, asyncio.Event()

    async def load_late(*arguments):
        await may_read.wait()
        return await load_messages_after(*arguments)

    monkeypatch.setattr(repository, "load_messages_after", load_late)
    return may_read


async def test_refusal_with_a_nonce_does_not_wait_for_acks_while_the_log_cannot_be_read(unheard, may_read):
    alice, _ = unheard
    await alice.send("first", nonce="n")
    await alice.send("other content", nonce="n")
    assert (await alice.receive())["code"] == "nonce_conflict"
    may_read.set()
    assert [(await alice.receive())["type"] for _ in range(2)] == ["message", "ack"]


async def test_ack_of_what_was_deleted_before_it_was_read_comes_all_the_same(database, unheard, may_read):
    alice, bob = unheard
    await alice.send("deleted", nonce="n")
    await until(lambda: database.contents() == ["unheard", "deleted"])
    database.execute("DELETE FROM messages WHERE content = 'deleted'")
    may_read.set()
    assert [(await alice.receive())["type"] for _ in range(2)] == ["message", "ack"]
    await bob.send("next")
    assert (await alice.receive())["content"] == "next"


@pytest.mark.parametrize(
    "lock",
    [
        "INSERT INTO messages (channel_id, user_id, content) SELECT n, 9, 'imported' FROM generate_series(4, 40) AS n",
        "SELECT FROM channels WHERE id > 3 FOR UPDATE",
        "SELECT FROM users WHERE id = 1 FOR UPDATE",
    ],
    ids=["import", "channels", "user"],
)
async def test_many_locked_channels_delay_the_others_little(server, database, foreigner, lock):
    database.execute("INSERT INTO channels (name) SELECT 'busy' FROM generate_series(4, 40)")
    foreigner.execute(lock)
    busy = [(await server.join(1, channel_id))[0] for channel_id in range(4, 41)]
    carol, _ = await server.join(3, 2)
    await asyncio.gather(*(client.send("waits", nonce="n") for client in busy))
    for n in range(10):
        start = time.monotonic()
        await carol.send("does not", nonce=f"c{n}")
        assert (await carol.receive())["type"] == "ack"
        assert time.monotonic() - start < 1.0
    foreigner.commit()
    for client in busy:
        while (frame := await client.receive())["type"] == "message":
            assert frame["content"] == "imported"
        assert frame["type"] == "ack"


async def test_locked_user_does_not_keep_the_others_of_the_channel_waiting(server, foreigner):
    """By a long transaction that deletes the user, say."""
    (alice, _), (bob, _), (carol, log) = await server.join(1), await server.join(2), await joined(server, 3)
    foreigner.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
    for n in range(3):
        await alice.send(f"waits {n}", nonce=f"a{n}")
        for word in ("first", "second"):
            start = time.monotonic()
            await bob.send(f"{word} {n}")
            while (await bob.receive())["type"] != "ack":
                pass
            assert time.monotonic() - start < 2.0
    foreigner.commit()
    acks = [frame["nonce"] for frame in await alice.receive_many(9) if frame["type"] == "ack"]
    assert acks == ["a0", "a1", "a2"]
    await read_to(carol, log, "waits 2")
    contents = [frame["content"] for _, frame in log.events if frame["type"] == "message"]
    assert contents == [f"{word} {n}" for n in range(3) for word in ("first", "second")] + [
        f"waits {n}" for n in range(3)
    ]


async def test_message_that_an_index_cannot_take_is_refused_alone(server, database):
    database.execute("CREATE INDEX ON messages (content)")
    (alice, _), (carol, _) = await server.join(1, 1), await server.join(3, 1)
    start = time.monotonic()
    await asyncio.gather(
        alice.send(random.Random(1).randbytes(3500).hex(), nonce="a"), carol.send("short", nonce="c")
    )
    frame = await alice.receive()
    while frame["type"] == "message":
        frame = await alice.receive()
    assert (frame["code"], frame["nonce"]) == ("invalid_content", "a")
    assert (await carol.receive())["type"] == "ack"
    assert time.monotonic() - start < 2


async def test_encoding_of_the_text_does_not_depend_on_the_databases_default(serve, config, database):
    database.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET client_encoding = latin1', current_database()); END $$"
    )
    server = await serve(config)
    alice, _ = await server.join(1)
    bob, _ = await server.join(2)
    await alice.send("€ 😀")
    assert (await alice.receive())["type"] == "ack"
    assert (await bob.receive())["content"] == "€ 😀"
    _, history = await server.join(2)
    assert history[0]["content"] == "€ 😀"


async def test_batch_that_the_database_refuses_in_part_leaves_no_gap(server, database):
    """Its messages are stored in several transactions then, and others write in between."""
    database.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.content LIKE 'bad%' THEN RAISE EXCEPTION 'refused'; END IF;
            PERFORM pg_sleep(0.001);
            RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION refuse()"""
    )
    (alice, alice_log), (bob, bob_log) = await joined(server, 1), await joined(server, 2)
    writing = asyncio.ensure_future(
        in_thread(lambda: [psql(database.url, INSERT, f"foreign {n}") for n in range(60)])
    )
    answers, n = 0, 0
    while not writing.done():
        for n in range(n, n + 30):  # noqa: B020
            frame = {"type": "message", "content": f"{'bad' if n % 7 == 3 else 'good'} {n}"}  # fmt: skip
            alice_log.sent(frame)
            await alice.send_frame(frame)
            answers += 1
        while answers:
            frame = await alice.receive()
            alice_log.received(frame)
            answers -= frame["type"] in ("ack", "error")
        n += 1
    await writing
    database.insert("the end")
    await read_to(alice, alice_log, "the end")
    await read_to(bob, bob_log, "the end")
    assert check([alice_log, bob_log], rows_of(database.url)) is None
    assert not any(content.startswith("bad") for content in database.contents())


async def test_rows_are_found_after_the_listening_connection_was_terminated(server, database):
    bob, log = await joined(server)
    listening = "FROM pg_stat_activity WHERE datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE classid = 1953459309)"
    for n in range(2):
        await until(lambda: database.execute(f"SELECT 1 {listening}"))
        database.execute(f"SELECT pg_terminate_backend(pid) {listening}")
        database.insert(f"while nobody listens {n}")
        await read_to(bob, log, f"while nobody listens {n}")
    assert check([log], rows_of(database.url)) is None


async def test_rows_are_heard_of_where_the_database_is_read_only_by_default(serve, config, database):
    """As while it is maintained: others may write all the same."""
    database.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on',"
        " current_database()); END $$"
    )
    server = await serve(config)
    bob, log = await joined(server)
    await until(lambda: server.app[hub_key].access.remembers)
    start = time.monotonic()
    database.insert("by one who was there before")
    await read_to(bob, log, "by one who was there before")
    assert time.monotonic() - start < bus.PROBE_INTERVAL - 1
    assert check([log], rows_of(database.url)) is None


async def test_row_of_a_channel_that_cannot_be_is_refused_at_once(server, database):
    for channel_id in (-1, 0):
        with pytest.raises(psycopg2.errors.ForeignKeyViolation):
            database.execute(
                f"SET statement_timeout = '5s'; INSERT INTO messages (channel_id, content) VALUES ({channel_id}, '')"
            )


async def test_rows_that_nothing_told_are_found_by_comparison(serve, config, database, monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.2)
    server = await serve(config)
    bob, log = await joined(server)
    database.execute("SET tollerchat.writer = 'on'")  # the servers tell of their own
    database.insert("silent", "as the grave")
    await read_to(bob, log, "as the grave")
    assert check([log], rows_of(database.url)) is None


@pytest.fixture
def short_probes(monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.3)


@pytest.fixture
async def proxy(database):
    async with Proxy(database.url) as proxy:
        yield proxy


@pytest.fixture
async def proxied(serve, proxy):
    return await serve(Config(db_url=proxy.url, jwt_secret=SECRET, db_timeout=0.7))


@pytest.mark.usefixtures("short_probes")
async def test_rows_are_found_though_the_listening_connection_fell_silent(proxied, proxy, database):
    """Within the time until the next probe, the one that it waits for, and the one until the next attempt."""
    bob, log = await joined(proxied)
    for n in range(2):
        database.insert(f"heard {n}")
        await read_to(bob, log, f"heard {n}")
        proxy.mute("LISTEN")
        start = time.monotonic()
        database.insert(f"unheard {n}")
        await read_to(bob, log, f"unheard {n}")
        assert time.monotonic() - start < 0.3 + 0.7 + bus.RETRY_DELAY + 1  # of work, on a busy machine
    assert check([log], rows_of(database.url)) is None


@pytest.mark.usefixtures("short_probes")
@pytest.mark.parametrize("fault", ["cut", "silent"])
async def test_access_withdrawn_while_nobody_listens_closes_with_4403_after_that(
    proxied, proxy, database, fault
):
    stays, goes = await proxied.join(1, 3), await proxied.join(2, 3)
    proxy.down = True
    if fault == "silent":
        proxy.mute("LISTEN")
    else:
        database.execute(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE classid = 1953459309)"
        )
    database.execute("DELETE FROM channel_users WHERE user_id = 2")
    assert await goes[0].settled() == []
    proxy.down = False
    assert await goes[0].closed() == 4403
    assert await stays[0].settled() == []


async def test_deleted_channel_closes_with_4404(server, database):
    alice, other = await server.join(1, 1), await server.join(1, 2)
    database.execute("DELETE FROM channels WHERE id = 1")
    assert await alice[0].closed() == 4404
    assert await other[0].settled() == []


async def test_message_to_a_deleted_channel_is_refused_and_the_rest_of_its_batch_is_not(
    server, database, monkeypatch
):
    (alice, _), (carol, _) = await server.join(1, 1), await server.join(3, 2)
    monkeypatch.setattr(server.app[hub_key], "channel_deleted", lambda channel_id: None)  # it finds out late
    database.execute("DELETE FROM channels WHERE id = 1")
    await asyncio.gather(alice.send("too late", nonce="a"), carol.send("in time", nonce="c"))
    frame = await alice.receive()
    assert (frame["type"], frame["code"], frame["nonce"]) == ("error", "not_found", "a")
    assert (await carol.receive())["type"] == "ack"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM channel_users WHERE user_id = 2",
        "UPDATE channel_users SET channel_id = 1 WHERE user_id = 2",
        "DELETE FROM users WHERE id = 2",
    ],
)
async def test_withdrawn_access_closes_with_4403(server, database, sql):
    stays, goes = await server.join(1, 3), await server.join(2, 3)
    database.execute(sql)
    assert await goes[0].closed() == 4403
    assert await stays[0].settled() == []


async def test_what_was_withdrawn_while_nobody_listened_is_found(server, database):
    gone, member = await server.join(1, 1), await server.join(2, 3)
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE classid = 1953459309)"
    )
    database.execute("DELETE FROM channels WHERE id = 1")
    database.execute("DELETE FROM channel_users WHERE user_id = 2")
    assert await gone[0].closed() == 4404
    assert await member[0].closed() == 4403


async def test_truncation_closes_with_1001_and_ids_may_start_again(server, database):
    await until(lambda: server.app[hub_key].access.remembers)  # it listens
    database.insert("old", "older")
    bob, _ = await server.join(2)
    database.execute("TRUNCATE messages RESTART IDENTITY")
    assert await bob.closed() == 1001
    alice, history = await server.join(1)
    bob, missed = await server.join(2, after=2)
    assert (history, missed) == ([], [])
    await alice.send("new", nonce="n")
    assert (await bob.receive())["message_id"] == 1


async def test_truncation_while_nobody_listened_is_found(serve, config, database):
    """Else what is new would have ids that all have passed, and reach nobody."""
    async with Proxy(database.url) as proxy:
        server = await serve(dataclasses.replace(config, db_url=proxy.url))
        await until(lambda: server.app[hub_key].access.remembers)  # it listens
        alice, _ = await server.join(1)
        await alice.send("old", nonce="old")
        assert (await alice.receive())["message_id"] == 1
        proxy.down = True
        await proxy.cut()
        await until(lambda: not server.app[hub_key].access.remembers)
        database.execute("TRUNCATE messages RESTART IDENTITY")
        proxy.down = False
        assert await alice.closed() == 1001
        (alice, _), (bob, history) = await server.join(1), await server.join(2)
        assert history == []
        await alice.send("new", nonce="new")
        assert (await alice.receive())["message_id"] == 1
        assert (await bob.receive())["content"] == "new"


async def test_truncation_that_was_not_heard_of_is_found_whatever_follows(server, database):
    """Else those new ids that have been passed before would reach nobody."""
    await until(lambda: server.app[hub_key].access.remembers)  # it listens
    old = database.insert("old", "older", "oldest")
    bob, _ = await server.join(2)
    database.execute("ALTER TABLE messages DISABLE TRIGGER tollerchat_truncated")
    database.execute("TRUNCATE messages RESTART IDENTITY")
    assert max(database.insert("new", "newer", "newest", "the one behind")) > max(old)
    await server.app[hub_key].compare_with_log()
    assert await bob.closed() == 1001
    _, history = await server.join(2)
    assert [frame["content"] for frame in history] == ["new", "newer", "newest", "the one behind"]


@pytest.mark.parametrize("found_by_comparison", [False, True])
async def test_truncation_closes_only_once(server, database, monkeypatch, found_by_comparison):
    hub = server.app[hub_key]
    await until(lambda: hub.access.remembers)  # it listens
    early, _ = await server.join(1)
    hold, heard, resync = asyncio.Event(), asyncio.Event(), hub.resync

    async def resync_later():
        await hold.wait()
        await resync()
        heard.set()

    monkeypatch.setattr(hub, "resync", resync_later)  # the notification is slow
    if not found_by_comparison:
        hold.set()
    database.execute("TRUNCATE messages RESTART IDENTITY")
    if found_by_comparison:
        await hub.compare_with_log()
    assert await early.closed() == 1001
    bob, _ = await server.join(2)
    hold.set()
    await asyncio.wait_for(heard.wait(), WAIT)
    await resync()
    (new,) = database.insert("new")
    assert (await bob.receive())["message_id"] == new


async def test_stale_answer_about_ids_closes_nobody_again(server, database, monkeypatch):
    """Somebody asks before the truncation, and learns it after others know."""
    hub, repository = server.app[hub_key], server.app[repository_key]
    await until(lambda: hub.access.remembers)  # it listens
    early, _ = await server.join(1)
    read, asked, hold = repository._read, asyncio.Event(), asyncio.Event()

    async def read_slowly(sql, parameters):
        rows = await read(sql, parameters)
        if not asked.is_set():
            asked.set()
            await hold.wait()
        return rows

    monkeypatch.setattr(repository, "_read", read_slowly)
    comparing = [asyncio.ensure_future(hub.compare_with_log()) for _ in range(2)]
    await asyncio.wait_for(asked.wait(), WAIT)
    database.execute("TRUNCATE messages RESTART IDENTITY")
    asyncio.get_running_loop().call_later(0.2, hold.set)
    await asyncio.gather(*comparing)
    assert await early.closed() == 1001
    bob, _ = await server.join(2)
    await hub.resync()
    (new,) = database.insert("new")
    assert (await bob.receive())["message_id"] == new


async def go_back(database, alice, bob):
    """The database forgets what Alice has told Bob, and gives the ids again."""
    for n in range(3):
        await alice.send(f"lost {n}")
        assert (await alice.receive())["type"] == "ack"
        assert (await bob.receive())["content"] == f"lost {n}"
    database.execute("DELETE FROM messages; SELECT setval('messages_id_seq', 1)")


@pytest.mark.parametrize("listens_only", [False, True])
async def test_database_that_goes_back_to_an_earlier_state_is_found(serve, config, database, listens_only):
    """After a failover to a standby that was behind: new messages would have ids that all have passed."""
    writes = await serve(config)
    server = await serve(config) if listens_only else writes
    (alice, _), (bob, _) = await writes.join(1), await server.join(2)
    await go_back(database, alice, bob)
    for each in (writes, server):
        await each.app[hub_key].compare_with_log()
    assert [await each.closed() for each in (alice, bob)] == [1001, 1001]
    (alice, _), (bob, history) = await writes.join(1), await server.join(2)
    assert history == []
    await server.app[hub_key].compare_with_log()
    await alice.send("new")
    assert (await bob.receive())["content"] == "new"


async def test_message_that_gets_an_id_from_before_tells_that_ids_went_back(server, database):
    (alice, _), (bob, _) = await server.join(1), await server.join(2)
    await go_back(database, alice, bob)
    await alice.send("new")
    assert await bob.closed() == 1001
    _, history = await server.join(2)
    assert [frame["content"] for frame in history] == ["new"]


@pytest.mark.parametrize("by", ["a stranger", "this server, before all left once"])
async def test_database_that_goes_back_behind_what_a_room_has_only_read_is_found(server, database, by):
    if by == "a stranger":
        database.insert("lost", "lost, too")
    else:
        alice, _ = await server.join(1)
        for content in ("lost", "lost, too"):
            await alice.send(content)
            assert (await alice.receive())["type"] == "ack"
        await alice.socket.close()
        await until(lambda: not server.app[hub_key].rooms)
    (alice, _), (bob, history) = await server.join(1), await server.join(2)
    assert len(history) == 2
    database.execute("DELETE FROM messages; SELECT setval('messages_id_seq', 1)")
    await alice.send("new")  # is told within a moment, not at the next comparison in due time
    assert await bob.closed() == 1001
    await until(lambda: database.contents() == ["new"])
    _, history = await server.join(2)
    assert [frame["content"] for frame in history] == ["new"]


@pytest.mark.parametrize("is_called", ["true", "false"])
async def test_sequence_that_is_set_to_where_it_is_closes_nobody(server, database, is_called):
    alice, _ = await server.join(1)
    await alice.send("first")
    assert (await alice.receive())["type"] == "ack"
    database.execute(f"SELECT setval('messages_id_seq', (SELECT max(id) + 1 FROM messages), {is_called})")
    await server.app[hub_key].compare_with_log()
    assert await alice.settled() == []


async def test_restored_row_with_a_greater_id_is_not_taken_for_the_present(server, database, caplog):
    """Its id is no sign that the sequence went back, also where its sender is told it again."""
    database.execute(
        "SET session_replication_role = replica;"  # no triggers, as in a restore
        "INSERT INTO messages (id, channel_id, user_id, content, nonce) VALUES (1000, 1, 1, 'restored', 'n');"
        "RESET session_replication_role"
    )
    alice, _ = await server.join(1)
    await alice.send("restored", nonce="n")
    assert (await alice.receive())["message_id"] == 1000
    await server.app[hub_key].compare_with_log()
    await alice.send("before that")
    assert (await alice.receive())["message_id"] < 1000
    hub = server.app[hub_key]
    await hub.compare_with_log()
    await until(lambda: not hub.compare_soon.is_set())
    await alice.send("before that, too")
    assert (await alice.receive())["message_id"] < 1000
    assert not hub.compare_soon.is_set()  # that was looked into
    assert await alice.settled() == []
    assert "run tollerchat init-db" in caplog.text


async def test_row_of_one_who_looks_for_tables_elsewhere_goes_live(server, database):
    bob, _ = await server.join(2)
    database.execute("SET search_path = ''")
    database.execute("INSERT INTO public.messages (channel_id, user_id, content) VALUES (1, 9, 'x')")
    assert (await bob.receive())["content"] == "x"


async def test_truncation_that_lets_ids_go_on_closes_nothing(server, database):
    await until(lambda: server.app[hub_key].access.remembers)  # it listens
    database.insert("old")
    bob, _ = await server.join(2)
    database.execute("TRUNCATE messages")
    database.insert("new")
    assert (await bob.receive())["content"] == "new"
    _, history = await server.join(1)
    assert [frame["content"] for frame in history] == ["new"]


async def test_schema_that_is_applied_again_closes_nothing(server, database):
    bob, _ = await server.join(2)
    database.execute(read_schema())
    await server.app[hub_key].resync()
    database.insert("new")
    assert (await bob.receive())["content"] == "new"


async def test_one_who_is_slow_to_leave_does_not_keep_what_was_truncated(server, database):
    """The room lives on meanwhile."""
    await until(lambda: server.app[hub_key].access.remembers)  # it listens
    database.insert("old", "older", "oldest")
    bob, _ = await server.join(2)
    with contextlib.closing(
        await RawClient.connect(server.port, 3)
    ) as slow:  # does not answer the close frame
        database.execute("TRUNCATE messages RESTART IDENTITY")
        assert await bob.closed() == 1001
        bob, history = await server.join(2)
        assert history == []
        slow.close()
        database.insert("new")
        assert (await bob.receive())["content"] == "new"


async def test_message_that_is_moved_leaves_one_channel_and_is_in_the_other(server, database):
    database.insert("one", channel_id=1)
    (message_id,) = database.insert("moved", channel_id=1)
    database.insert("two", channel_id=2)
    watchers = [await server.join(1, 1), await server.join(2, 2)]
    assert [len(history) for _, history in watchers] == [2, 1]
    database.execute("UPDATE messages SET channel_id = 2 WHERE id = %s", message_id)
    for channel_id, contents in ((1, ["one"]), (2, ["moved", "two"])):
        deadline = time.monotonic() + WAIT
        while [frame["content"] for frame in (await server.join(3, channel_id))[1]] != contents:
            assert time.monotonic() < deadline
