"""What a connection leaves behind when it is gone: nothing that only the garbage collector would find."""

import gc

import pytest

from tests.support import Template, until
from tollerchat.app import hub_key
from tollerchat.client import Client
from tollerchat.outbox import Outbox
from tollerchat.reader import FrameReader
from tollerchat.websocket import WebSocket

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

PARTS = (Client, FrameReader, Outbox, WebSocket)


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive():
    return sum(isinstance(each, PARTS) for each in gc.get_objects())


@pytest.mark.parametrize("ending", ["handshake", "cut"])
async def test_memory_of_a_connection_is_free_at_once(server, ending, without_collector):
    rooms = server.app[hub_key].rooms
    before = alive()
    for user_id in (1, 2):
        chatter, _ = await server.join(user_id, 1)
        await chatter.send("hello")
        assert (await chatter.receive())["type"] == "ack"
        assert alive() > before
        if ending == "handshake":
            await chatter.socket.close()
        else:
            chatter.socket._response.connection.transport.abort()
        await until(lambda: not rooms)
    await until(lambda: alive() == before)
