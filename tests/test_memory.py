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


def parts():
    return [each for each in gc.get_objects() if isinstance(each, PARTS)]


@pytest.mark.parametrize("ending", ["handshake", "cut"])
async def test_memory_of_a_connection_is_free_at_once(server, ending, without_collector):
    rooms = server.app[hub_key].rooms
    before = {id(each): each for each in parts()}  # of other tests: kept, so that none of them goes meanwhile

    def left():
        return any(id(each) not in before for each in parts())

    for user_id in (1, 2):
        chatter, _ = await server.join(user_id, 1)
        await chatter.send("hello")
        assert (await chatter.receive())["type"] == "ack"
        assert left()
        if ending == "handshake":
            await chatter.socket.close()
        else:
            chatter.socket._response.connection.transport.abort()
        await until(lambda: not rooms)
    await until(lambda: not left())
