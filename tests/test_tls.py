"""Over TLS, where what is written must go through the transport, all is as it is without."""

import asyncio
import ssl
from pathlib import Path

import pytest

from tests.checker import Log, check, rows_of
from tests.support import WAIT, Chatter, Server, Template, token, until
from tollerchat.app import hub_key

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

CERTIFICATE = Path(__file__).with_name("tls.pem")


@pytest.fixture
async def server(config):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    async with Server.run(config, tls=context) as server:
        yield server


@pytest.fixture
def connect(server):
    """Open a channel at level tollerchat.v1."""
    trusted = ssl.create_default_context(cafile=CERTIFICATE)

    async def connect(user_id, **options):
        return Chatter(
            await server.session.ws_connect(
                f"{server.url}/ws/channel/1",
                headers={"Authorization": f"Bearer {token(user_id)}"},
                protocols=("tollerchat.v1",),
                ssl=trusted,
                **options,
            )
        )

    return connect


async def test_messages_acks_typing_and_the_close_code_arrive(server, connect, database):
    database.insert("history")
    alice, bob = await connect(1), await connect(2)
    for each in (alice, bob):
        assert [frame["type"] for frame in await each.receive_many(2)] == ["message", "ready"]
    await alice.send_frame({"type": "typing"})
    await alice.send("hello", nonce="n")
    assert (await alice.receive())["type"] == "ack"
    assert [frame["type"] for frame in await bob.receive_many(2)] == ["typing", "message"]
    server.app[hub_key].user_deleted(2)
    assert await bob.closed() == 4403
    assert await alice.settled() == []


async def test_slow_reader_loses_nothing(server, connect, database):
    """More is written meanwhile than all buffers hold, and then it sends."""
    slow, log = await connect(3), Log("slow", 3, complete=True)
    alice, alice_log = await connect(1), Log("alice", 1, complete=True)
    room = server.app[hub_key].rooms[1]
    (client,) = [each for each in room.audience.clients if each.user_id == 3]
    own = {"type": "message", "content": "its own", "nonce": "n"}

    async def listen(chatter, log, **last):
        while not log.events or log.events[-1][1].items().isdisjoint(last.items()):
            log.received(await chatter.receive())

    listening = asyncio.ensure_future(listen(alice, alice_log, content="the end"))
    count = 0
    while not client._socket.full:
        ids = database.insert(*("x" * 8000 + str(count + n) for n in range(20)))
        count += len(ids)
        await until(lambda last=ids[-1]: room.head == last)
    log.sent(own)
    await slow.send_frame(own)
    await asyncio.wait_for(listen(slow, log, type="ack"), WAIT)
    database.insert("the end")
    await asyncio.wait_for(asyncio.gather(listening, listen(slow, log, content="the end")), WAIT)
    assert check([log, alice_log], rows_of(database.url)) is None
