"""`?after=` goes on where a client was: nothing is missing, nothing comes twice, however much there is."""

import asyncio
import contextlib
import dataclasses
import time

import psycopg2
import pytest

from tests.checker import Log, check, rows_of
from tests.faults import Stranger, in_thread, running
from tests.raw_client import RawClient
from tests.support import Template, psql, until
from tollerchat.app import hub_key
from tollerchat.saving import LOCK_KEY

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

MiB = 1 << 20


def fill(database, count, *, size=10):
    """Insert many messages in one statement; returns their ids."""
    sql = """INSERT INTO messages (channel_id, user_id, content)
        SELECT 1, 9, 'row ' || n || repeat('x', %s) FROM generate_series(1, %s) AS n ORDER BY n RETURNING id"""
    return [message_id for (message_id,) in database.execute(sql, size, count)]


async def resumed(server, after, user_id=1):
    """The ids that a client is sent before `ready`, and `ready`."""
    client, history = await server.join(user_id, after=after)
    assert await client.settled() == []
    await client.socket.close()
    return [frame["message_id"] for frame in history], client.ready


@pytest.fixture(params=["cold", "warm"])
async def room(request, server):
    """Whether somebody is in the room already, so that it has recent messages at hand."""
    if request.param == "warm":
        await server.join(9)


async def filled(server, database, count):
    """Insert many messages, and wait until the room has them, if somebody is in it; returns their ids."""
    ids = fill(database, count)
    rooms = server.app[hub_key].rooms
    await until(lambda: 1 not in rooms or rooms[1].head == ids[-1])
    return ids


async def delete(server, database, condition, *parameters):
    """Delete messages, and wait until the room knows, if somebody is in it."""
    database.execute(f"DELETE FROM messages WHERE {condition}", *parameters)
    rooms = server.app[hub_key].rooms
    await until(lambda: 1 not in rooms or rooms[1].tail.floor == rooms[1].head)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("count", [0, 1, 10, 50, 51, 64, 65, 128, 300, 5000])
async def test_all_that_is_missing_is_sent(server, database, count):
    ids = await filled(server, database, count + 7)
    got, ready = await resumed(server, ids[6])
    assert got == ids[7:]
    assert (ready["last_message_id"], ready["gap"]) == (ids[-1], False)


@pytest.mark.usefixtures("room")
async def test_after_zero_sends_the_whole_channel(server, database):
    assert await resumed(server, 0) == (
        [],
        {**(await resumed(server, 0))[1], "last_message_id": 0, "gap": False},
    )
    ids = await filled(server, database, 120)
    database.insert("elsewhere", channel_id=2)
    got, ready = await resumed(server, 0)
    assert (got, ready["last_message_id"]) == (ids, ids[-1])


@pytest.mark.usefixtures("room")
async def test_after_a_deleted_row(server, database):
    ids = await filled(server, database, 30)
    await delete(server, database, "id BETWEEN %s AND %s", ids[9], ids[19])
    for after in (ids[9], ids[12], ids[19]):
        got, ready = await resumed(server, after)
        assert (got, ready["last_message_id"]) == (ids[20:], ids[-1])


@pytest.mark.usefixtures("room")
async def test_after_beyond_the_newest_row(server, database):
    """The rows that the client saw last were deleted: nothing is missing, and what comes next is sent."""
    ids = await filled(server, database, 30)
    await delete(server, database, "id > %s", ids[9])
    got, ready = await resumed(server, ids[29])
    assert got == []
    assert not ready["gap"]
    assert ids[9] <= ready["last_message_id"] <= ids[29]
    client, _ = await server.join(1, after=ids[29])
    (next_id,) = database.insert("next")
    assert (await client.receive())["message_id"] == next_id
    got, ready = await resumed(server, ids[29])
    assert (got, ready["last_message_id"]) == ([next_id], next_id)


@pytest.mark.usefixtures("room")
async def test_after_the_only_rows_were_deleted(server, database):
    ids = await filled(server, database, 3)
    await delete(server, database, "true")
    got, ready = await resumed(server, ids[-1])
    assert (got, ready["gap"]) == ([], False)
    got, ready = await resumed(server, 2**62)
    assert (got, ready["gap"]) == ([], False)


@pytest.mark.parametrize("joined", ["cold", "warm"])
@pytest.mark.parametrize("limit", [5, 100, 1000])
async def test_more_than_max_replay_leaves_a_gap(serve, config, database, limit, joined):
    server = await serve(dataclasses.replace(config, max_replay=limit))
    if joined == "warm":
        await server.join(9)
    ids = await filled(server, database, 1500)
    got, ready = await resumed(server, ids[0])
    assert (got, ready["gap"], ready["last_message_id"]) == (ids[-limit:], True, ids[-1])
    got, ready = await resumed(server, ids[-limit - 2])
    assert (got, ready["gap"]) == (ids[-limit:], True)
    got, ready = await resumed(server, ids[-limit - 1])
    assert (got, ready["gap"]) == (ids[-limit:], False)


