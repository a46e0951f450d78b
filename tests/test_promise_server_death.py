"""A server process that is told to stop, or is killed: what was acked is there, clients go on where they were."""

import asyncio
import contextlib
import json
import os
import signal
import time

import aiohttp
import pytest

from tests.checker import Log, check, rows_of
from tests.faults import in_thread, running
from tests.raw_client import RawClient
from tests.soak import Talker, wind_up
from tests.support import WAIT, Template, token, until

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])


@pytest.fixture
async def process(database):
    async with running(database.url, shutdown_timeout=4, write_timeout=5) as server:
        yield server


def connect(session, server, user_id, **options):
    url = f"{server.url}/ws/channel/1?token={token(user_id)}"
    return session.ws_connect(url, protocols=["tollerchat.v1"], **options)


async def test_acked_messages_survive_kill_under_load(process, session, database):
    talkers = [Talker(session, process, f"t{n}", 1 + n % 3, pause=0.005) for n in range(6)]
    talkers.append(Talker(session, process, "listener", 4, pause=None))
    try:
        for _ in range(4):
            acked = sum(len(talker.acked) for talker in talkers) + 60
            await until(lambda: sum(len(talker.acked) for talker in talkers) > acked)  # noqa: B023
            process.kill()
            await in_thread(process.start)
        assert await wind_up(talkers, process, session, database.url) is None
    finally:
        await asyncio.gather(*(talker.cancel() for talker in talkers))


async def test_nonce_is_known_after_kill(process, session, database):
    ids = []
    for _ in range(2):
        async with connect(session, process, 1) as socket:
            await socket.send_json({"type": "message", "content": "once", "nonce": "n"})
            while (frame := await socket.receive_json(timeout=WAIT))["type"] != "ack":
                pass
            ids.append(frame["message_id"])
            process.kill()
            await in_thread(process.start)
    assert len(set(ids)) == 1
    assert database.contents() == ["once"]


async def test_sigterm_answers_what_was_read_and_closes_all_with_1001(process, session, database):
    """Nothing that is acked is missing, nothing is stored without an ack, and each connection is told."""
    sockets = [await connect(session, process, 1 + n) for n in range(8)]
    logs = [Log(f"client {n}", 1 + n) for n in range(8)]

    async def talk(socket, log):
        n = 0
        while True:
            frame = {"type": "message", "content": f"{log.name}-{n}", "nonce": f"{log.name}-{n}"}
            log.sent(frame)
            await socket.send_str(json.dumps(frame))
            n += 1
            await asyncio.sleep(0.002)

    async def listen(socket, log):
        while (message := await socket.receive(timeout=WAIT)).type is aiohttp.WSMsgType.TEXT:
            log.received(json.loads(message.data))
        return socket.close_code

    talking = [asyncio.ensure_future(talk(*pair)) for pair in zip(sockets, logs, strict=False)]
    listening = [asyncio.ensure_future(listen(*pair)) for pair in zip(sockets, logs, strict=False)]
    await until(lambda: all(len(log.events) > 200 for log in logs))
    process.signal(signal.SIGTERM)
    codes = await asyncio.gather(*listening)
    for task in talking:
        task.cancel()
    await asyncio.gather(*talking, return_exceptions=True)
    assert set(codes) == {1001}
    assert await in_thread(process.wait) == 0
    rows = rows_of(database.url)
    assert check(logs, rows) is None
    acked = {
        f["message_id"] for log in logs for what, f in log.events if what == "received" and f["type"] == "ack"
    }
    assert {row.message_id for row in rows} == acked


async def test_sigterm_waits_for_the_commit_of_what_was_read(process, session, database):
    async with connect(session, process, 1) as socket:
        database.execute("BEGIN")
        database.insert("before")  # holds the lock of the channel, so the commit must wait
        await socket.send_json({"type": "message", "content": "in flight", "nonce": "n"})
        await socket.send_json({"type": "unknown"})  # its answer tells that the message was read
        while (await socket.receive_json(timeout=WAIT))["type"] != "error":
            pass
        process.signal(signal.SIGTERM)
        await draining(session, process)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await connect(session, process, 2)
        assert refused.value.status == 503
        database.execute("COMMIT")
        frames = []
        while (message := await socket.receive(timeout=WAIT)).type is aiohttp.WSMsgType.TEXT:
            frames.append(json.loads(message.data))
        assert [frame["nonce"] for frame in frames if frame["type"] == "ack"] == ["n"]
        assert socket.close_code == 1001
    assert await in_thread(process.wait) == 0
    assert database.contents() == ["before", "in flight"]


