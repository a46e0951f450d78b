"""A WebSocket client that does what no library would: stop reading, and send many frames at once."""

import asyncio
import base64
import json
import os
import socket

from tests.support import WAIT, token

__all__ = ("RawClient", "unframe")


class RawClient:
    """A WebSocket client on a bare socket: it reads when told to, and can send many frames at once."""

    def __init__(self, sock):
        self.socket = sock
        self.code = None  # of the close frame
        self._data = bytearray()

    @classmethod
    async def connect(cls, port, user_id=1, channel_id=1, *, after=None, prefix="", buffer=4096, behind=b""):
        """Open a channel; `behind` is sent right behind the request, without waiting for its answer."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)  # else the kernel reads megabytes for it
        sock.setblocking(False)
        self = cls(sock)
        try:
            await self._open(port, user_id, channel_id, after, prefix, behind)
        except BaseException:
            sock.close()
            raise
        return self

    async def _open(self, port, user_id, channel_id, after, prefix, behind):
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", port))
        query = "" if after is None else f"?after={after}"
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {prefix}/ws/channel/{channel_id}{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Protocol: tollerchat.v1\r\nAuthorization: Bearer {token(user_id)}\r\n\r\n"
        )
        await loop.sock_sendall(self.socket, request.encode() + behind)
        while b"\r\n\r\n" not in self._data:
            await self._more()
        head, _, rest = bytes(self._data).partition(b"\r\n\r\n")
        assert b" 101 " in head.split(b"\r\n")[0], head
        self._data = bytearray(rest)

    async def send(self, *frames):
        """Send frames (objects) in one burst."""
        data = b"".join(client_frame(json.dumps(frame, ensure_ascii=False).encode()) for frame in frames)
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def _more(self, seconds=WAIT):
        # Not wait_for(): before Python 3.12, it can swallow a cancellation.
        receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(self.socket, 65536))
        try:
            done, _ = await asyncio.wait([receiving], timeout=seconds)
            if not done:
                raise asyncio.TimeoutError("nothing came")
            self._data += receiving.result()
            return len(receiving.result())
        finally:
            receiving.cancel()
            await asyncio.wait([receiving])  # the socket must not be closed while the loop watches it

    async def frame(self, seconds=WAIT):
        """The next JSON frame; None at the end of the connection, with or without a close frame."""
        while True:
            parsed = unframe(self._data)
            if parsed is None:
                try:
                    if await self._more(seconds):
                        continue
                except ConnectionError:
                    pass
                return None
            opcode, payload, size = parsed
            del self._data[:size]
            if opcode == 1:
                return json.loads(payload)
            if opcode == 9:  # a ping
                pong = bytes([0x8A, 0x80 | len(payload)]) + b"\0\0\0\0" + payload
                await asyncio.get_running_loop().sock_sendall(self.socket, pong)
            if opcode == 8:
                self.code = int.from_bytes(payload[:2], "big")

    def close(self):
        self.socket.close()


def client_frame(payload):
    size = len(payload)
    length = bytes([128 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return b"\x81" + length + b"\0\0\0\0" + payload


def unframe(data):
    """Opcode, payload and whole size of the frame that `data` starts with, if it is all there."""
    if len(data) < 2:
        return None
    start, size = 2, data[1]
    if size >= 126:
        start += 2 if size == 126 else 8
        if len(data) < start:
            return None
        size = int.from_bytes(data[2:start], "big")
    if len(data) < start + size:
        return None
    return data[0] & 15, bytes(data[start : start + size]), start + size
