"""`WebSocket`: an open connection, frames in and bytes out (RFC 6455)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Final, Protocol

from aiohttp import WSCloseCode, web
from aiohttp.http import WebSocketError, WSMessage, WSMsgType

from tollerchat.progress import Progress
from tollerchat.protocol import CloseCode, close_frame, pong_frame
from tollerchat.reader import FrameReader
from tollerchat.turns import Turns

__all__ = ("BUFFER_LIMIT", "CLOSE_TIMEOUT", "WebSocket", "bound_send_buffer", "write_some")

logger = logging.getLogger("tollerchat.websocket")

# Bytes that may wait in a connection's buffer; beyond, it is full until a quarter of them is left.
BUFFER_LIMIT: Final = 64 * 1024
SEND_BUFFER: Final = 128 * 1024  # bytes in the kernel, for one connection
CLOSE_TIMEOUT: Final = 2.0  # seconds for the closing handshake; then the connection is aborted
TEXT: Final = WSMsgType.TEXT  # looked up once: before Python 3.12, that takes as long as to take a frame


class Listener(Protocol):
    """Whose connection it is."""

    def read_pump(self, text: str) -> None:
        """A whole text message came."""

    def binary_received(self) -> None:
        """A whole binary message came."""

    def descriptor_changed(self) -> None:
        """`descriptor` is not to be used any more: the system takes no more for now."""

    def drained(self) -> None:
        """The connection is not full any more."""

    def write_ended(self) -> None:
        """Nothing is to be written any more."""

    def lost(self) -> None:
        """The connection is gone; called once."""


class WebSocket(asyncio.Protocol):
    """A connection after its handshake, taken over from aiohttp.

    aiohttp would keep the request, its parser and two tasks for as long as the connection is open, and
    switch tasks for each frame. Without them, an idle connection is a transport, this and its `FrameReader`.

    What stops it: `full`, its peer reads too slowly, so that live delivery ends; `busy`, its owner has enough to do, so
    that no frame is taken; `paused`, too much waits to be parsed, so that nothing is read. At the end it is `deaf`
    first, from the first close frame of either side, and takes no more frames; `closing`, and writes no more; then lost.
    """

    __slots__ = (
        "_abort_timer",
        "_closing",
        "_descriptor",
        "_direct",
        "_held",
        "_listener",
        "_progress",
        "_reader",
        "busy",
        "deaf",
        "full",
        "heard_at",
        "is_lost",
        "loop",
        "transport",
    )

    def __init__(
        self, transport: asyncio.Transport, listener: Listener, turns: Turns, *, max_size: int
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = transport
        self.full = False  # the peer reads too slowly
        self.heard_at = self.loop.time()  # when anything came from the peer
        self._listener = listener
        self.busy = False  # its owner has enough to do with what was taken
        self.deaf = False  # what the peer sends does not count any more: one of us has sent a close frame
        self.is_lost = False  # the connection is gone
        self._closing = False  # nothing can be written any more
        self._abort_timer: asyncio.TimerHandle | None = None
        self._held: list[bytes] | None = None  # what is written between hold() and release()
        self._descriptor = _descriptor(transport)
        self._direct = False  # nothing is in the way of a write: the system can be called at once
        self._progress: Progress | None = None  # while the buffer is full
        self._reader = FrameReader(self, turns, max_size=max_size)
        transport.set_write_buffer_limits(high=BUFFER_LIMIT)
        bound_send_buffer(transport)

    def take_over(self, request: web.Request) -> None:
        """Become the protocol of the request's transport: to answer is left to the caller.

        The handler must return next, a response that is not to be sent. What the peer has sent meanwhile is
        taken in the next turn.
        """
        handler = request.protocol
        self.transport.set_protocol(self)
        if handler.writing_paused:
            # By answers to requests before this one; the transport tells that only once.
            self.pause_writing()
        self._reader.resume()  # aiohttp may have paused it
        handler.transport = None  # not to be closed by what follows
        handler.set_parser(self)  # type: ignore[arg-type]  # any object of this shape
        handler.connection_lost(None)

    # -- from the peer -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        self._reader.receive(data)

    def eof_received(self) -> None:
        """The peer sends no more: what is in the buffer still goes out, and then the transport closes."""
        self._expire()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """As aiohttp's parsers have it: what the peer sent right behind its request."""
        self._reader.receive(data)
        return False, b""

    def feed_eof(self) -> None:
        """As aiohttp's parsers have it."""

    @property
    def paused(self) -> bool:
        """Whether the peer is not read."""
        return self._reader.paused

    @property
    def blocked(self) -> bool:
        """Whether nothing more is to be taken: too much that the peer sent, or is sent, is under way."""
        if self.busy:  # which no longer counts when nothing more is taken
            return not self.deaf
        return self.full and not self.closing  # else nothing more is written to it

    def read_on(self) -> None:
        """Take what was received, in turn: nothing hinders it any more."""
        self._reader.read_on()

    def take(self, frame: WSMessage) -> None:
        """A frame came."""
        kind = frame.type
        if kind is TEXT:
            if not self.deaf:
                self._listener.read_pump(frame.data)
        elif kind is WSMsgType.CLOSE:
            self._close_received(frame.data)
        elif kind is WSMsgType.ERROR:
            self.fail(frame.data)
        elif self.deaf or kind is WSMsgType.PONG:
            pass
        elif kind is WSMsgType.PING:
            self.write(pong_frame(frame.data))
        else:
            self._listener.binary_received()

    def _close_received(self, code: int) -> None:
        self.deaf = True
        if not self._closing:
            may_be_sent = code != WSCloseCode.ABNORMAL_CLOSURE and code < 5000  # RFC 6455, section 7.4
            self.close(code if may_be_sent else WSCloseCode.PROTOCOL_ERROR, "")
        if not self.transport.is_closing():  # asyncio's TLS forgets the connection at the second call
            self.transport.close()  # what is in the buffer still goes out

    def fail(self, error: BaseException) -> None:
        """A frame could not be parsed, or not be dealt with: nothing more will be."""
        if isinstance(error, WebSocketError):
            is_large = error.code == WSCloseCode.MESSAGE_TOO_BIG  # of which aiohttp's text is off by one
            self.close(error.code, "the frame is too large" if is_large else str(error))
        else:
            logger.error("a frame could not be dealt with", exc_info=error)
            self.close(CloseCode.INTERNAL_ERROR, "internal error")
        # Until the peer hangs up, or the time is over, what it sends is read and dropped: a socket that is closed
        # with unread data answers with a reset, which may destroy the close frame (RFC 9112, section 9.6). Our end
        # alone would be too early, too: some who still send take it for the end of the connection.

    # -- to the peer -------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether nothing can be written any more."""
        return self._closing or self.transport.is_closing()

    @property
    def descriptor(self) -> int:
        """Where whole frames may be written to as well, until it stalls or closes; -1 if that must wait."""
        return self._descriptor if self._direct and self._held is None else -1

    def write(self, data: bytes) -> None:
        """Write whole frames, unless the connection is closing.

        The way through the transport would cost as much again as the system's own work.
        """
        if self._held is not None:
            self._held.append(data)
            return
        if self._direct or self._becomes_direct():
            if (written := write_some(self._descriptor, data)) == len(data):
                return
            self._direct = False
            self._listener.descriptor_changed()
            data = data[written:]
        if not self.closing:
            try:
                self.transport.write(data)
            except Exception:  # uvloop raises where asyncio does not; whoever writes to many goes on
                logger.exception("a connection failed and was aborted")
                self.transport.abort()

    def _becomes_direct(self) -> bool:
        self._direct = (
            self._descriptor >= 0 and not self.closing and not self.transport.get_write_buffer_size()
        )
        return self._direct

    def hold(self) -> None:
        """Keep what is written until `release`: a call of the system costs more than all the rest."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Write what was kept, at once."""
        held, self._held = self._held, None
        if held:
            self.write(held[0] if len(held) == 1 else b"".join(held))

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake; the first caller decides the code. If it takes long, abort."""
        self.deaf = True
        if not self._closing:
            self.release()
            self.write(close_frame(code, reason))
            self._expire()
            self.read_on()  # the peer's close frame may be there

    def _expire(self) -> None:
        """Write nothing more, and abort if the connection is not gone in time."""
        if not self._closing:
            self._closing = True
            self._direct = False
            self._listener.write_ended()
            self._abort_timer = self.loop.call_later(CLOSE_TIMEOUT, self.transport.abort)

    def is_stuck(self, now: float, timeout: float) -> bool:
        """Whether the peer, at loop time `now`, has read nothing for `timeout` seconds. Ask regularly."""
        return self._progress is not None and self._progress.is_stuck(now, timeout)

    def pause_writing(self) -> None:
        self.full = True
        self._progress = Progress(self.transport, self.loop.time())

    def resume_writing(self) -> None:
        self.full = False
        self._progress = None
        self.heard_at = self.loop.time()  # reading is a sign of life, too
        self._listener.drained()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = self.is_lost = True
        self._direct = False  # from now on, the descriptor may be another connection's
        self._listener.write_ended()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        if self.deaf:
            self._reader.clear()
        if self._reader.is_empty:
            self.end()
        else:  # TLS tells of the end before all that came ahead of it is parsed
            self.read_on()

    def end(self) -> None:
        """The connection is gone, and all that came over it was dealt with."""
        self._reader.close()  # so that it is told once
        listener = self._listener
        del self._listener  # without cycles, memory is free at once
        listener.lost()


def bound_send_buffer(transport: asyncio.Transport) -> None:
    """Keep the kernel from taking megabytes: it would hide for seconds that a slow peer does read, and hold what one
    that is gone never will.
    """
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def write_some(descriptor: int, data: bytes) -> int:
    """Write what the system takes of some data, without waiting; returns how many bytes that is, none for -1."""
    if descriptor < 0:
        return 0
    try:
        return os.write(descriptor, data)
    except OSError:  # it is full, or broken: the transport will see which
        return 0


def _descriptor(transport: asyncio.Transport) -> int:
    """Where what is written to a transport ends up as it is; -1 if there is no such place."""
    if os.name != "posix" or transport.get_extra_info("sslcontext") is not None:
        return -1
    return int(transport.get_extra_info("socket").fileno())
