"""One who sends or reads as nobody should costs the others nothing, and is gone in time."""

import asyncio
import contextlib
import dataclasses
import gzip
import socket
import time

import psycopg2
import pytest

from tests.faults import running
from tests.raw_client import RawClient
from tests.support import WAIT, Template, until
from tollerchat.app import writer_key

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

PING = b"\x89\x80\0\0\0\0"
PONG = b"\x8a\xfd\0\0\0\0" + b"p" * 125
EMPTY_TEXT = b"\x81\x80\0\0\0\0"
RESERVED_BITS = b"\xf1\x80\0\0\0\0"


@contextlib.contextmanager
def closing(*clients):
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


@contextlib.contextmanager
def lock(database, sql):
    """What another program's open transaction holds."""
    with contextlib.closing(psycopg2.connect(database.url)) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        yield
        connection.rollback()


async def ready(client):
    while (await client.frame())["type"] != "ready":
        pass


async def ack(client):
    while (frame := await client.frame())["type"] != "ack":
        pass
    return frame


@pytest.mark.parametrize("frame", [PING, EMPTY_TEXT], ids=["pings", "empty texts"])
@pytest.mark.parametrize("count", [1, 10])
async def test_flood_of_tiny_frames_keeps_nobody_waiting(database, frame, count):
    loop = asyncio.get_running_loop()

    async def send(client):
        while True:
            await loop.sock_sendall(client.socket, frame * 40_000)

    async def receive(client):
        while await loop.sock_recv(client.socket, 1 << 18):
            pass

    async with running(database.url) as server:
        flooders = [await RawClient.connect(server.port, 1, buffer=1 << 20) for _ in range(count)]
        alice = await RawClient.connect(server.port, 2, 2)
        with closing(*flooders, alice):
            await ready(alice)
            flood = [asyncio.ensure_future(work(flooder)) for flooder in flooders for work in (send, receive)]
            delays = []
            for _ in range(20):
                start = time.monotonic()
                await alice.send({"type": "message", "content": "x"})
                await ack(alice)
                delays.append(time.monotonic() - start)
            assert max(delays) < 1.0
            assert not any(task.done() for task in flood)
            for task in flood:
                task.cancel()
            await asyncio.wait(flood)


async def test_joiner_who_reads_nothing_of_a_large_history_is_closed(database):
    """The history alone fills its buffer."""
    database.insert(*(f"{n}" * 8000 for n in range(9)), *("x" * 8000 for _ in range(50)))
    async with running(database.url, write_timeout=1.0) as server:
        descriptors = server.descriptors()
        with closing(await RawClient.connect(server.port, 1)):
            await until(lambda: server.descriptors() > descriptors)
            connected = server.descriptors()
            await until(lambda: server.descriptors() < connected)


async def test_half_closed_peer_who_reads_nothing_is_closed(database):
    database.insert(*("x" * 8000 for _ in range(200)))
    async with running(database.url, write_timeout=600) as server:
        client = await RawClient.connect(server.port, 1, after=0)
        with closing(client):
            connected = server.descriptors()
            await until(lambda: max(server.queued([client])) > 64 * 1024)  # stalled, with more behind it
            client.socket.shutdown(socket.SHUT_WR)
            await until(lambda: server.descriptors() < connected)


async def test_what_is_sent_before_the_upgrade_does_not_silence_the_connection(database):
    """So much that aiohttp stops to read it while the database keeps the request waiting."""
    waiting = (
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'tollerchat'"
    )
    async with running(database.url) as server:
        with lock(database, "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"):
            connecting = asyncio.ensure_future(RawClient.connect(server.port, 1, behind=PONG * 4000))
            await until(lambda: database.execute(waiting))
        client = await connecting
        with closing(client):
            await ready(client)
            await client.send({"type": "message", "content": "heard", "nonce": "n"})
            assert (await ack(client))["nonce"] == "n"


