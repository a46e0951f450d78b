"""A database that is restarted, killed, frozen, full or not there: nothing acked is lost, and all heals by itself."""

import asyncio
import contextlib
import os
import time

import aiohttp
import psycopg2
import pytest

from tests.conftest import CLUSTER_VARIABLE
from tests.faults import Cluster, ServerProcess, in_thread, running
from tests.raw_client import RawClient
from tests.soak import Health, Talker, wind_up
from tests.support import WAIT, psql, token, until
from tollerchat.saving import LOCK_KEY

# One query may take 1 s, and a message is tried again for 2 s; so whoever waits is told within 3 s, and a bit.
SETTINGS = {"db_timeout": 1, "store_timeout": 2, "shutdown_timeout": 4}
BOUND = 3.5
RECOVERY = 2.0


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(os.environ[CLUSTER_VARIABLE])
    try:
        cluster.start()
        cluster.database_url = cluster.database()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
async def db_url(cluster):
    if not cluster.answers():  # an earlier test has failed in between
        cluster.thaw()
        cluster.kill()
        cluster.start()
    psql(cluster.database_url, "TRUNCATE messages")
    return cluster.database_url


@pytest.fixture
async def process(db_url, request):
    async with running(db_url, taken=getattr(request, "param", 0), **SETTINGS) as server:
        yield server


# select(2) takes no descriptor above that, and aiopg calls it whenever a query fails.
many_descriptors = pytest.mark.parametrize(
    "process", [1100], indirect=True, ids=["more than 1024 descriptors"]
)


@pytest.fixture
async def room(process, session):
    """Talkers in a room, and somebody who watches `/health`."""
    talkers = [Talker(session, process, f"t{n}", 1 + n % 3, pause=0.01) for n in range(4)]
    talkers.append(Talker(session, process, "listener", 4, pause=None))
    health = Health(session, process)
    await until(lambda: all(talker.acked for talker in talkers[:4]))
    yield talkers, health
    await asyncio.gather(health.cancel(), *(talker.cancel() for talker in talkers))


async def heals(room, process, session, db_url, *, since):
    """Within the time allowed, acks come again and /health is well; then all promises were kept."""
    talkers, health = room
    acked = [len(talker.acked) for talker in talkers[:4]]
    while not all(len(talker.acked) > before for talker, before in zip(talkers, acked, strict=False)):
        assert time.monotonic() - since < RECOVERY, "no acks after the database came back"
        await asyncio.sleep(0.01)
    await health.becomes(200, RECOVERY - (time.monotonic() - since))
    assert await wind_up(talkers, process, session, db_url) is None
    # Nothing turns in the background: not for dead connections, not for retries that are over.
    before = process.cpu()
    await asyncio.sleep(0.5)
    assert process.cpu() - before < 0.2


async def test_restart_loses_nothing(cluster, room, process, session, db_url):
    await in_thread(cluster.restart)
    await heals(room, process, session, db_url, since=time.monotonic())


async def test_kill_of_all_processes_loses_nothing(cluster, room, process, session, db_url):
    await in_thread(cluster.kill)
    since = time.monotonic()
    await room[1].becomes(503, 1)
    cpu = process.cpu()
    await asyncio.sleep(1)  # away for a while: longer than any first retry
    assert process.cpu() - cpu < 0.5
    assert room[1].said(since + 0.5, time.monotonic() - 0.1) == {503}
    await in_thread(cluster.start)
    await heals(room, process, session, db_url, since=time.monotonic())


