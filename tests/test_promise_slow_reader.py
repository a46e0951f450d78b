"""One who reads too slowly costs the server next to nothing, delays nobody, and loses nothing."""

import asyncio
import contextlib
import time

import pytest

from tests.checker import Log, check, rows_of
from tests.faults import ServerProcess, in_thread, running
from tests.raw_client import RawClient
from tests.support import Template, until

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

MiB = 1 << 20
STALL = 1.5  # seconds
WRITE_TIMEOUT = 1.0


@pytest.fixture
async def process(database):
    async with running(database.url, write_timeout=2 * STALL) as server:
        yield server


@pytest.fixture
async def impatient(database):
    """A server that closes who reads nothing for a second."""
    server = ServerProcess(database.url, write_timeout=WRITE_TIMEOUT)
    await in_thread(server.start)
    yield server
    complaints = server.complaints()
    server.close()
    assert not complaints, complaints


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
    """Messages in a room, about 1,000 a second, and the time they take to reach another one."""

    def __init__(self, sender, receiver, size):
        self._sender, self._receiver, self._size = sender, receiver, size
        self._sent = {}
        self.delays = []
        self.count = 0

    async def run(self, seconds):
        reading = [asyncio.ensure_future(self._read(client)) for client in (self._sender, self._receiver)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
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


async def test_stalled_reader_costs_little_and_is_caught_up(process, database, connect, join):
    alice, bob = await join(process, 1), await join(process, 2)
    traffic = Traffic(alice, bob, 4000)
    await traffic.run(0.5)  # the server's own buffers have their size now
    head = rows_of(database.url)[-1].message_id
    slow = [await connect(process, 3, after=head) for _ in range(4)]
    memory = process.memory()
    await traffic.run(STALL)
    grown = process.memory() - memory
    rows = await in_thread(rows_of, database.url)
    assert (
        sum(len(row.content) for row in rows if row.message_id > head) > 2 * MiB
    ), (  # the kernel's buffers hold less than 1 MiB
        "too little to stall anybody"
    )
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
    traffic = asyncio.ensure_future(Traffic(alice, bob, 6000).run(2 * WRITE_TIMEOUT))
    while not traffic.done():
        log.received(await slow.frame())
        await asyncio.sleep(0.01)  # its pace, which is the fault
    await traffic
    rows = await in_thread(rows_of, database.url)
    await read_to(slow, rows[-1].message_id, log)
    assert check([log], rows) is None


async def test_stuck_reader_is_closed_and_its_descriptor_with_it(impatient, database, connect, join):
    alice, bob = await join(impatient, 1), await join(impatient, 2)
    descriptors = impatient.descriptors()
    stuck = [await connect(impatient, 3) for _ in range(5)]
    assert impatient.descriptors() == descriptors + 5
    traffic = Traffic(alice, bob, 6000)
    await traffic.run(1)
    await until(lambda: impatient.descriptors() == descriptors)
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


async def test_stuck_reader_of_typing_alone_costs_little(impatient, database, connect, join):
    """Typing frames are not stored, so there is nothing to catch up with; all the same they could fill buffers."""
    await join(impatient, 1)
    await connect(impatient, 3, after=0)
    typists = [await connect(impatient, 2, buffer=1 << 16) for _ in range(50)]
    readers = [asyncio.ensure_future(drain(typist)) for typist in typists]
    memory = impatient.memory()
    for _ in range(2):
        for typist in typists:
            await typist.send({"type": "typing"})
        await asyncio.sleep(1)  # the least time between two that are passed on
    assert impatient.memory() - memory < 2 * MiB
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)


async def drain(client):
    while await client.frame():
        pass