async def test_nothing_follows_a_close_frame(server):
    loop = asyncio.get_running_loop()
    bad, alice = await RawClient.connect(server.port, 1), await RawClient.connect(server.port, 2)
    with closing(bad, alice):
        await ready(bad)
        await ready(alice)
        await loop.sock_sendall(bad.socket, RESERVED_BITS)
        received = await asyncio.wait_for(loop.sock_recv(bad.socket, 4096), WAIT)
        assert received.startswith(b"\x88")
        for _ in range(3):
            await alice.send({"type": "message", "content": "x"})
            await ack(alice)
        size = 2 + received[1]
        while more := await asyncio.wait_for(loop.sock_recv(bad.socket, 4096), WAIT):
            received += more
        assert len(received) == size


@pytest.mark.parametrize(
    ("sent", "answered"),
    [(1000, 1000), (1006, 1002), (1005, 1002), (4999, 4999), (5000, 1002), (65535, 1002)],
)
async def test_close_codes_that_must_not_be_sent_are_not_echoed(server, sent, answered):
    loop, client = asyncio.get_running_loop(), await RawClient.connect(server.port, 1)
    with closing(client):
        await ready(client)
        await loop.sock_sendall(client.socket, b"\x88\x82\0\0\0\0" + sent.to_bytes(2, "big"))
        assert await client.frame() is None
        assert client.code == answered


async def test_one_who_waits_long_for_the_database_is_not_taken_for_dead(serve, config, database):
    """It is not read meanwhile, so its pongs are not heard either."""
    server = await serve(dataclasses.replace(config, ping_interval=0.2, pong_timeout=0.4))
    alice, _ = await server.join(1)
    end = time.monotonic() + 1.5
    with lock(database, "SELECT pg_advisory_xact_lock(1953459308, 1)"):
        for n in range(100):
            await alice.send(f"m{n} {'x' * 300}", nonce=f"n{n}")
        await until(lambda: time.monotonic() > end)
    assert [(await alice.receive())["type"] for _ in range(100)] == ["ack"] * 100
    with pytest.raises(asyncio.TimeoutError):  # neither a frame nor the end; it answers pings meanwhile
        await asyncio.wait_for(alice.socket.receive(), 1.0)


async def test_writing_goes_on_when_a_column_gets_another_type(server, database):
    alice, _ = await server.join(1)
    await alice.send("before")
    assert (await alice.receive())["type"] == "ack"
    database.execute("ALTER TABLE messages ALTER content TYPE varchar")
    await alice.send("after", nonce="n")
    assert (await alice.receive())["type"] == "ack"
    assert database.contents() == ["before", "after"]


async def test_messages_of_one_who_hung_up_wait_their_turn(serve, config, database, monkeypatch):
    """Else a few who send and go would fill the queue of the writer."""
    server = await serve(config)
    writer, peak = server.app[writer_key], 0
    submit = writer.submit

    def count(message, sender):
        nonlocal peak
        submit(message, sender)
        peak = max(peak, sender._in_flight + 1)

    monkeypatch.setattr(writer, "submit", count)
    client = await RawClient.connect(server.port, 1)
    with closing(client):
        await ready(client)
        with lock(database, "LOCK TABLE messages IN SHARE MODE"):
            await client.send(*[{"type": "message", "content": "x"}] * 400)
            await until(lambda: peak >= config.max_in_flight)
            client.close()  # which the server finds out when it answers
        await until(lambda: len(database.contents()) == 400)
    assert peak <= config.max_in_flight


async def test_compressed_request_is_not_unpacked(database, session):
    """Whoever sends it, wherever to: 200 KB would take most of a second."""
    bomb = gzip.compress(bytes(200 * 1024 * 1024))
    async with running(database.url) as server:
        for path in ("/nowhere", "/channels/1/messages"):
            cpu = server.cpu()
            async with session.post(
                server.url + path, data=bomb, headers={"Content-Encoding": "gzip"}
            ) as response:
                assert response.status in (401, 404)
            async with session.get(f"{server.url}/nowhere"):  # what came with the first is read by now
                pass
            assert server.cpu() - cpu < 0.3
