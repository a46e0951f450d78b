"""What a `WebSocket` must cope with, in moments that real sockets rarely have."""

import asyncio
import os
import socket
import ssl
from unittest import mock

import pytest

from tests.raw_client import client_frame
from tests.support import WAIT
from tollerchat import turns as turns_module
from tollerchat.reader import FRAMES
from tollerchat.turns import Turns
from tollerchat.websocket import BUFFER_LIMIT, WebSocket

ANSWER = b"answer" * 200_000
CLOSE_1000 = b"\x88\x82\0\0\0\0\x03\xe8"


class Listener:
    """Whose connection it is, and what it is told."""

    def __init__(self):
        self.websocket = None
        self.heard = []
        self.gone = asyncio.Event()
        self.descriptors = []  # when they changed
        self.patience = None  # how much it hears until it is busy

    def read_pump(self, text):
        self.heard.append(text)
        self.websocket.busy = self.patience is not None and len(self.heard) >= self.patience

    def descriptor_changed(self):
        self.descriptors.append(self.websocket.descriptor)

    def drained(self):
        pass

    def write_ended(self):
        pass

    def lost(self):
        self.heard.append("lost")
        self.gone.set()


@pytest.fixture
def transport():
    with socket.socket() as sock:
        transport = mock.Mock(
            get_write_buffer_size=lambda: BUFFER_LIMIT + 1, get_extra_info=lambda name: sock
        )
        transport.is_closing = lambda: transport.close.called
        yield transport


@pytest.fixture
async def listener(transport):
    listener = Listener()
    listener.websocket = WebSocket(transport, listener, Turns(), max_size=8192)
    return listener


@pytest.fixture
async def peer():
    """The other end of a real connection, whose listener has 1 MB of an answer in its transport."""
    ours, peer = socket.socketpair()
    with peer:
        peer.setblocking(False)
        transport, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
        transport.write(ANSWER)
        listener = Listener()
        listener.websocket = WebSocket(transport, listener, Turns(), max_size=8192)
        listener.websocket.take_over(mock.Mock(protocol=mock.Mock(writing_paused=True)))
        yield Peer(peer, listener)
        transport.abort()
        await asyncio.wait_for(listener.gone.wait(), WAIT)


class Peer:
    def __init__(self, sock, listener):
        self.websocket = listener.websocket
        self.listener = listener
        self._socket = sock

    def hang_up(self):
        self._socket.close()

    async def read(self, size):
        data = bytearray()
        while len(data) < size:
            received = asyncio.get_running_loop().sock_recv(self._socket, size - len(data))
            if not (part := await asyncio.wait_for(received, WAIT)):
                raise EOFError
            data += part
        return bytes(data)


async def turns(count=10):
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("paused", [True, False])
async def test_full_buffer_is_taken_over_as_such(listener, paused):
    """Answers to requests before the upgrade fill it, and the transport tells only once that it is full."""
    websocket = listener.websocket
    websocket.take_over(mock.Mock(protocol=mock.Mock(writing_paused=paused)))
    assert websocket.full is paused
    assert websocket.is_stuck(asyncio.get_running_loop().time() + 10, 10) is paused


async def test_connection_is_read_whoever_paused_it_and_not_when_too_much_waits(listener, transport):
    listener.websocket.take_over(mock.Mock(protocol=mock.Mock(writing_paused=False)))
    assert transport.mock_calls[-1] == mock.call.resume_reading()
    texts = [letter * 8000 for letter in "abc"]
    listener.websocket.data_received(b"".join(client_frame(text.encode()) for text in texts))
    assert transport.mock_calls[-1] == mock.call.pause_reading()
    await turns(20)
    assert listener.heard == texts
    assert transport.mock_calls[-1] == mock.call.resume_reading()


@pytest.mark.parametrize("told", ["end and loss", "loss"])
async def test_what_came_before_the_end_is_heard(listener, told):
    """With TLS, the end may be told before all that came ahead of it is parsed."""
    texts = [letter * 3000 for letter in "abcd"]
    listener.websocket.data_received(b"".join(client_frame(text.encode()) for text in texts))
    if told == "end and loss":
        listener.websocket.eof_received()
    listener.websocket.connection_lost(None)
    assert "lost" not in listener.heard
    await turns(20)
    assert listener.heard == [*texts, "lost"]


@pytest.mark.parametrize("end", ["loss", "nonsense"])
async def test_busy_listener_hears_the_rest_later(listener, transport, end):
    websocket = listener.websocket
    texts = [f"text {n}" for n in range(100)]
    listener.patience = 10
    nonsense = b"\xff\xff" if end == "nonsense" else b""
    websocket.data_received(b"".join(client_frame(text.encode()) for text in texts) + nonsense)
    for patience in (10, 50):
        listener.patience = patience
        websocket.busy = False
        websocket.read_on()
        await turns()
        assert listener.heard == texts[:patience]
    if end == "loss":
        websocket.connection_lost(None)
    assert not transport.write.called
    listener.patience = None
    websocket.busy = False
    websocket.read_on()
    await turns()
    assert listener.heard == texts + (["lost"] if end == "loss" else [])
    assert transport.write.called == (end == "nonsense")  # a close frame


async def test_many_small_frames_are_heard_in_turns(listener, monkeypatch):
    """Or each of those who send them would keep the loop from all others."""
    monkeypatch.setattr(turns_module, "BUDGET", 0)
    listener.websocket.data_received(client_frame(b"") * 600)
    most = 0
    while len(listener.heard) < 600:
        before = len(listener.heard)
        await asyncio.sleep(0)
        most = max(most, len(listener.heard) - before)
    assert most <= FRAMES


