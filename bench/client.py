"""One connection of the load generator, and just enough of WebSocket for it."""

import os
import socket
from collections.abc import Iterator

__all__ = ("Client", "Refused", "client_frame")


def client_frame(payload: bytes) -> bytes:
    """A whole, masked text frame (RFC 6455, section 5.2)."""
    mask = os.urandom(4)
    size = len(payload)
    head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
    return head + mask + bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))


class Refused(Exception):
    """The server asked to try again later."""


class Client:
    """A connection. Senders have a `frame` to send, and the `marker` that their answer contains."""

    __slots__ = ("awaited", "fd", "frame", "marker", "request", "rest", "sock", "tail")

    sock: socket.socket
    fd: int

    def __init__(self, request: bytes = b"", awaited: int = 0) -> None:
        self.request = request
        self.awaited = awaited  # frames, while joining
        self.rest = b""  # what was received of an unfinished frame
        self.frame = b""
        self.marker = b""
        self.tail = b""

    def will_send(self, frame: bytes, marker: bytes = b"") -> "Client":
        self.frame = frame
        self.marker = marker
        self.tail = bytes(max(len(marker) - 1, 0))
        return self

    def send(self) -> None:
        self.sock.send(self.frame)

    def joined(self, data: bytes) -> bool:
        """Whether, with `data`, it has its upgrade and all awaited frames. Raises `Refused`."""
        data = self.rest + data
        self.rest = b""
        if data.startswith(b"HTTP/"):
            head, separator, frames = data.partition(b"\r\n\r\n")
            if not separator:
                self.rest = data
                return False
            if head.startswith(b"HTTP/1.1 503"):
                raise Refused
            if b" 101 " not in head[:16]:
                raise ConnectionError(f"not upgraded: {data.decode(errors='replace')}")
            data = frames
        position = 0
        for end, is_last in frame_ends(data):
            position = end
            self.awaited -= is_last
        self.rest = data[position:]
        return self.awaited <= 0


def frame_ends(data: bytes) -> Iterator[tuple[int, bool]]:
    """Where each whole frame ends, and whether it is the last one of its message."""
    start = 0
    while start + 2 <= len(data):
        size, head = data[start + 1], 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[start + 2 : start + head], "big")
        if (end := start + head + size) > len(data) or start + head > len(data):
            return
        if data[start] & 0x0F == 8:
            raise ConnectionError(f"closed by the server: {data[start + head : end]!r}")
        yield end, data[start] >= 0x80
        start = end
