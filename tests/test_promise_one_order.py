"""All see the messages of a channel in one order, without gaps or duplicates, whoever joins, leaves and lags meanwhile."""

import asyncio
import contextlib
import random
import uuid

import psycopg2
import pytest

from tests.checker import Log, check, rows_of
from tests.faults import Stranger, running
from tests.raw_client import RawClient
from tests.soak import Talker, wind_up
from tests.support import SECRET, Template, until
from tollerchat import Config, bus
from tollerchat.app import hub_key, repository_key
from tollerchat.saving import SERVERS_KEY

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])


@pytest.fixture
async def process(database):
    async with running(database.url) as server:
        yield server


async def test_fifty_write_while_others_join_and_leave(process, session, database):
    writers = [Talker(session, process, f"w{n}", 1 + n % 7, pause=0.2 + n / 500) for n in range(50)]
    guests = [Talker(session, process, f"g{n}", 1 + n, pause=None, leave=0.05 + n / 50) for n in range(4)]
    logs, enough = [], asyncio.Event()
    newcomers = asyncio.ensure_future(join_over_and_over(process, logs, enough))
    try:
        await until(lambda: all(len(writer.acked) >= 6 for writer in writers))
        await until(lambda: len(logs) > 20 and all(len(guest.logs) > 3 for guest in guests))
        enough.set()
        await newcomers
        assert await wind_up([*writers, *guests], process, session, database.url) is None
        assert check(logs, rows_of(database.url)) is None
    finally:
        newcomers.cancel()
        await asyncio.gather(newcomers, return_exceptions=True)
        await asyncio.gather(*(talker.cancel() for talker in [*writers, *guests]))


async def join_over_and_over(process, logs, enough):
    """Join, say a word, and leave before or after it came through."""
    while not enough.is_set():
        log = Log(f"newcomer {len(logs)}", 8)
        logs.append(log)
        client = await RawClient.connect(process.port, 8, buffer=1 << 16)
        with contextlib.closing(client):
            word = {"type": "message", "content": log.name, "nonce": log.name}
            log.sent(word)
            await client.send(word)
            for _ in range(random.randrange(70)):
                if (frame := await client.frame()) is None:
                    break
                log.received(frame)


@pytest.mark.parametrize("joins", ["cold", "warm"])
async def test_history_and_live_meet_without_seam(process, session, database, joins):
    """Into an empty room, which must be loaded first, or one that others keep warm, while a stranger writes."""
    database.insert(*(f"old {n}" for n in range(60)))
    logs = []
    async with contextlib.AsyncExitStack() as stack:
        if joins == "warm":
            stack.enter_context(contextlib.closing(await RawClient.connect(process.port, 5, buffer=1 << 20)))
        await stack.enter_async_context(Stranger(database))
        while len(logs) < 30:
            log = Log(f"joiner {len(logs)}", 6)
            logs.append(log)
            client = await RawClient.connect(process.port, 6, buffer=1 << 16)
            with contextlib.closing(client):
                while not log.events or log.events[-1][1]["type"] != "ready":
                    log.received(await client.frame())
                for _ in range(3):
                    log.received(await client.frame())
    assert check(logs, rows_of(database.url)) is None


async def test_sender_that_lagged_does_not_get_its_own_messages(server, database):
    """It stops reading while it and others write more than its buffers hold, and so is caught up from the log."""
    bob, _ = await server.join(2)
    acks = 0

    async def listen():
        nonlocal acks
        while True:
            acks += (await bob.receive())["type"] == "ack"

    log = Log("alice", 1, after=0)
    listening = asyncio.ensure_future(listen())
    alice = await RawClient.connect(server.port, 1, after=0)
    with contextlib.closing(alice):
        room = server.app[hub_key].rooms[1]
        await until(lambda: len(room.audience.live) == 2)
        count = 0
        while len(room.audience.live) == 2:  # until the buffers are full, the kernel's too
            frame = {"type": "message", "content": f"own {count}", "nonce": f"own {count}"}
            log.sent(frame)
            await alice.send(frame)
            for n in range(20):
                await bob.send(f"{count} {n} {'x' * 8000}")
            count += 1
            await until(lambda: acks == count * 20)  # noqa: B023
            assert count < 100, "alice does not lag"
        for n in range(5):  # read when she is caught up, or before
            frame = {"type": "message", "content": f"late {n}", "nonce": f"late {n}"}
            log.sent(frame)
            await alice.send(frame)
            await bob.send(f"meanwhile {n}")
        while sum(frame["type"] == "ack" for _, frame in log.events) < count + 5:
            log.received(await alice.frame())
        await bob.send("the end")
        while log.events[-1][1].get("content") != "the end":
            log.received(await alice.frame())
        log.complete = True
    listening.cancel()
    await asyncio.wait([listening])
    assert check([log], rows_of(database.url)) is None