async def test_kill_of_the_backends_loses_nothing(cluster, room, process, session, db_url):
    """PostgreSQL restarts itself when a backend is killed."""
    for _ in range(2):
        acked = len(room[0][0].acked)
        await until(lambda: len(room[0][0].acked) > acked + 10)  # noqa: B023
        for (pid,) in psql(db_url, "SELECT pid FROM pg_stat_activity WHERE application_name = 'tollerchat'"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
    await until(cluster.answers)
    await heals(room, process, session, db_url, since=time.monotonic())


async def test_terminated_connections_lose_nothing(cluster, room, process, session, db_url):
    for _ in range(5):
        acked = len(room[0][0].acked)
        await until(lambda: len(room[0][0].acked) > acked + 5)  # noqa: B023
        psql(
            db_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tollerchat'",
        )
    await heals(room, process, session, db_url, since=time.monotonic())


@many_descriptors
async def test_failures_of_queries_and_connections_on_high_descriptors(
    cluster, room, process, session, db_url
):
    talkers, _ = room
    with contextlib.closing(psycopg2.connect(db_url)) as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s, 2)", (LOCK_KEY,))
        url, headers = f"{process.url}/channels/2/messages", {"Authorization": f"Bearer {token(1)}"}
        async with session.post(url, headers=headers, json={"content": "locked out"}) as response:
            assert response.status == 503
    assert max(delay for talker in talkers for delay in talker.delays) < 1, (
        "others waited for a channel of nobody's"
    )
    for _ in range(3):
        acked = len(talkers[0].acked)
        await until(lambda: len(talkers[0].acked) > acked + 5)  # noqa: B023
        psql(
            db_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tollerchat'",
        )
        headers = {"Authorization": f"Bearer {token(5)}"}
        sockets = [await session.ws_connect(f"{process.url}/ws/channel/2", headers=headers) for _ in range(5)]
        for socket in sockets:
            await asyncio.wait_for(socket.close(), WAIT)
    await heals(room, process, session, db_url, since=time.monotonic())


async def test_frozen_database_keeps_nobody_waiting_for_ever(cluster, room, process, session, db_url):
    cluster.freeze()
    try:
        since, cpu = time.monotonic(), process.cpu()

        async def refused():
            headers = {"Authorization": f"Bearer {token(5)}"}
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await session.ws_connect(f"{process.url}/ws/channel/1", headers=headers)
            assert refusal.value.status == 503
            return time.monotonic() - since

        joins = await asyncio.wait_for(asyncio.gather(*(refused() for _ in range(20))), WAIT)
        assert max(joins) < BOUND, "those who join are not told in time"
        await asyncio.sleep(max(0.0, since + BOUND - time.monotonic()))  # the stall itself
        assert process.cpu() - cpu < 1
        assert room[1].said(since + 0.1, time.monotonic()) == {503}
    finally:
        cluster.thaw()
    await heals(room, process, session, db_url, since=time.monotonic())


async def test_messages_get_unavailable_in_bounded_time_while_frozen(cluster, process, session, db_url):
    headers = {"Authorization": f"Bearer {token(1)}"}
    url = f"{process.url}/ws/channel/1"
    async with session.ws_connect(url, headers=headers, protocols=["tollerchat.v1"]) as socket:
        assert (await socket.receive_json(timeout=WAIT))["type"] == "ready"
        cluster.freeze()
        try:
            start = time.monotonic()
            for n in range(5):
                await socket.send_json({"type": "message", "content": f"m{n}", "nonce": f"n{n}"})
            frames = [await socket.receive_json(timeout=WAIT) for _ in range(5)]
            assert time.monotonic() - start < BOUND
            assert [(frame["code"], frame["nonce"]) for frame in frames] == [
                ("unavailable", f"n{n}") for n in range(5)
            ]
        finally:
            cluster.thaw()
        ids = []
        for n in range(5):
            await socket.send_json({"type": "message", "content": f"m{n}", "nonce": f"n{n}"})
        while len(ids) < 5:
            frame = await socket.receive_json(timeout=WAIT)
            assert frame["type"] == "ack", f"its own message, or an error: {frame}"
            ids.append(frame["message_id"])
        assert ids == [row[0] for row in psql(db_url, "SELECT id FROM messages ORDER BY id")]


