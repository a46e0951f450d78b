"""The promises once more, mounted in another application, whose cleanup comes before ours."""

import asyncio
import contextlib

import pytest
from aiohttp import web

from tests.checker import Log, check, rows_of
from tests.raw_client import RawClient
from tests.support import Template, until
from tollerchat import create_app
from tollerchat.app import hub_key

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])


class Outer:
    """An application with a resource of its own, and the chat under /chat."""

    def __init__(self, config):
        self.order = []
        self.chat = create_app(config)
        self.chat.on_shutdown.append(self._drained)
        self.app = web.Application()
        self.app.cleanup_ctx.append(self._resource)
        self.app.add_subapp("/chat", self.chat)

    async def _resource(self, app):
        yield
        self.order.append("the outer application's cleanup")

    async def _drained(self, app):
        assert app[hub_key].draining
        self.order.append("the chat's drain")


@pytest.fixture
def outer(config):
    return Outer(config)


@pytest.fixture
async def mounted(serve, outer):
    return await serve(app=outer.app, prefix="/chat")


async def test_message_reaches_the_others_once_and_is_acked(mounted, database):
    (alice, _), (bob, _) = await mounted.join(1), await mounted.join(2)
    for _ in range(2):
        await alice.send("hello", nonce="n")
    acks = [await alice.receive() for _ in range(2)]
    assert len({ack["message_id"] for ack in acks}) == 1
    assert [frame["content"] for frame in await bob.settled()] == ["hello"]
    assert await alice.settled() == []
    assert database.contents() == ["hello"]


async def test_resume_and_foreign_rows(mounted, database):
    ids = database.insert(*(f"m{n}" for n in range(200)))
    bob, history = await mounted.join(2, after=ids[9])
    assert [frame["message_id"] for frame in history] == ids[10:]
    live = database.insert("live")
    assert [(await bob.receive())["message_id"]] == live


async def test_messages_in_flight_at_shutdown_are_committed_and_acked(outer, database):
    """They wait for a channel that somebody has locked when the application begins to stop."""
    clients, logs = [], []
    async with contextlib.AsyncExitStack() as stack:
        runner = web.AppRunner(outer.app, shutdown_timeout=1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        for user_id in range(1, 6):
            client = await RawClient.connect(runner.addresses[0][1], user_id, after=0, prefix="/chat")
            stack.callback(client.close)
            clients.append(client)
            logs.append(Log(f"user {user_id}", user_id, after=0))
        database.execute("BEGIN")
        database.insert("holds the lock")
        for client, log in zip(clients, logs, strict=False):
            frames = [{"type": "message", "content": f"{log.name}: {n}", "nonce": f"{n}"} for n in range(10)]
            for frame in frames:
                log.sent(frame)
            await client.send(*frames, {"type": "unknown"})
            while not log.events or log.events[-1][1]["type"] != "error":
                log.received(await client.frame())
        stopping = asyncio.ensure_future(runner.cleanup())
        await until(lambda: outer.chat[hub_key].draining)
        database.execute("COMMIT")
        for client, log in zip(clients, logs, strict=False):
            while (frame := await client.frame()) is not None:
                log.received(frame)
            assert client.code == 1001
        await stopping
        assert outer.order == ["the chat's drain", "the outer application's cleanup"]
    rows = rows_of(database.url)
    assert len(rows) == 51
    acks = [
        frame for log in logs for what, frame in log.events if what == "received" and frame["type"] == "ack"
    ]
    assert len(acks) == 50
    assert check(logs, rows) is None
