"""Connections to PostgreSQL, in moments that real ones rarely have."""

import asyncio
import contextlib
import os

import pytest

from tests.support import WAIT
from tollerchat import connection
from tollerchat.connection import ConnectionWatch, connect


@pytest.fixture
async def watched(database, monkeypatch):
    """A connection, and the watch that looks at it all the time."""
    monkeypatch.setattr(connection, "WATCH_INTERVAL", 0.01)
    watch = ConnectionWatch()
    watched = await connect(database.url, timeout=WAIT)
    watch.add(watched)
    watching = asyncio.create_task(watch.run())
    with contextlib.closing(watched):
        yield watched, watching
    watching.cancel()
    await asyncio.wait([watching])


async def query(conn, sql, timeout=WAIT):
    conn._timeout = timeout
    return await conn.query(sql)


async def test_query_that_takes_too_long_is_given_up_with_its_connection(watched):
    conn, _ = watched
    with pytest.raises(asyncio.TimeoutError):
        await query(conn, "SELECT pg_sleep(60)", timeout=0.05)
    assert conn.closed


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
async def test_answer_that_came_while_the_server_stood_still_is_read_before_its_query_is_given_up(watched):
    conn, _ = watched
    answer = asyncio.create_task(query(conn, "SELECT 1 FROM pg_sleep(0.2)", timeout=1))
    stop = f"kill -STOP {os.getpid()}; sleep 1.5; kill -CONT {os.getpid()}"
    process = await asyncio.create_subprocess_exec("sh", "-c", stop)
    assert await answer == [(1,)]
    assert await query(conn, "SELECT 2") == [(2,)]
    await process.wait()


@pytest.mark.parametrize(("asked", "attributes"), [("", "primary"), ("&target_session_attrs=any", "any")])
async def test_standby_is_not_taken_for_the_database_unless_somebody_wants_that(database, asked, attributes):
    """Its log may lag behind what is committed."""
    with contextlib.closing(await connect(database.url + asked, timeout=WAIT)) as conn:
        assert conn.raw.info.dsn_parameters["target_session_attrs"] == attributes


def test_connection_whose_descriptor_is_closed_already_can_be_closed(database):
    """By libpq, while it was still sending; asyncio's loop complains of it, uvloop does not."""

    async def close():
        conn = await connect(database.url, timeout=WAIT)
        conn._watch_for_writing(True)
        os.close(conn._fileno)
        conn.close()
        assert conn.closed

    with contextlib.closing(asyncio.SelectorEventLoop()) as loop:
        loop.run_until_complete(close())


async def test_query_that_is_cancelled_when_its_time_is_over_does_not_end_the_watch(watched):
    conn, watching = watched
    waiting = asyncio.create_task(query(conn, "SELECT pg_sleep(60)", timeout=0))
    await asyncio.sleep(0)  # it is sent
    waiting.cancel()
    conn.check()  # the cancellation has reached the query, but not its coroutine
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert conn.closed
    assert not watching.done()


async def test_query_that_is_larger_than_the_systems_buffers_is_sent_to_its_end(watched):
    conn, _ = watched
    assert await query(conn, f"SELECT length('{'x' * 8_000_000}')") == [(8_000_000,)]


async def test_failed_query_does_not_end_the_notifications(watched, database):
    conn, _ = watched
    await query(conn, "LISTEN tollerchat")
    with pytest.raises(Exception, match="division by zero"):
        await query(conn, "SELECT 1 / 0")
    database.execute("SELECT pg_notify('tollerchat', 'after it')")
    assert await asyncio.wait_for(conn.notified(10), WAIT) == ["after it"]


async def test_notification_that_comes_with_an_answer_is_heard(watched, database):
    """PostgreSQL holds it back while queries run, and then sends both in one packet."""
    conn, _ = watched
    await query(conn, "LISTEN tollerchat")
    waiting = asyncio.create_task(query(conn, "SELECT pg_sleep(0.5); SELECT 1"))
    await asyncio.sleep(0)  # it is sent
    database.execute("SELECT pg_notify('tollerchat', 'meanwhile')")
    await waiting
    conn.look()
    assert await asyncio.wait_for(conn.notified(10), WAIT) == ["meanwhile"]


async def test_end_of_a_connection_is_the_end_of_its_notifications(watched, database):
    conn, _ = watched
    await query(conn, "LISTEN tollerchat")
    hearing = asyncio.create_task(conn.notified(10))
    database.execute(f"SELECT pg_terminate_backend({conn.raw.get_backend_pid()})")
    with pytest.raises(Exception, match="closed"):
        await asyncio.wait_for(hearing, WAIT)
    assert conn.closed