async def test_sigterm_waits_for_one_who_is_behind_and_reads(database):
    """Its ack stands behind all that it was not sent yet."""
    database.insert(*["x" * 8000] * 500)
    async with running(database.url, shutdown_timeout=20) as process:
        with contextlib.closing(await RawClient.connect(process.port, after=0, buffer=1 << 20)) as alice:
            await alice.send({"type": "message", "content": "last", "nonce": "n"})
            await until(lambda: database.contents()[-1] == "last")
            await until(lambda: process.queued([alice])[0] > 1 << 20)
            process.signal(signal.SIGTERM)
            frames = []
            while (frame := await alice.frame()) is not None:
                frames.append(frame)
        assert [frame["type"] for frame in frames] == ["message"] * 500 + ["ack", "ready"]
        assert alice.code == 1001
        assert await in_thread(process.wait) == 0


async def draining(session, process):
    """Wait until `/health` says that the server takes nobody any more."""
    deadline = time.monotonic() + WAIT
    while True:
        async with session.get(process.url + "/health") as answer:
            if answer.status == 503:
                assert "Retry-After" in answer.headers
                return
        assert time.monotonic() < deadline


async def test_stuck_clients_do_not_delay_the_shutdown_nor_the_others(process, session, database):
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            stack.enter_context(contextlib.closing(await RawClient.connect(process.port, 2)))
        socket = await stack.enter_async_context(connect(session, process, 1))
        reader = await stack.enter_async_context(connect(session, process, 3))
        for n in range(400):
            await socket.send_json({"type": "message", "content": f"{n} {'x' * 8000}"})
        await until(lambda: len(database.contents()) == 400)
        while (await reader.receive_json(timeout=WAIT)).get("content", "")[:4] != "399 ":
            pass
        start = time.monotonic()
        process.signal(signal.SIGTERM)
        assert (await reader.receive(timeout=WAIT)).data == 1001
        assert time.monotonic() - start < 1
        assert await in_thread(process.wait) == 0
        assert time.monotonic() - start < 4.5


async def test_shutdown_answers_what_waits_for_a_database_that_hangs(database, session):
    settings = {"shutdown_timeout": 5, "db_timeout": 1.5, "store_timeout": 8}
    async with running(database.url, **settings) as process, connect(session, process, 1) as socket:
        await socket.send_json({"type": "message", "content": "connects"})
        while (await socket.receive_json(timeout=WAIT))["type"] != "ack":
            pass
        backends = database.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'tollerchat' AND datname = current_database()"
        )
        for (pid,) in backends:
            os.kill(pid, signal.SIGSTOP)
        try:
            for n in range(5):
                await socket.send_json({"type": "message", "content": "never", "nonce": f"n{n}"})
            await socket.send_json({"type": "unknown"})
            while (await socket.receive_json(timeout=WAIT))["type"] != "error":
                pass
            process.signal(signal.SIGTERM)
            frames = []
            while (message := await socket.receive(timeout=WAIT)).type is aiohttp.WSMsgType.TEXT:
                frames.append(json.loads(message.data))
            assert [(frame["code"], frame["nonce"]) for frame in frames] == [
                ("unavailable", f"n{n}") for n in range(5)
            ]
            assert socket.close_code == 1001
            assert await in_thread(process.wait) == 0
        finally:
            for (pid,) in backends:
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "lock", ["SELECT pg_advisory_xact_lock(1953459308, 1)", "LOCK TABLE messages IN SHARE MODE"]
)
async def test_shutdown_is_over_in_time_while_nothing_can_be_stored(process, session, database, lock):
    """What cannot be stored gets `unavailable`."""
    async with connect(session, process, 1) as socket:
        database.execute("BEGIN")
        database.execute(lock)
        await socket.send_json({"type": "message", "content": "never", "nonce": "n"})
        await socket.send_json({"type": "unknown"})
        while (await socket.receive_json(timeout=WAIT))["type"] != "error":
            pass
        start = time.monotonic()
        process.signal(signal.SIGTERM)
        frames = []
        while (message := await socket.receive(timeout=WAIT)).type is aiohttp.WSMsgType.TEXT:
            frames.append(json.loads(message.data))
        assert [(frame["code"], frame["nonce"]) for frame in frames] == [("unavailable", "n")]
        assert socket.close_code == 1001
        assert await in_thread(process.wait) == 0
        assert time.monotonic() - start < 4.5
        database.execute("ROLLBACK")
    assert database.contents() == []
