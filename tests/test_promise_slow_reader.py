"""One who reads too slowly costs the server next to nothing, delays nobody, and loses nothing."""

import asyncio
import contextlib
import time

import pytest

from tests.checker import Log, check, rows_of
from tests.faults import in_thread, running
from tests.raw_client import RawClient
from tests.support import WAIT, Template, until
from tollerchat.app import hub_key
from tollerchat.protocol import OutgoingTyping, encode
from tollerchat.websocket import BUFFER_LIMIT, CLOSE_TIMEOUT

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

MiB = 1 << 20
WRITE_TIMEOUT = 1.0


@pytest.fixture
async def patient(database):
    """A server that closes nobody for reading too slowly, however long the test takes."""
    async with running(database.url, write_timeout=600) as server:
        yield server


@pytest.fixture
async def impatient(database):
    """A server that closes who reads nothing for a second."""
    async with running(database.url, write_timeout=WRITE_TIMEOUT) as server:
        yield server


@pytest.fixture
def connect():
    """Factory of clients that have read nothing yet, and are closed in the end."""
    with contextlib.ExitStack() as stack:

        async def connect(server, user_id, **options):
            client = await RawClient.connect(server.port, user_id, **options)
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture
def join(connect):
    """Factory of clients that have read up to `ready`."""

    async def join(server, user_id, **options):
        client = await connect(server, user_id, buffer=MiB, **options)
        while (await client.frame())["type"] != "ready":
            pass
        return client

    return join


class Traffic:
    """Messages in a room, up to 1,000 a second, and the time they take to reach another one."""

    def __init__(self, sender, receiver, size):
        self._sender, self._receiver, self._size = sender, receiver, size
        self._sent = {}
        self.delays = []
        self.count = 0
        self.bytes = 0  # that everybody in the room has been sent

    async def run(self, enough):
        """Send until `enough()`."""
        reading = [asyncio.ensure_future(self._read(client)) for client in (self._sender, self._receiver)]
        deadline = time.monotonic() + WAIT
        while not enough():
            assert time.monotonic() < deadline, "all that traffic was not enough"
            await until(lambda: len(self._sent) < 100)  # a busy machine is not asked for more than it can do
            contents = [f"{self.count + n} {'x' * self._size}" for n in range(10)]
            self.count += 10
            self._sent.update(dict.fromkeys(contents, time.monotonic()))
            await self._sender.send(*({"type": "message", "content": content} for content in contents))
            await asyncio.sleep(0.01)
        await until(lambda: not self._sent)
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)

    async def _read(self, client):
        while True:
            frame = await client.frame()
            if frame["type"] == "message":
                self.delays.append(time.monotonic() - self._sent.pop(frame["content"]))
                self.bytes += len(frame["content"])

    def stalls(self, server, *clients, since=0):
        """Whether 2 MiB of what each was sent after `since` are still to come, and not in the kernel's buffers."""
        sent = self.bytes - since
        return sent > 2 * MiB and sent - max(server.queued(clients)) > 2 * MiB


async def test_stalled_reader_costs_little_and_is_caught_up(patient, database, connect, join):
    """Many readers, because the server's memory swings by some MiB under load, whoever reads it.

    Each query leaves garbage in cycles, with its parameters, which waits for the collector.
    """
    alice, bob = await join(patient, 1), await join(patient, 2)
    traffic = Traffic(alice, bob, 4000)
    await traffic.run(lambda: traffic.bytes > 4 * MiB)  # the server's own buffers have their size now
    head, before = rows_of(database.url)[-1].message_id, traffic.bytes
    slow = [await connect(patient, 3, after=head) for _ in range(20)]
    memory = patient.memory()
    await traffic.run(lambda: traffic.stalls(patient, *slow, since=before))
    grown = patient.memory() - memory
    rows = await in_thread(rows_of, database.url)
    assert grown < len(slow) * MiB, f"{grown / MiB} MiB for {len(slow)} stalled readers"
    assert max(traffic.delays) < 0.5
    logs = [Log(f"slow {n}", 3, after=head, complete=True) for n in range(len(slow))]
    await asyncio.gather(
        *(read_to(each, rows[-1].message_id, log) for each, log in zip(slow, logs, strict=False))
    )
    assert check(logs, rows) is None


async def read_to(client, message_id, log):
    while not log.events or log.events[-1][1].get("message_id") != message_id:
        frame = await client.frame()
        assert frame is not None, f"{log.name} was closed: {client.code}"
        log.received(frame)


async def test_reader_that_is_slow_but_reads_is_not_closed(impatient, database, connect, join):
    """What waits for it takes several times the timeout, but it never reads nothing for that long."""
    alice, bob = await join(impatient, 1), await join(impatient, 2)
    slow, log = await connect(impatient, 3, after=0), Log("slow", 3, after=0, complete=True)
    traffic, end = Traffic(alice, bob, 6000), time.monotonic() + 2 * WRITE_TIMEOUT
    running = asyncio.ensure_future(
        traffic.run(lambda: time.monotonic() > end and traffic.stalls(impatient, slow))
    )
    while not running.done():
        log.received(await slow.frame())
        await asyncio.sleep(0.01)  # its pace, which is the fault
    await running
    rows = await in_thread(rows_of, database.url)
    await read_to(slow, rows[-1].message_id, log)
    assert check([log], rows) is None


