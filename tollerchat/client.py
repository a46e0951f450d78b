"""`Client`: one connection, its cursor in the log, and the two pumps."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import TYPE_CHECKING, Final

from tollerchat.auth import Identity, verify_token
from tollerchat.config import Config
from tollerchat.errors import ChatError, InvalidFrame, Unauthorized, Unavailable
from tollerchat.logs import Seldom
from tollerchat.outbox import Outbox
from tollerchat.protocol import (
    PING_FRAME,
    CloseCode,
    IncomingAuth,
    IncomingMessage,
    IncomingTyping,
    OutgoingTyping,
    ReadyFrame,
    encode,
    error_frame,
    parse,
)
from tollerchat.room import RETRY_DELAY, Room
from tollerchat.saving import NewMessage
from tollerchat.tail import Page
from tollerchat.websocket import WebSocket
from tollerchat.writer import MessageWriter

if TYPE_CHECKING:
    from tollerchat.hub import Hub

__all__ = ("Client",)

logger = logging.getLogger("tollerchat.client")
logger.addFilter(Seldom())  # it may be about many at once

CHECK_INTERVAL: Final = 5.0  # seconds, at most, between checks of a connection that is well


class Client:
    """One connection to a channel.

    Its cursor is the last message it was given. It is *live* while it is in `room.audience.live`: then its cursor
    is the room's head, and each commit is one write. Else it is *catching up*: `write_pump` feeds it from
    the log with backpressure until its cursor is the head.
    """

    # There are many of them, and most are idle: sets and futures are made when needed.
    __slots__ = (
        "_config",
        "_cursor",
        "_gap",
        "_hub",
        "_next_ping",
        "_pinged_at",
        "_ready",
        "_refusal",
        "_room",
        "_socket",
        "_started",
        "_writable",
        "_writer",
        "channel_id",
        "due",
        "expires_at",
        "outbox",
        "pump",
        "user_id",
        "v1",
    )

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
        self.due = math.inf  # loop time of the next check(); there is none before start()
        self.outbox: Outbox | None = None  # made with its first message: many never send one
        self.pump: asyncio.Task[None] | None = None  # write_pump, while catching up
        self._config = config
        self._hub = hub
        self._writer = writer
        self._ready = False  # history was sent
        self._gap = False
        self._cursor = 0
        self._writable: asyncio.Future[None] | None = None  # what write_pump waits for
        self._next_ping = 0.0  # loop times
        self._pinged_at = 0.0
        self._refusal: tuple[int, str] | None = None  # a close() that came before start()
        self._room: Room  # from seek() on
        self._started = False
        self._socket: WebSocket  # from start() on

    # -- life --------------------------------------------------------------------------------------

    async def seek(self, room: Room, after: int | None) -> None:
        """Set the cursor to where the client starts. Raises `Unavailable`."""
        self._room = room
        self._cursor, self._gap = await room.seek(after, self._config.max_replay)

    def start(self, websocket: WebSocket) -> None:
        """Send what it missed, and then what is new; take what it sends."""
        self._socket, self._started, self.due = websocket, True, 0.0
        self._next_ping = websocket.loop.time() + random.uniform(0.5, 1.0) * self._config.ping_interval
        if self._refusal is not None:
            self.close(*self._refusal)
        tail = self._room.tail
        if not (websocket.closing or websocket.full) and (page := tail.since(self._cursor)) is not None:
            self._send(page)
            self._go_live()
        else:
            self.catch_up(self._cursor)
        websocket.read_on()

    def close(self, code: int, reason: str) -> None:
        """Close the connection, in the background; the first caller decides the code."""
        if self._started:
            self._socket.close(code, reason)
        else:
            self._refusal = self._refusal or (code, reason)

    def abort(self) -> None:
        """End the connection at once: the peer is dead."""
        if self._started:
            self._socket.transport.abort()

    def write_ended(self) -> None:
        """Nothing is to be sent any more."""
        self._room.audience.live.pop(self, None)
        if self.outbox is not None:
            self.outbox.answer()

    def lost(self) -> None:
        """The connection is gone."""
        self._hub.dismiss(self)

    def check(self, now: float, unix_time: float) -> None:
        """Ping if it is time to; end a connection that is dead or stuck, or whose token has expired."""
        websocket = self._socket
        if websocket.closing:
            return
        if unix_time >= self.expires_at:
            self.close(CloseCode.TOKEN_EXPIRED, "the token has expired")
        elif websocket.full or websocket.paused:  # it gets no pings, or we do not read its answers
            if websocket.is_stuck(now, self._config.write_timeout):
                self.close(CloseCode.TOO_SLOW, "did not keep up")
        else:
            interval = min(CHECK_INTERVAL, self._config.write_timeout / 2, self.expires_at - unix_time)
            self.due = min(now + interval, self._keep_alive(now, websocket))

    def _keep_alive(self, now: float, websocket: WebSocket) -> float:
        """Ping if it is time to, abort if it was silent for too long; returns when to look again.

        Silence alone says nothing: a server that stood still for a while has not asked.
        """
        timeout, patience = self._config.pong_timeout, self._config.pong_timeout - self._config.ping_interval
        if websocket.heard_at >= self._pinged_at:
            if now < self._next_ping:
                return self._next_ping
            self._pinged_at, self._next_ping = now, now + self._config.ping_interval
            self.offer(PING_FRAME)
        dead_at = max(websocket.heard_at + timeout, self._pinged_at + patience)
        if now > dead_at:
            logger.info("user %d gave no sign of life for %s s: aborted", self.user_id, timeout)
            self.abort()
        return dead_at

    # -- from the client ---------------------------------------------------------------------------

    def read_pump(self, text: str) -> None:
        """Take a frame of the client: decode and check it, and hand messages to the writer."""
        try:
            incoming = parse(text)
            if isinstance(incoming, IncomingMessage):
                self._on_message(incoming)
            elif isinstance(incoming, IncomingTyping):
                self._on_typing()
            elif isinstance(incoming, IncomingAuth):
                self._on_auth(incoming)
        except ChatError as exc:
            self._socket.write(error_frame(exc, exc.nonce))

    def binary_received(self) -> None:
        """A frame that is not text."""
        self._socket.write(error_frame(InvalidFrame("binary frames are not understood: send text frames")))

    def _on_message(self, frame: IncomingMessage) -> None:
        if (outbox := self.outbox) is None:
            outbox = Outbox(self._socket, self.user_id, self._config.max_in_flight, v1=self.v1)
            self.outbox = outbox
        message = NewMessage(self.channel_id, self.user_id, frame.content, frame.nonce)
        try:
            if outbox.is_refusing:
                raise Unavailable("a message before it was refused: send both again later")
            self._writer.submit(message, outbox)
        except Unavailable as exc:
            outbox.not_taken(exc, frame.nonce)
        else:
            cursor, room = self._cursor, self._room
            if self in (live := room.audience.live):
                cursor, live[self] = room.head, -1  # its own message is not for it
            outbox.sent(frame.content, frame.nonce, cursor)

    def _on_typing(self) -> None:
        if self._room.audience.may_type(self.user_id, self._socket.loop.time()):
            self._room.audience.tell_others(self, encode(OutgoingTyping(self.user_id, self.channel_id)))

    def _on_auth(self, frame: IncomingAuth) -> None:
        identity = verify_token(frame.token, self._config)
        if identity.user_id != self.user_id:
            raise Unauthorized("the token is of another user: open another connection for them")
        self.expires_at, self.due = identity.expires_at, 0.0

    # -- to the client -----------------------------------------------------------------------------

    def offer(self, data: bytes) -> None:
        """Hand over frames that one who reads too slowly can do without."""
        if not self._socket.full:
            self._socket.write(data)

    def deliver(self, page: Page, written: int) -> int | None:
        """Give a live client what was committed, of which some bytes may be written.

        Returns where the room may write from now on, as in `Audience.live`; None if it lags.
        """
        websocket = self._socket
        if websocket.full:
            return None
        if data := self._others(page)[written:]:
            websocket.write(data)
        return self._descriptor()

    def descriptor_changed(self) -> None:
        """Tell the room whether it may still write by itself."""
        if self in self._room.audience.live:
            self._room.audience.live[self] = self._descriptor()

    def _descriptor(self) -> int:
        """Where the room may write by itself: not to one whose own messages are under way, which it must not get."""
        return self._socket.descriptor if self.outbox is None or self.outbox.idle else -1

    def _others(self, page: Page) -> bytes:
        return page.blob if self.outbox is None else self.outbox.others(page)

    def catch_up(self, cursor: int) -> None:
        """Be given what follows `cursor` by `write_pump`, as fast as it is read."""
        self._cursor = cursor
        self.pump = asyncio.create_task(self.write_pump())

    async def write_pump(self) -> None:
        """Send what follows the cursor, as fast as the client reads, until it is live."""
        websocket = self._socket
        try:
            while not websocket.closing:
                if websocket.full:
                    self._writable = websocket.loop.create_future()
                    await self._writable
                elif (page := self._room.tail.since(self._cursor)) is not None:
                    self._send(page)
                    self._go_live()  # no await since the look at the head: nothing can be missed
                    return
                else:
                    page = await self._read_page()
                    if not websocket.full:  # or it will be read again
                        self._send(page)
                    del page  # it may be large, and the client slow
        except Exception:
            logger.exception("a connection of user %d failed", self.user_id)
            self.close(CloseCode.INTERNAL_ERROR, "internal error")
        finally:
            self.pump = None

    async def _read_page(self) -> Page:
        """What follows the cursor, as soon as the database can be reached."""
        while True:
            try:
                return await self._room.read(self._cursor)
            except Unavailable as exc:
                logger.warning("a client cannot catch up yet: %s", exc)
                await asyncio.sleep(RETRY_DELAY)

    def drained(self) -> None:
        """The client has read most of what was written."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._socket.read_on()

    def _send(self, page: Page) -> None:
        if data := self._others(page):
            self._socket.write(data)
        self._cursor = page.cursor

    def _go_live(self) -> None:
        if not self._ready:
            self._ready = True
            if self.v1:
                self._socket.write(
                    encode(ReadyFrame(self.channel_id, self.user_id, self._room.head, self._gap))
                )
        self._room.audience.live[self] = self._descriptor()