async def test_resumes_while_others_write(server, database):
    """A client that leaves and comes again all the time sees one sequence."""
    logs, last = [], 0
    async with Stranger(database) as stranger:
        while len(logs) < 60:
            log = Log(f"connection {len(logs)}", 1, after=last)
            logs.append(log)
            client = await RawClient.connect(server.port, 1, after=last, buffer=1 << 16)
            with contextlib.closing(client):
                for _ in range(1 + len(logs) % 9):
                    log.received(await client.frame())
            last = max(
                [last, *(frame["message_id"] for _, frame in log.events if frame["type"] == "message")]
            )
    got, _ = await resumed(server, last)
    seen = [frame["message_id"] for log in logs for _, frame in log.events if frame["type"] == "message"]
    assert seen + got == stranger.ids
    assert check(logs, rows_of(database.url)) is None


async def test_after_what_another_server_told_while_a_commit_is_in_flight(serve, config, database):
    """A client comes from another server, ahead of the room here, which waits for a commit of its own."""
    here, there = await serve(config), await serve(config)
    (alice, _), (bob, _) = await here.join(1), await there.join(2)
    with contextlib.closing(psycopg2.connect(database.url)) as blocker, blocker.cursor() as cursor:
        blocker.autocommit = True
        database.execute("BEGIN")
        (message_id,) = database.insert("from elsewhere")  # holds the lock of the channel
        # The lock is given in the order of asking: to the blocker first, then to the server.
        blocking = asyncio.ensure_future(in_thread(cursor.execute, f"SELECT pg_advisory_lock({LOCK_KEY}, 1)"))
        await until(lambda: waiting_for_locks(config) == 1)
        await alice.send("in flight", nonce="n")
        await until(lambda: waiting_for_locks(config) == 2)
        database.execute("COMMIT")
        await blocking
        assert (await bob.receive())["message_id"] == message_id
        carol = Log("carol", 3, after=message_id)
        joining = asyncio.ensure_future(here.join(3, after=message_id))
        await asyncio.wait([joining], timeout=0.1)
        cursor.execute(f"SELECT pg_advisory_unlock({LOCK_KEY}, 1)")
    client, history = await joining
    for frame in [*history, client.ready]:
        carol.received(frame)
    database.insert("behind it")
    while carol.events[-1][1].get("content") != "behind it":
        carol.received(await client.receive())
    carol.complete = True
    assert check([carol], rows_of(database.url)) is None


def waiting_for_locks(config):
    return psql(
        config.db_url,
        """SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database
        WHERE NOT granted AND locktype = 'advisory' AND datname = current_database()""",
    )[0][0]


async def test_deleted_rows_are_not_sent_from_memory(server, database):
    await server.join(9)
    ids = fill(database, 20)
    room = server.app[hub_key].rooms[1]
    await until(lambda: room.head == ids[-1])
    edition = room._edition
    database.execute("DELETE FROM messages WHERE id = ANY (%s)", ids[5:10])
    await until(lambda: room._edition > edition)  # the deletion is known
    got, _ = await resumed(server, 0)
    assert got == ids[:5] + ids[10:]


@pytest.mark.parametrize(("count", "size", "replays"), [(5000, 2000, 3), (100_000, 20, 1)])
async def test_replay_is_not_noticed_by_others(database, count, size, replays):
    """Neither in the time that their messages take, nor in the server's memory."""
    ids = fill(database, count, size=size)
    async with running(database.url, max_replay=2 * count) as server, contextlib.AsyncExitStack() as stack:
        alice, bob = [await RawClient.connect(server.port, user_id, after=ids[-1]) for user_id in (1, 2)]
        for client in (alice, bob):
            stack.callback(client.close)
            await client.frame()

        async def delay(content):
            start = time.monotonic()
            await alice.send({"type": "message", "content": content})
            while (await bob.frame()).get("content") != content:
                pass
            delay = time.monotonic() - start
            while (await alice.frame())["type"] != "ack":
                pass
            return delay

        before, memory = [await delay(f"before {n}") for n in range(20)], server.memory()
        replaying = [asyncio.ensure_future(replay(server, ids)) for _ in range(replays)]
        during, peak = [], 0
        while not all(task.done() for task in replaying):
            during.append(await delay(f"during {len(during)}"))
            peak = max(peak, server.memory())
        for task in replaying:
            assert (await task)[: len(ids)] == ids
        during.sort()
        assert during[len(during) // 2] < 10 * sorted(before)[10] + 0.05
        assert during[-1] < 0.5
        assert peak - memory < 8 * MiB


async def replay(server, ids):
    client, got = await RawClient.connect(server.port, 3, after=0, buffer=1 << 16), []
    with contextlib.closing(client):
        while (frame := await client.frame())["type"] != "ready":
            got.append(frame["message_id"])
        assert not frame["gap"]
    return got