async def test_reader_that_trickles_is_not_closed(impatient, database, connect):
    """It reads less in the timeout than the kernel keeps for it."""
    database.insert(*("x" * 2000 for _ in range(500)))
    slow, loop = await connect(impatient, 3, after=0), asyncio.get_running_loop()
    descriptors = impatient.descriptors()
    end, received = time.monotonic() + 3 * WRITE_TIMEOUT + CLOSE_TIMEOUT, 0
    while time.monotonic() < end:
        received += len(await asyncio.wait_for(loop.sock_recv(slow.socket, 1000), WAIT))
        await asyncio.sleep(0.1)  # its pace, which is the fault
    assert impatient.descriptors() == descriptors
    assert received < 80 * 1024


async def test_reader_with_a_full_buffer_is_not_taken_for_dead(database, connect, join):
    """While it does not read, it cannot see a ping either."""
    # The others answer pings, if this process lets them: a second is what a busy machine may take from it.
    settings = {"ping_interval": 0.2, "pong_timeout": 1.2, "write_timeout": 600}
    async with running(database.url, **settings) as server:
        alice, bob = await join(server, 1), await join(server, 2)
        slow, log = await connect(server, 3, after=0), Log("slow", 3, after=0, complete=True)
        traffic = Traffic(alice, bob, 6000)
        await traffic.run(lambda: traffic.stalls(server, slow))
        end = time.monotonic() + 3 * settings["pong_timeout"]
        others = [asyncio.ensure_future(drain(client)) for client in (alice, bob)]
        await until(lambda: time.monotonic() > end)
        rows = await in_thread(rows_of, database.url)
        await read_to(slow, rows[-1].message_id, log)
        assert check([log], rows) is None
        for other in others:
            assert not other.done()
            other.cancel()
        await asyncio.wait(others)


async def test_stuck_reader_is_closed_and_its_descriptor_with_it(impatient, database, connect, join):
    alice, bob = await join(impatient, 1), await join(impatient, 2)
    descriptors = impatient.descriptors()
    stuck = [await connect(impatient, 3) for _ in range(5)]
    assert impatient.descriptors() == descriptors + 5
    traffic = Traffic(alice, bob, 6000)
    await traffic.run(lambda: impatient.descriptors() == descriptors)
    assert max(traffic.delays) < 0.5
    logs = [Log(f"stuck {n}", 3, after=0) for n in range(5)]
    for each, log in zip(
        stuck, logs, strict=False
    ):  # what it was sent is in order, and then it is told, if that still fits
        while (frame := await each.frame()) is not None:
            log.received(frame)
        assert each.code in (None, 1013)
    assert check(logs, rows_of(database.url)) is None
    again = await join(impatient, 3)
    await again.send({"type": "message", "content": "still here", "nonce": "n"})
    assert (await again.frame())["type"] == "ack"


async def test_stuck_replay_is_closed(impatient, database, connect, join):
    database.execute(
        "INSERT INTO messages (channel_id, user_id, content) SELECT 1, 9, repeat('x', 8000) FROM generate_series(1, 1000)"
    )
    await join(impatient, 1, after=1000)
    descriptors, memory = impatient.descriptors(), impatient.memory()
    for _ in range(5):
        await connect(impatient, 3, after=0)
    await until(lambda: impatient.descriptors() == descriptors)
    assert impatient.memory() - memory < 10 * MiB


def message(n):
    return {"type": "message", "content": f"m{n}", "nonce": f"{n} {'😀' * 50}"}


def refused(n):
    return {**message(n), "content": ""}


@pytest.mark.parametrize("frame", [message, refused])
async def test_sender_who_never_reads_answers_is_closed(impatient, database, connect, join, frame):
    await join(impatient, 1)
    descriptors, memory = impatient.descriptors(), impatient.memory()
    stuck = await connect(impatient, 3)

    async def flood():
        for n in range(0, 1_000_000, 100):
            await stuck.send(*map(frame, range(n, n + 100)))

    await closes_while(flood(), impatient, descriptors, memory)


async def test_peer_who_never_reads_pongs_is_closed(impatient, database, connect, join):
    await join(impatient, 1)
    descriptors, memory = impatient.descriptors(), impatient.memory()
    stuck = await connect(impatient, 3)

    async def flood():
        ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
        while True:
            await asyncio.get_running_loop().sock_sendall(stuck.socket, ping * 1000)

    await closes_while(flood(), impatient, descriptors, memory)


async def closes_while(flood, server, descriptors, memory):
    flooding, peak = asyncio.ensure_future(flood), memory

    def closed():
        nonlocal peak
        peak = max(peak, server.memory())
        return server.descriptors() == descriptors

    try:
        await until(closed)
    finally:
        flooding.cancel()
        await asyncio.wait([flooding])
    assert peak - memory < 10 * MiB


async def test_stuck_reader_of_typing_alone_costs_little(server):
    """Typing frames are not stored, so there is nothing to catch up with; all the same they could fill buffers."""
    stuck = await RawClient.connect(int(server.url.rpartition(":")[2]), 3)
    with contextlib.closing(stuck):
        audience = server.app[hub_key].rooms[1].audience
        await until(lambda: audience.live)
        (client,) = audience.live
        buffered = client._socket.transport.get_write_buffer_size
        frame = encode(OutgoingTyping(1, 1))
        while not client._socket.full:
            audience.tell_others(None, frame)
        before = buffered()
        for _ in range(1000):
            audience.tell_others(None, frame)
        assert BUFFER_LIMIT < before == buffered() < 2 * BUFFER_LIMIT


async def drain(client):
    while await client.frame():
        pass
