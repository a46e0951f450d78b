"""What others write comes through, also where the database has too few connections for us."""

import psycopg2
import pytest

from tests.support import Template, until
from tollerchat import bus
from tollerchat.app import hub_key, repository_key
from tollerchat.errors import Unavailable

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

LISTENERS = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'tollerchat' AND pid IN (
        SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2
    )"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.05)
    monkeypatch.setattr(bus, "RETRY_DELAY", 0.05)


@pytest.fixture
def fail(monkeypatch):
    """Let a method fail as often as it is called; returns the calls."""

    def fail(part, name, error):
        calls = []

        async def failing(*arguments, **options):
            calls.append(arguments)
            raise error

        monkeypatch.setattr(part, name, failing)
        return calls

    return fail


async def listening(server):
    await until(lambda: server.app[hub_key].access.remembers)


async def lose_the_listener(database, fail):
    """Its connection is cut, and it gets no other."""
    calls = fail(bus, "open_connection", psycopg2.OperationalError("FATAL: too many connections"))
    ((pid,),) = database.execute(LISTENERS)
    database.execute("SELECT pg_terminate_backend(%s)", pid)
    await until(lambda: calls)


@pytest.mark.parametrize("query", ["newest_ids", "ids_restarted"])
async def test_failed_comparison_does_not_cost_the_connection_that_listens(
    server, database, monkeypatch, fail, query
):
    await listening(server)
    client, _ = await server.join(1, 1)
    listeners = database.execute(LISTENERS)
    assert len(listeners) == 1
    calls = fail(server.app[repository_key], query, Unavailable("no connection is left"))
    database.insert("unseen")
    await until(lambda: len(calls) >= 3)
    monkeypatch.undo()
    assert (await client.receive())["content"] == "unseen"
    await until(lambda: server.app[hub_key].access.remembers)
    assert database.execute(LISTENERS) == listeners


async def test_while_a_change_of_access_cannot_be_looked_up_nobody_is_let_in_by_memory(
    server, database, monkeypatch, fail
):
    await listening(server)
    await server.join(1, 1)
    access = server.app[hub_key].access
    calls = fail(server.app[repository_key], "refusals", Unavailable("no connection is left"))
    database.execute("UPDATE channels SET is_private = true WHERE id = 1")
    await until(lambda: len(calls) >= 3 and not access.remembers)
    assert not access._known
    monkeypatch.undo()
    await listening(server)


async def test_what_others_write_comes_also_while_nobody_listens(server, database, monkeypatch, fail):
    await listening(server)
    client, _ = await server.join(1, 1)
    await lose_the_listener(database, fail)
    for content in ("one", "two"):
        database.insert(content)
        assert (await client.receive())["content"] == content
    assert not server.app[hub_key].access.remembers
    monkeypatch.undo()
    await listening(server)


async def test_who_loses_access_is_closed_also_while_nobody_listens(server, database, monkeypatch, fail):
    await listening(server)
    _, (bob, _) = await server.join(1, 1), await server.join(2, 1)
    database.insert("deleted", "kept")
    assert await bob.receive_contents(2) == ["deleted", "kept"]
    await lose_the_listener(database, fail)
    database.execute("DELETE FROM messages WHERE content = 'deleted'; DELETE FROM users WHERE id = 2")
    assert await bob.closed() == 4403
    await until(lambda: not server.app[hub_key].rooms[1].tail._frames)
    _, history = await server.join(3, 1)
    assert [frame["content"] for frame in history] == ["kept"]
    monkeypatch.undo()
    await listening(server)
