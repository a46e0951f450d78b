"""`Client`: one connection, its cursor in the log, and the two pumps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import aiohttp

from tollerchat.auth import Identity, verify_token
from tollerchat.config import Config
from tollerchat.errors import ChatError, InvalidFrame, TooSlow, Unauthorized, Unavailable
from tollerchat.hub import Hub
from tollerchat.linger import linger
from tollerchat.protocol import (
    PING_FRAME,
    AckFrame,
    CloseCode,
    ErrorFrame,
    IncomingAuth,
    IncomingMessage,
    IncomingTyping,
    OutgoingTyping,
    ReadyFrame,
    encode,
    nonce_of,
    parse,
)
from tollerchat.repository import NewMessage, Saved
from tollerchat.room import RETRY_DELAY, LogFrame, Room
from tollerchat.tasks import end_tasks
from tollerchat.writer import MessageWriter

__all__ = ("Client", "Connection")

logger = logging.getLogger("tollerchat.client")

# Bytes that may wait in a connection's buffer; beyond, the client is lagging and gets no live frames.
BUFFER_LIMIT: Final = 64 * 1024
SEND_BUFFER: Final = 128 * 1024  # bytes in the kernel, for one connection
TYPING_INTERVAL: Final = 1.0  # seconds
CLOSE_TIMEOUT: Final = 2.0  # seconds for the closing handshake; then the connection is aborted


class Connection(Protocol):
    """What a client needs of its WebSocket; aiohttp's `WebSocketResponse` has it."""

    async def receive(self) -> aiohttp.WSMessage: ...
    async def pong(self, message: bytes = b"") -> None: ...
    async def close(self, *, code: int, message: bytes) -> bool: ...