async def test_queue_of_messages_gets_unavailable_in_bounded_time_while_frozen(
    cluster, process, session, db_url
):
    """More than one batch holds: the last are not to wait for one try of each before them."""
    clients = [await RawClient.connect(process.port, 1 + n % 5, 2) for n in range(60)]
    try:
        for client in clients:
            while (await client.frame())["type"] != "ready":
                pass
        cluster.freeze()
        try:
            start = time.monotonic()
            for client in clients:
                await client.send(*[{"type": "message", "content": "x"}] * 30)
            for client in clients:
                for _ in range(30):
                    assert (await client.frame())["code"] == "unavailable"
            assert time.monotonic() - start < BOUND
        finally:
            cluster.thaw()
    finally:
        for client in clients:
            client.close()


async def test_shutdown_is_over_in_time_while_frozen(cluster, room, process, session, db_url):
    cluster.freeze()
    try:
        await asyncio.sleep(0.3)  # queries are under way, and stuck
        start = time.monotonic()
        process.signal(15)
        assert await in_thread(process.wait) == 0
        assert time.monotonic() - start < SETTINGS["shutdown_timeout"] + 0.5
    finally:
        cluster.thaw()
    await in_thread(process.start)
    assert await wind_up(room[0], process, session, db_url) is None


async def test_shutdown_answers_what_waits_while_frozen(cluster, db_url, session):
    """Also where the first try fails so late that another one has no time."""
    settings = {"db_timeout": 2, "store_timeout": 8, "shutdown_timeout": 4}
    async with running(db_url, **settings) as process:
        headers = {"Authorization": f"Bearer {token(1)}"}
        url = f"{process.url}/ws/channel/1"
        async with session.ws_connect(url, headers=headers, protocols=["tollerchat.v1"]) as socket:
            await socket.send_json({"type": "message", "content": "connects"})
            while (await socket.receive_json(timeout=WAIT))["type"] != "ack":
                pass
            cluster.freeze()
            try:
                await socket.send_json({"type": "message", "content": "stuck", "nonce": "n"})
                await asyncio.sleep(1.2)  # of the two that the first try takes
                process.signal(15)
                frame = await socket.receive_json(timeout=WAIT)
                assert (frame["code"], frame["nonce"]) == ("unavailable", "n")
                assert (await socket.receive(timeout=WAIT)).data == 1001
                assert await in_thread(process.wait) == 0
            finally:
                cluster.thaw()


async def test_database_without_free_connections(cluster, room, process, session, db_url):
    taken = []
    try:
        while True:  # whoever loses a connection now gets none
            try:
                taken.append(psycopg2.connect(cluster.url))
            except psycopg2.OperationalError:
                if not terminate(taken):
                    break
        await room[1].becomes(503, 2)
        start = time.monotonic()
        await asyncio.sleep(1)  # nothing turns meanwhile
        assert room[1].said(start, time.monotonic() - 0.1) == {503}
    finally:
        for connection in taken:
            connection.close()
    await heals(room, process, session, db_url, since=time.monotonic())


def terminate(taken):
    """Cut the server's connections, over one that is ours; false when there are none."""
    with taken[0].cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tollerchat'"
        )
        taken[0].commit()
        return cursor.rowcount


async def test_database_that_is_away_at_the_start(cluster, session, db_url):
    await in_thread(cluster.kill)
    server = ServerProcess(db_url, **SETTINGS)
    try:
        await in_thread(server.start)
        health = Health(session, server)
        await health.becomes(503, 1)
        talkers = [Talker(session, server, f"t{n}", 1 + n, pause=0.01) for n in range(2)]
        await asyncio.sleep(0.5)
        assert not any(talker.logs for talker in talkers)
        assert {status for _, status in health.answers} == {503}
        await in_thread(cluster.start)
        since = time.monotonic()
        await health.becomes(200, RECOVERY)
        await until(lambda: all(talker.acked for talker in talkers))
        assert time.monotonic() - since < RECOVERY
        assert await wind_up(talkers, server, session, db_url) is None
        await asyncio.gather(health.cancel(), *(talker.cancel() for talker in talkers))
        assert server.complaints() == []
    finally:
        server.close()
