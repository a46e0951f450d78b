"""Who may join is asked of the database once, and again as soon as the answer may have changed."""

import asyncio

import aiohttp
import pytest

from tests.support import WAIT, Template, until
from tollerchat import bus
from tollerchat.app import hub_key, repository_key

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])


@pytest.fixture
async def queries(server, monkeypatch):
    """What the database is asked about access, once the server listens to it."""
    await until(lambda: server.app[hub_key].access.remembers)
    repository = server.app[repository_key]
    refusals, queries = repository.refusals, []

    def count(pairs):
        queries.append(set(pairs))
        return refusals(pairs)

    monkeypatch.setattr(repository, "refusals", count)
    await until(lambda: not queries)
    return queries


async def refused(server, user_id, channel_id):
    with pytest.raises(aiohttp.WSServerHandshakeError) as info:
        await server.connect(user_id, channel_id)
    return info.value.status


async def test_who_returns_is_not_looked_up_again(server, queries):
    for _ in range(3):
        chatter, _ = await server.join(1, 1)
        await chatter.socket.close()
    assert queries in ([], [{(1, 1)}])
    assert len(queries) == 1


async def test_many_who_come_at_once_are_one_query(server, queries):
    hub = server.app[hub_key]
    async with hub.access._one_query:  # another query is under way
        joining = [asyncio.ensure_future(server.join(user_id, 1)) for user_id in (1, 2, 3, 1, 2)]
        await until(lambda: 1 in hub.rooms and len(hub.rooms[1].audience.clients) == 5)
        assert hub.access._gathering == {(1, 1), (1, 2), (1, 3)}
    await asyncio.gather(*joining)
    assert queries == [{(1, 1), (1, 2), (1, 3)}]


async def test_refusals_are_looked_up_each_time(server, queries, database):
    assert await refused(server, 3, 3) == 403
    database.execute("INSERT INTO channel_users (user_id, channel_id) VALUES (3, 3)")
    await server.join(3, 3)
    assert await refused(server, 1, 999) == 404


@pytest.mark.parametrize(
    ("sql", "status"),
    [
        ("DELETE FROM channel_users WHERE user_id = 2", 403),
        ("DELETE FROM users WHERE id = 2", 403),
        ("DELETE FROM channels WHERE id = 3", 404),
        ("TRUNCATE channel_users", 403),
    ],
)
async def test_withdrawn_access_is_forgotten(server, queries, database, sql, status):
    chatter, _ = await server.join(2, 3)
    database.execute(sql)
    await chatter.closed()
    assert await refused(server, 2, 3) == status


async def test_nothing_is_remembered_while_changes_are_not_told(server, queries, database, monkeypatch):
    monkeypatch.setattr(bus, "RETRY_DELAY", 60)
    chatter, _ = await server.join(2, 3)
    await chatter.socket.close()
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE classid = 1953459309)"
    )
    await until(lambda: not server.app[hub_key].access.remembers)
    database.execute("DELETE FROM channel_users WHERE user_id = 2")
    assert await refused(server, 2, 3) == 403


async def test_access_withdrawn_while_one_joins_closes_with_4403(server, database, monkeypatch):
    """The database had said yes."""
    hub, repository = server.app[hub_key], server.app[repository_key]
    await until(lambda: hub.access.remembers)
    refusals, asked, go_on = repository.refusals, asyncio.Event(), asyncio.Event()

    async def answer_late(pairs):
        monkeypatch.setattr(repository, "refusals", refusals)
        answer = await refusals(pairs)
        asked.set()
        await go_on.wait()
        return answer

    monkeypatch.setattr(repository, "refusals", answer_late)
    joining = asyncio.ensure_future(server.connect(2, 3))
    await asyncio.wait_for(asked.wait(), WAIT)
    database.execute("DELETE FROM channel_users WHERE user_id = 2")
    await until(lambda: all(client._refusal for client in hub.rooms[3].audience.clients))
    go_on.set()
    assert await (await joining).closed() == 4403