@pytest.mark.parametrize("patience", [None, 1])
async def test_frame_that_cannot_be_dealt_with_ends_the_connection(listener, transport, patience):
    """Also where it had to wait for its turn."""
    listener.patience = patience
    websocket, received = listener.websocket, listener.read_pump
    listener.read_pump = mock.Mock(side_effect=lambda text: received(text) if text == "good" else 1 / 0)
    websocket.data_received(client_frame(b"good") + client_frame(b"bad") + client_frame(b"good"))
    await turns()
    listener.patience = None
    websocket.busy = False
    websocket.read_on()
    await turns()
    assert listener.heard == ["good"]
    assert [call.args[0][:4] for call in transport.write.call_args_list] == [b"\x88\x10\x03\xf3"]


async def test_nothing_is_heard_behind_a_close_frame(listener, transport):
    listener.websocket.data_received(
        client_frame(b"before") + CLOSE_1000 + client_frame(b"behind") + CLOSE_1000
    )
    await turns()
    assert listener.heard == ["before"]
    transport.close.assert_called_once_with()  # asyncio's TLS forgets the connection at the second call
    assert [call.args for call in transport.write.call_args_list] == [(b"\x88\x02\x03\xe8",)]
    listener.websocket.connection_lost(None)
    assert listener.heard == ["before", "lost"]


async def test_nothing_is_heard_after_we_closed(listener):
    listener.websocket.close(1001, "bye")
    listener.websocket.data_received(client_frame(b"behind") * 2000)
    listener.websocket.connection_lost(None)
    await turns()
    assert listener.heard == ["lost"]


@pytest.mark.parametrize("size", [10, 1000, 50_000])
async def test_what_is_written_arrives_whole_and_in_order(peer, size):
    """Whether the system takes it at once, or a part of it, or the transport has it for a while."""
    websocket = peer.websocket
    assert websocket.transport.get_write_buffer_size()
    frames = [bytes([n]) * size for n in range(240)]
    sent = list(frames)
    for _ in range(100):
        websocket.write(sent.pop(0))
    received = await peer.read(len(ANSWER) + 50 * size)
    while sent:
        websocket.write(sent.pop(0))
        websocket.hold()
        websocket.write(sent.pop(0))
        websocket.write(sent.pop(0))
        websocket.release()
        websocket.write(sent.pop(0))
        received += await peer.read(5 * size if len(received) < len(ANSWER) + 200 * size else 3 * size)
    received += await peer.read(len(ANSWER) + 240 * size - len(received))
    assert received == ANSWER + b"".join(frames)


async def test_nothing_is_written_to_a_descriptor_that_was_given_back(peer):
    """It may be another connection's by then."""
    await peer.read(len(ANSWER))
    peer.websocket.write(b"before")
    assert await peer.read(6) == b"before"
    descriptor = peer.websocket.transport.get_extra_info("socket").fileno()
    others, another = socket.socketpair()
    with others, another:
        peer.websocket.transport.abort()
        await asyncio.wait_for(peer.listener.gone.wait(), WAIT)
        await turns()
        os.dup2(another.fileno(), descriptor)
        try:
            peer.websocket.write(b"behind")
            peer.websocket.close(1001, "bye")
        finally:
            os.close(descriptor)
        others.setblocking(False)
        with pytest.raises(BlockingIOError):
            others.recv(1)


async def test_what_is_held_stays_ahead_of_what_follows(peer):
    """Also where it is too much for the system, and nobody reads meanwhile."""
    await peer.read(len(ANSWER))
    websocket = peer.websocket
    websocket.write(b"first")
    websocket.hold()
    websocket.write(b"x" * 500_000)
    assert websocket.descriptor == -1
    websocket.write(b"second")
    websocket.release()
    websocket.write(b"third")
    assert peer.listener.descriptors == [-1]
    assert await peer.read(5 + 500_000 + 11) == b"first" + b"x" * 500_000 + b"secondthird"


async def test_nothing_follows_a_close_frame(peer):
    await peer.read(len(ANSWER))
    peer.websocket.write(b"before")
    peer.websocket.close(1001, "")
    peer.websocket.write(b"behind")
    assert await peer.read(10) == b"before\x88\x02\x03\xe9"
    peer.websocket.transport.close()
    with pytest.raises(EOFError):
        await peer.read(1)


async def test_write_to_a_peer_that_is_gone_ends_the_connection(peer):
    await peer.read(len(ANSWER))
    peer.hang_up()
    while not peer.websocket.closing:
        peer.websocket.write(b"x" * 100_000)
        await asyncio.sleep(0)
    await asyncio.wait_for(peer.listener.gone.wait(), WAIT)


async def test_with_tls_all_goes_through_the_transport():
    ours, peers = socket.socketpair()
    with ours, peers:
        extra = {"socket": ours, "sslcontext": ssl.create_default_context()}
        transport = mock.Mock(
            get_write_buffer_size=lambda: 0, is_closing=lambda: False, get_extra_info=extra.get
        )
        websocket = WebSocket(transport, Listener(), Turns(), max_size=8192)
        websocket.write(b"a")
        websocket.write(b"b")
        assert websocket.descriptor == -1
        assert [call.args for call in transport.write.call_args_list] == [(b"a",), (b"b",)]
        peers.setblocking(False)
        with pytest.raises(BlockingIOError):
            peers.recv(1)
