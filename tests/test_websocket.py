"""What a `WebSocket` finds where it takes a connection over: moments that real sockets rarely have."""

import socket
from unittest import mock

import pytest

from tollerchat.websocket import BUFFER_LIMIT, WebSocket


@pytest.mark.parametrize("paused", [True, False])
async def test_full_buffer_is_taken_over_as_such(paused):
    """Answers to requests before the upgrade fill it, and the transport tells only once that it is full."""
    with socket.socket() as sock:
        transport = mock.Mock(
            get_write_buffer_size=lambda: BUFFER_LIMIT + 1, get_extra_info=lambda name: sock
        )
        request = mock.Mock(protocol=mock.Mock(writing_paused=paused))
        websocket = WebSocket(transport, mock.Mock(), 8192)
        websocket.take_over(request)
        assert websocket.full is paused
        assert websocket.is_stuck(websocket.heard_at + 10, 10) is paused
