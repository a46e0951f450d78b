"""Lingering close, for a peer that is still sending."""

import asyncio
import contextlib
import os
import socket
from typing import Final

__all__ = ("linger",)

CHUNK: Final = 64 * 1024


async def linger(transport: asyncio.Transport, timeout: float) -> None:
    """Read and drop what the peer still sends, until it closes, at most for `timeout` seconds.

    A socket that is closed with unread data answers with a reset, and that may destroy the close frame
    on its way to the peer (RFC 9112, section 9.6). Call it when the transport was told to close but
    the loop has not run since; the connection lives on in a duplicate of its socket.
    """
    original = transport.get_extra_info("socket")
    try:
        duplicate = socket.socket(fileno=os.dup(original.fileno()))
    except OSError:
        return  # already closed
    with duplicate, contextlib.suppress(asyncio.TimeoutError, OSError):
        duplicate.setblocking(False)
        await asyncio.wait_for(_read_to_end(duplicate), timeout)


async def _read_to_end(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while await loop.sock_recv(connection, CHUNK):
        pass
