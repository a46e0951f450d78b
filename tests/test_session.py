"""Queries that wait for a connection: each gets its turn, or an answer in time."""

import asyncio
import contextlib

import pytest

from tests.support import SECRET, WAIT
from tollerchat import Config
from tollerchat.connection import ConnectionWatch
from tollerchat.errors import Unavailable
from tollerchat.session import Sessions


async def nothing(connection):
    pass


@pytest.fixture
def sessions(database):
    """One connection for all; nothing watches it, so its queries may take as long as they like."""
    config = Config(db_url=database.url, jwt_secret=SECRET, db_timeout=0.3)
    with contextlib.closing(Sessions(config, ConnectionWatch(), 1, nothing)) as sessions:
        yield sessions


def start(sessions, sql):
    return asyncio.create_task(sessions.run(sql, None))


async def test_queries_run_in_the_order_of_asking(sessions):
    done = []
    tasks = [start(sessions, f"SELECT {n}") for n in range(20)]
    for task in tasks:
        task.add_done_callback(lambda task: done.append(task.result()[0][0]))
    await asyncio.wait_for(asyncio.gather(*tasks), WAIT)
    assert done == list(range(20))


async def test_query_that_waits_too_long_is_refused_and_the_others_go_on(sessions):
    first = start(sessions, "SELECT pg_sleep(0.6)")
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="too many queries") as refused:
        await asyncio.wait_for(sessions.run("SELECT 1", None), WAIT)
    assert not refused.value.sent
    await first
    assert await sessions.run("SELECT 2", None) == [(2,)]


async def test_one_that_gives_up_passes_its_turn_on(sessions):
    first, second, third = (start(sessions, f"SELECT {n}") for n in (1, 2, 3))
    first.add_done_callback(lambda _: second.cancel())  # it has its turn by now, and has not run yet
    await asyncio.wait([first, second, third], timeout=WAIT)
    assert second.cancelled()
    assert third.result() == [(3,)]
    assert await sessions.run("SELECT 4", None) == [(4,)]