async def test_only_who_has_somebody_to_tell_announces_its_commits(serve, config, database, monkeypatch):
    """A server alone tells nobody, which costs nobody anything; and a second one is told from its first moment on."""
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 3600)  # nothing is found by comparison
    first = await serve(config)
    alice, _ = await first.join(1)
    with contextlib.closing(psycopg2.connect(database.url)) as stranger, stranger.cursor() as cursor:
        stranger.autocommit = True
        cursor.execute("LISTEN tollerchat")
        for n in range(20):
            await alice.send(f"alone {n}")
            assert (await alice.receive())["type"] == "ack"
        stranger.poll()
        assert stranger.notifies == []
        second = await serve(config)
        bob, _ = await second.join(2)
        await until(lambda: database.execute("SELECT count(*) FROM tollerchat_servers") == [(2,)])
        for n in range(20):
            await alice.send(f"told {n}")
            assert (await alice.receive())["type"] == "ack"
            assert (await bob.receive())["content"] == f"told {n}"

        def heard():
            stranger.poll()
            return len(stranger.notifies) >= 20

        await until(heard)


async def test_server_that_comes_while_another_is_writing_misses_nothing(
    serve, config, database, monkeypatch
):
    """Above all not the last message, behind which no other comes that would show what is missing."""
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 3600)
    first = await serve(config)
    alice, _ = await first.join(1)
    count = 0
    for n in range(5):
        coming = asyncio.ensure_future(serve(config))
        while not coming.done() or count < 20 * (n + 1):
            await alice.send(f"{count}")
            assert (await alice.receive())["type"] == "ack"
            count += 1
        bob, history = await coming.result().join(2, after=0)
        contents = [frame["content"] for frame in history]
        contents += await bob.receive_contents(count - len(contents))
        assert contents == [f"{m}" for m in range(count)]


async def test_server_that_comes_while_another_commits_finds_what_it_was_not_told(
    serve, config, database, monkeypatch
):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 3600)
    with contextlib.closing(psycopg2.connect(database.url)) as other, other.cursor() as cursor:
        # As a server does: it is alone yet, and so tells nobody.
        cursor.execute("SET tollerchat.writer = 'on'")
        cursor.execute(f"SELECT pg_advisory_xact_lock_shared({SERVERS_KEY}, 0)")
        cursor.execute("INSERT INTO messages (channel_id, user_id, content) VALUES (1, 9, 'in flight')")
        server = await serve(config)
        bob, history = await server.join(2)
        waiting = (
            f"SELECT 1 FROM pg_locks JOIN pg_database ON pg_database.oid = database "
            f"WHERE datname = current_database() AND classid = {SERVERS_KEY} AND NOT granted"
        )
        await until(lambda: database.execute(waiting))
        other.commit()
        assert history == []
        assert await bob.receive_contents(1) == ["in flight"]


async def test_server_whose_peer_is_gone_is_alone_again(serve, config, database, monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.2)
    servers = "SELECT count(*) FROM tollerchat_servers"
    first = await serve(config)
    alice, _ = await first.join(1)
    async with running(database.url) as peer:
        await until(lambda: database.execute(servers) == [(2,)])
        peer.kill()
        await until(lambda: database.execute(servers) == [(1,)])
    with contextlib.closing(psycopg2.connect(database.url)) as stranger, stranger.cursor() as cursor:
        stranger.autocommit = True
        cursor.execute("LISTEN tollerchat")
        await alice.send("alone")
        assert (await alice.receive())["type"] == "ack"
        stranger.poll()
        assert stranger.notifies == []


async def test_server_that_comes_after_another_is_alone_at_once(serve, config, database, monkeypatch):
    """Being told of its own commits would cost it a fifth of its work."""
    async with running(database.url) as before:
        await until(lambda: database.execute("SELECT 1 FROM tollerchat_servers"))
        before.kill()
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 3600)
    server = await serve(config)
    known = "SELECT id FROM tollerchat_servers"
    await until(lambda: database.execute(known) == [(server.app[repository_key].server_id,)])


async def test_server_goes_on_listening_on_one_connection(serve, config, database, monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.05)
    probed, execute = 0, bus.PostgresBus._execute

    async def count(self, connection, sql):
        nonlocal probed
        probed += sql == bus._PROBE
        return await execute(self, connection, sql)

    monkeypatch.setattr(bus.PostgresBus, "_execute", count)
    await serve(config)
    await until(lambda: database.execute("SELECT 1 FROM tollerchat_servers"))
    listening = (
        f"SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database "
        f"WHERE datname = current_database() AND classid = {SERVERS_KEY}"
    )
    before = database.execute(listening)
    await until(lambda: probed > 5)
    assert database.execute(listening) == before


async def test_server_that_was_forgotten_makes_itself_known_again(serve, config, database, monkeypatch):
    """By one who empties all tables, say."""
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.2)
    await serve(config)
    servers = "SELECT count(*) FROM tollerchat_servers"
    await until(lambda: database.execute(servers) == [(1,)])
    database.execute("TRUNCATE tollerchat_servers")
    await until(lambda: database.execute(servers) == [(1,)])


async def test_server_that_acts_in_another_role_listens_too(serve, database):
    """Then PostgreSQL does not show it much of its own session."""
    name = f"app_{uuid.uuid4().hex[:8]}"
    database.execute(
        f"CREATE ROLE {name} LOGIN; ALTER ROLE {name} SET role = postgres; GRANT postgres TO {name}"
    )
    try:
        server = await serve(
            Config(db_url=database.url.replace("postgres:", f"{name}:", 1), jwt_secret=SECRET)
        )
        await until(lambda: server.app[hub_key].access.remembers)
    finally:
        database.execute(f"REVOKE postgres FROM {name}; DROP ROLE {name}")
