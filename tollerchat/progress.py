"""`Progress`: whether a peer that does not keep up reads at all."""

import asyncio
import socket
import sys
from typing import Final

__all__ = ("Progress",)

BYTES_ACKED: Final = slice(120, 128)  # of struct tcp_info, since Linux 4.1 (linux/tcp.h)


class Progress:
    """How a peer reads what waits for it, from loop time `now` on."""

    __slots__ = ("_seen_at", "_taken", "_transport")

    def __init__(self, transport: asyncio.Transport, now: float) -> None:
        self._transport = transport
        self._taken = _bytes_taken(transport)
        self._seen_at = now  # when it was last seen to read

    def is_stuck(self, now: float, timeout: float) -> bool:
        """Whether the peer, at loop time `now`, has read nothing for `timeout` seconds. Ask regularly."""
        if (taken := _bytes_taken(self._transport)) > self._taken:
            self._taken, self._seen_at = taken, now
        return now - self._seen_at >= timeout


def _bytes_taken(transport: asyncio.Transport) -> int:
    """A count of what the peer's kernel has taken.

    Our buffers alone would not tell: the kernel takes from them in steps of tens of KB.
    """
    if sys.platform == "linux":
        try:
            sock = transport.get_extra_info("socket")
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED.stop)
        except (OSError, ValueError):  # a Unix socket, or one that is closed
            pass
        else:
            if len(info) == BYTES_ACKED.stop:
                return int.from_bytes(info[BYTES_ACKED], sys.byteorder)
    return -transport.get_write_buffer_size()