class Client:
    """One connection to a channel.

    Its cursor is the last message it was given. It is *live* while it is in `room.live`: then its cursor
    is the room's head, and each commit is one write. Else it is *catching up*: `write_pump` feeds it from
    the log with backpressure until its cursor is the head.
    """

    def __init__(
        self,
        config: Config,
        hub: Hub,
        writer: MessageWriter,
        identity: Identity,
        channel_id: int,
        *,
        v1: bool,
    ) -> None:
        self.user_id, self.expires_at = identity
        self.channel_id = channel_id
        self.v1 = v1
        self.own: set[int] = set()  # ids of its own messages that its cursor has not passed yet
        self.unsettled: set[str] = set()  # nonces of messages that may be stored, or may not
        self.ended = asyncio.Event()
        self._config = config
        self._hub = hub
        self._writer = writer
        self._ready = False  # history was sent
        self._gap = False
        self._cursor = 0
        self._in_flight = 0
        self._slot_free: asyncio.Future[None] | None = None
        self._next_typing = 0.0  # loop times
        self._last_seen = 0.0
        self._next_ping = 0.0
        self._running = False
        self._refusal: tuple[int, str] | None = None  # a close() that came before run()
        self._pump: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        # Set by run()
        self._room: Room
        self._connection: Connection
        self._transport: asyncio.Transport
        self._drain: Callable[[], Awaitable[None]]

    # -- life --------------------------------------------------------------------------------------

    async def seek(self, room: Room, after: int | None) -> None:
        """Set the cursor to where the client starts: before the last messages, or at `after`.

        Raises `Unavailable`.
        """
        self._room = room
        if after is None:
            await room.load()  # again, without a wait if nothing was forgotten meanwhile
            self._cursor = room.history_cursor()
            return
        if after > room.head:  # the room may be behind the log
            # Beyond the newest row there is nothing, its rows were deleted; new ones have greater ids.
            after = min(after, await self._hub.newest_id(self.channel_id))
            await room.reach(after)
        self._cursor = after
        limit = self._config.max_replay
        if (frames := room.since(after)) is None:
            start = await self._hub.replay_start(self.channel_id, after, room.head)
            if start is not None:
                self._cursor, self._gap = start, True
        elif len(frames) > limit:
            self._cursor, self._gap = frames[-limit - 1][0], True

    async def run(
        self, connection: Connection, transport: asyncio.Transport, drain: Callable[[], Awaitable[None]]
    ) -> None:
        """Serve the connection until it ends. `drain` waits until the transport's buffer is low."""
        self._connection, self._transport, self._drain = connection, transport, drain
        self._running = True
        transport.set_write_buffer_limits(high=BUFFER_LIMIT)
        # The kernel's buffer would grow to megabytes, and hide for seconds that a slow client does read.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._seen()
        self._next_ping = self._last_seen + random.uniform(0.5, 1.0) * self._config.ping_interval
        try:
            if self._refusal is not None:
                self.close(*self._refusal)
            self.catch_up_from(self._cursor)
            await self.read_pump()
        except TooSlow:
            self.close(CloseCode.TOO_SLOW, "did not keep up")
        except Exception:
            logger.exception("a connection of user %d failed", self.user_id)
            self.close(CloseCode.INTERNAL_ERROR, "internal error")
        finally:
            await self._end()

    async def _end(self) -> None:
        self._room.live.discard(self)
        # What was written may still go out, a close frame say; then the descriptor is closed,
        # whatever the peer does.
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self._transport.abort)
        await end_tasks(self._pump)
        if self._closing is not None:
            await asyncio.gather(self._closing, return_exceptions=True)
        if self._draining is not None and not self._draining.done():
            self._transport.abort()
            await asyncio.gather(self._draining, return_exceptions=True)
        self.ended.set()

    def close(self, code: int, reason: str) -> None:
        """Close the connection, in the background; the first caller decides the code."""
        if not self._running:
            self._refusal = self._refusal or (code, reason)
        elif self._closing is None:
            self._room.live.discard(self)
            self._closing = asyncio.create_task(self._close(code, reason))

    async def _close(self, code: int, reason: str) -> None:
        closing = asyncio.ensure_future(self._connection.close(code=code, message=reason.encode()))
        done, _ = await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
        if not done:
            logger.info("user %d did not close within %s s: aborted", self.user_id, CLOSE_TIMEOUT)
            self._transport.abort()  # which ends whatever close() waits for
        await asyncio.gather(closing, return_exceptions=True)

    def abort(self) -> None:
        """End the connection at once: the peer is dead."""
        if self._running:
            self._transport.abort()

    def check(self, now: float, unix_time: float) -> None:
        """Ping if it is time to; end a connection that is dead or whose token has expired."""
        if not self._running or self._closing is not None:
            return
        if unix_time >= self.expires_at:
            self.close(CloseCode.TOKEN_EXPIRED, "the token has expired")
        elif now - self._last_seen > self._config.pong_timeout:
            logger.info("user %d has not answered for %s s: aborted", self.user_id, self._config.pong_timeout)
            self.abort()
        elif now >= self._next_ping:
            self._next_ping = now + self._config.ping_interval
            self.offer(PING_FRAME)

    # -- from the client ---------------------------------------------------------------------------

    async def read_pump(self) -> None:
        """Take frames until the connection ends."""
        while True:
            await self._room_to_answer()
            frame = await self._connection.receive()
            self._seen()
            if frame.type is aiohttp.WSMsgType.TEXT:
                self._receive(frame.data)
            elif frame.type is aiohttp.WSMsgType.BINARY:
                self._send_error(InvalidFrame("binary frames are not understood: send text frames"))
            elif frame.type is aiohttp.WSMsgType.PING:
                await self._connection.pong(frame.data)
            elif frame.type is aiohttp.WSMsgType.ERROR:
                await linger(self._transport, CLOSE_TIMEOUT)
                return
            elif frame.type is not aiohttp.WSMsgType.PONG:
                return

    def _receive(self, text: str) -> None:
        try:
            frame = parse(text)
            if isinstance(frame, IncomingMessage):
                self._on_message(frame)
            elif isinstance(frame, IncomingTyping):
                self._on_typing()
            elif isinstance(frame, IncomingAuth):
                self._on_auth(frame)
        except ChatError as exc:
            self._send_error(exc, nonce_of(text))

    def _on_message(self, frame: IncomingMessage) -> None:
        self._writer.submit(NewMessage(self.channel_id, self.user_id, frame.content, frame.nonce), self)
        self._in_flight += 1

    def _on_typing(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_typing:
            self._next_typing = now + TYPING_INTERVAL
            self._room.tell_others(self, encode(OutgoingTyping(self.user_id, self.channel_id)))

    def _on_auth(self, frame: IncomingAuth) -> None:
        identity = verify_token(frame.token, self._config)
        if identity.user_id != self.user_id:
            raise Unauthorized("the token is of another user: open another connection for them")
        self.expires_at = identity.expires_at

    async def _room_to_answer(self) -> None:
        """Wait while too much of this client is under way: messages to the database, or answers to it."""
        while self._in_flight >= self._config.max_in_flight:
            self._slot_free = asyncio.get_running_loop().create_future()
            await self._slot_free
        if self._full():
            await self._drained()

    def _seen(self) -> None:
        self._last_seen = asyncio.get_running_loop().time()

    # -- answers to its own messages, from the writer ----------------------------------------------

    def stored(self, saved: Saved, nonce: str | None) -> None:
        """The message is committed."""
        self._settle()
        if nonce is not None:
            self.unsettled.discard(nonce)
        if self.v1:
            self.write(encode(AckFrame(nonce, saved.message.message_id, saved.message.created_at)))

    def refused(self, error: ChatError, nonce: str | None) -> None:
        """The message is not stored, or not known to be."""
        self._settle()
        if nonce is not None and isinstance(error, Unavailable):
            self.unsettled.add(nonce)
        self._send_error(error, nonce)

    def _settle(self) -> None:
        self._in_flight -= 1
        if self._slot_free is not None and not self._slot_free.done():
            self._slot_free.set_result(None)

    def _send_error(self, error: ChatError, nonce: str | None = None) -> None:
        self.write(encode(ErrorFrame(error.code, str(error), nonce)))

    # -- to the client -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Hand whole frames to the transport, unless the connection is closing."""
        if not self._is_closing():
            self._transport.write(data)

    def offer(self, data: bytes) -> None:
        """Hand over frames that a lagging client can do without."""
        if not self._full():
            self.write(data)

    def deliver(self, blob: bytes, frames: Sequence[LogFrame]) -> bool:
        """Give a live client what was committed; false if it lags. `blob` is all `frames`, joined."""
        if self._transport.is_closing():
            return True
        if self._transport.get_write_buffer_size() > BUFFER_LIMIT:
            return False
        if self.own:
            blob = self._others(frames)
        self._transport.write(blob)
        return True

    def _others(self, frames: Sequence[LogFrame]) -> bytes:
        """Frames without the client's own ones, and forget those: the cursor passes them."""
        blob = b"".join(data for message_id, data in frames if message_id not in self.own)
        newest = frames[-1][0]
        self.own = {message_id for message_id in self.own if message_id > newest}
        return blob

    def _is_closing(self) -> bool:
        return self._closing is not None or self._transport.is_closing()

    def _full(self) -> bool:
        # uvloop raises where a closed transport is asked for its size.
        return not self._transport.is_closing() and self._transport.get_write_buffer_size() > BUFFER_LIMIT

    def catch_up_from(self, cursor: int) -> None:
        """Become live by way of the log: at once if the rest is at hand, else through `write_pump`."""
        self._cursor = cursor
        if self._is_closing():
            return
        if not self._full() and (frames := self._room.since(cursor)) is not None:
            self._send(frames, self._room.head)
            self._go_live()
        else:
            self._pump = asyncio.create_task(self.write_pump())

    async def write_pump(self) -> None:
        """Send what follows the cursor, as fast as the client reads, until it is live."""
        try:
            while True:
                await self._drained()
                if self._is_closing():
                    return
                if (frames := self._room.since(self._cursor)) is not None:
                    self._send(frames, self._room.head)
                    self._go_live()  # no await since the look at the head: nothing can be missed
                    return
                try:
                    frames, cursor = await self._room.read(self._cursor)
                except Unavailable as exc:
                    logger.warning("a client cannot catch up yet: %s", exc)
                    await asyncio.sleep(RETRY_DELAY)
                else:
                    self._send(frames, cursor)
        except TooSlow:
            self.close(CloseCode.TOO_SLOW, "did not keep up")

    def _send(self, frames: Sequence[LogFrame], cursor: int) -> None:
        if frames:
            self.write(self._others(frames))
        self._cursor = cursor

    def _go_live(self) -> None:
        if not self._ready:
            self._ready = True
            if self.v1:
                self.write(encode(ReadyFrame(self.channel_id, self.user_id, self._room.head, self._gap)))
        self._room.live.add(self)

    async def _drained(self) -> None:
        """Wait until the client has read most of what was written. Raises `TooSlow`."""
        while self._full():
            before = self._transport.get_write_buffer_size()
            # aiohttp lets all who drain wait for one future, and a cancelled one would break it for the
            # others, for its close() too: so one task waits for all of us, and is never cancelled.
            if self._draining is None or self._draining.done():
                self._draining = asyncio.ensure_future(self._drain_quietly())
            await asyncio.wait({self._draining}, timeout=self._config.write_timeout)
            if self._full() and self._transport.get_write_buffer_size() >= before:
                raise TooSlow  # not even slowly

    async def _drain_quietly(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._drain()
