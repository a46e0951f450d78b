"""Queries that wait for a connection: each gets its turn, or an answer in time."""

import asyncio
import contextlib
import types

import psycopg2
import pytest

from tests.support import SECRET, WAIT
from tollerchat import Config
from tollerchat import pool as pool_module
from tollerchat.connection import ConnectionWatch
from tollerchat.database import open_connection
from tollerchat.errors import Unavailable
from tollerchat.pool import Pool


async def nothing(connection):
    pass


@pytest.fixture
def one(database):
    """One connection for all; nothing watches it, so its queries may take as long as they like."""
    config = Config(db_url=database.url, jwt_secret=SECRET, db_timeout=0.3)
    with contextlib.closing(Pool(config, ConnectionWatch(), 1, nothing)) as one:
        yield one


def start(pool, sql):
    return asyncio.create_task(pool.run(sql, None))


async def test_queries_run_in_the_order_of_asking(one):
    done = []
    tasks = [start(one, f"SELECT {n}") for n in range(20)]
    for task in tasks:
        task.add_done_callback(lambda task: done.append(task.result()[0][0]))
    await asyncio.wait_for(asyncio.gather(*tasks), WAIT)
    assert done == list(range(20))


async def test_query_that_waits_too_long_is_refused_and_the_others_go_on(one):
    first = start(one, "SELECT pg_sleep(0.6)")
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="too many queries") as refused:
        await asyncio.wait_for(one.run("SELECT 1", None), WAIT)
    assert not refused.value.sent
    await first
    assert await one.run("SELECT 2", None) == [(2,)]


async def test_one_that_gives_up_passes_its_turn_on(one):
    first, second, third = (start(one, f"SELECT {n}") for n in (1, 2, 3))
    first.add_done_callback(lambda _: second.cancel())  # it has its turn by now, and has not run yet
    await asyncio.wait([first, second, third], timeout=WAIT)
    assert second.cancelled()
    assert third.result() == [(3,)]
    assert await one.run("SELECT 4", None) == [(4,)]


@pytest.fixture
def few_connections(monkeypatch):
    """A database that has so many connections for us, and no more."""
    few_connections = types.SimpleNamespace(most=2, made=[], tried=0)
    made = few_connections.made

    async def open_some(config, watch):
        few_connections.tried += 1
        made[:] = [each for each in made if not (each.done() and each.result().closed)]
        if len(made) >= few_connections.most:
            raise psycopg2.OperationalError("FATAL: too many connections")
        made.append(asyncio.ensure_future(open_connection(config, watch)))
        return await made[-1]

    monkeypatch.setattr(pool_module, "open_connection", open_some)
    return few_connections


@pytest.fixture
def pool(database):
    """Four places for connections."""
    config = Config(db_url=database.url, jwt_secret=SECRET, db_timeout=5)
    with contextlib.closing(Pool(config, ConnectionWatch(), 4, nothing)) as pool:
        yield pool


async def test_where_connections_are_few_those_that_there_are_serve_all(pool, few_connections):
    assert await pool.run("SELECT 1", None) == [(1,)]
    for _ in range(3):
        queries = [start(pool, f"SELECT {n}") for n in range(20)]
        assert await asyncio.wait_for(asyncio.gather(*queries), WAIT) == [[(n,)] for n in range(20)]
    for n in range(10):
        assert await asyncio.wait_for(pool.run(f"SELECT {n}", None), WAIT) == [(n,)]
    assert len(few_connections.made) == 2
    assert few_connections.tried <= 4  # not again with each query


async def test_one_that_is_refused_is_given_a_connection_that_another_does_not_need(pool, few_connections):
    await asyncio.wait_for(asyncio.gather(start(pool, "SELECT 1"), start(pool, "SELECT 2")), WAIT)
    others = Pool(pool._config, ConnectionWatch(), 1, nothing, pool.spare)
    with contextlib.closing(others):
        with pytest.raises(Unavailable):
            await others.run("SELECT 3", None)
        assert await others.run("SELECT 3", None) == [(3,)]
        assert await asyncio.wait_for(pool.run("SELECT 4", None), WAIT) == [(4,)]  # it keeps the last one
    pool.spare()
    assert await asyncio.wait_for(pool.run("SELECT 5", None), WAIT) == [(5,)]


async def test_idle_connection_that_died_does_not_hide_one_that_lives(pool, few_connections):
    await asyncio.wait_for(asyncio.gather(start(pool, "SELECT 1"), start(pool, "SELECT 2")), WAIT)
    few_connections.most = 1
    pool._idle[-1].close()
    assert await asyncio.wait_for(pool.run("SELECT 3", None), WAIT) == [(3,)]


async def test_without_any_connection_all_are_told_at_once(pool, few_connections):
    few_connections.most = 0
    tasks = [start(pool, "SELECT 1") for _ in range(20)]
    done, _ = await asyncio.wait(tasks, timeout=2)
    assert len(done) == 20
    assert all(isinstance(task.exception(), Unavailable) for task in done)
    few_connections.most = 4
    assert await asyncio.wait_for(asyncio.gather(*(start(pool, "SELECT 1") for _ in range(20))), WAIT)
    assert len(few_connections.made) == 4
