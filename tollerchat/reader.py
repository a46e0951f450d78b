"""`FrameReader`: the receiving half of a connection, bytes in and frames out, in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiohttp._websocket.reader import WebSocketDataQueue  # the only place to hook into the parser
from aiohttp.http import WebSocketReader, WSMessage, WSMsgType

from tollerchat.turns import Turns

if TYPE_CHECKING:
    from tollerchat.websocket import WebSocket

__all__ = ("FrameReader",)

SLICE: Final = 4096  # bytes parsed at a time
FRAMES: Final = 64  # taken at a time: there may be thousands in a slice
# Bytes that may wait to be parsed; beyond, the connection is not read. To stop and go on costs as much as a short
# message does, so it is more than one long one.
UNPARSED: Final = 16 * 1024


class FrameReader(WebSocketDataQueue):
    """What was received and is not dealt with yet: bytes, and sometimes frames; both wait for their turn.

    aiohttp's parser takes it for the queue of its frames; but most are dealt with at once.
    """

    __slots__ = ("_budget", "_parser", "_pending", "_turns", "_unparsed", "_waits", "_websocket", "paused")

    # What the parser asks of a queue. The rest of it is not made: it would be a sixth of an idle connection.
    _size = _limit = 0

    def __init__(self, websocket: WebSocket, turns: Turns, *, max_size: int) -> None:
        self.paused = False  # not reading
        self._websocket = websocket
        self._turns = turns
        self._waits = False  # for its turn
        self._unparsed = b""
        self._budget = 0  # frames that may be taken yet in this turn
        self._pending: list[WSMessage] | None = None  # parsed, but not taken in their turn; rarely made
        # aiohttp refuses messages of exactly its limit.
        self._parser: WebSocketReader | None = WebSocketReader(
            self, max_size + 1, compress=False, decode_text=True
        )

    @property
    def is_empty(self) -> bool:
        """Whether all that was received has been dealt with."""
        return not (self._unparsed or self._pending)

    def receive(self, data: bytes) -> None:
        """Take what came; too much, and nothing more is read."""
        self._unparsed = self._unparsed + data if self._unparsed else data
        self.read_on()
        transport = self._websocket.transport
        if len(self._unparsed) > UNPARSED and not self.paused and not transport.is_closing():
            self.paused = True
            transport.pause_reading()

    def read_on(self) -> None:
        """Deal with what is here when it is this connection's turn."""
        if not self._waits:
            self._waits = True
            self._turns.ask(self._turn)

    def _turn(self) -> None:
        """Deal with some of what is here, unless that is blocked; who ends that calls `read_on`."""
        self._waits = False
        if (parser := self._parser) is None or (websocket := self._websocket).blocked:
            return
        websocket.hold()
        self._budget = FRAMES
        if self._pending:
            pending, self._pending = self._pending, None
            for frame in pending:
                try:
                    self.feed_data(frame, 0)
                except Exception as exc:  # as the parser does
                    websocket.fail(exc)
        elif data := self._unparsed:
            self._unparsed = data[SLICE:]
            parser.feed_data(data[:SLICE])
        websocket.release()
        if not self.is_empty:
            self.read_on()
        elif websocket.is_lost:
            websocket.end()
        elif self.paused:
            websocket.heard_at = websocket.loop.time()  # nothing could be heard meanwhile
            self.resume()

    def resume(self) -> None:
        """Read the connection, whoever paused it."""
        if not self._websocket.transport.is_closing():
            self.paused = False
            self._websocket.transport.resume_reading()

    def feed_data(self, frame: Any, size: int) -> None:
        """A frame is parsed: have it dealt with; later, if the turn is over, or that is blocked."""
        self._budget -= 1
        if self._pending or self._budget < 0 or self._websocket.blocked:
            self._pending = self._pending or []
            self._pending.append(frame)
        else:
            self._websocket.take(frame)

    def set_exception(self, error: BaseException, cause: object = None) -> None:
        """What follows cannot be parsed, or the last frame could not be dealt with."""
        self.feed_data(WSMessage(WSMsgType.ERROR, error, None), 0)

    def clear(self) -> None:
        """Nothing that is here is wanted any more."""
        self._unparsed, self._pending = b"", None

    def close(self) -> None:
        """Nothing more will come."""
        self._parser = None  # these would be cycles
        del self._websocket
