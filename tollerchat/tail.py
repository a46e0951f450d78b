"""`Tail`: the end of a channel's log, encoded and ready to be sent."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final

import msgspec

from tollerchat.protocol import OutgoingMessage, encode

__all__ = ("LogFrame", "Page", "Tail", "encode_all", "page_of")

# How much is kept, for those who join or lag a little.
MAX_FRAMES: Final = 256
MAX_BYTES: Final = 256 * 1024

LogFrame = tuple[int, bytes]  # message_id, encoded frame


class Page(msgspec.Struct, gc=False):
    """A part of the log, ready to be sent."""

    frames: Sequence[LogFrame]
    blob: bytes  # all of them, joined: what most clients are sent
    cursor: int  # of one who has been given them


def encode_all(messages: Iterable[OutgoingMessage]) -> list[LogFrame]:
    """The frames of some messages."""
    return [(message.message_id, encode(message)) for message in messages]


def page_of(frames: Sequence[LogFrame], cursor: int) -> Page:
    """Some frames as one page."""
    return Page(frames, b"".join([data for _, data in frames]), cursor)


class Tail:
    """The newest frames of a log, all that there are behind `floor` and up to `head`.

    At least `history_size`, or all there ever were, once it is filled.
    """

    def __init__(self, history_size: int) -> None:
        self.head = 0
        self.floor = 0
        self._history_size = history_size
        self._frames: deque[LogFrame] = deque()
        self._size = 0  # bytes
        self._since: tuple[int, Page] | None = None  # the last answer of since(), and its cursor

    @property
    def has_history(self) -> bool:
        """Whether what those who join are sent is at hand."""
        return self.floor == 0 or len(self._frames) >= self._history_size

    def extend(self, page: Page) -> None:
        """The log has grown by this."""
        self.head = page.cursor
        self._since = None
        self._keep(page.frames, len(page.blob))

    def fill(self, frames: list[LogFrame], until: int) -> None:
        """Put what the log has up to `until` ahead of what came behind it.

        One frame more than the history tells where the others begin; if there is none, these are all.
        """
        floor = frames.pop(0)[0] if len(frames) > self._history_size else 0
        frames.extend(frame for frame in self._frames if frame[0] > until)
        self.forget()
        self.floor = floor
        self._keep(frames, sum(len(data) for _, data in frames))

    def forget(self) -> None:
        """Nothing of what is kept is to be sent any more."""
        self._frames.clear()
        self._size = 0
        self._since = None
        self.floor = self.head

    def _keep(self, frames: Sequence[LogFrame], size: int) -> None:
        self._frames.extend(frames)
        self._size += size
        while len(self._frames) > MAX_FRAMES or (
            self._size > MAX_BYTES and len(self._frames) > self._history_size
        ):
            self.floor, data = self._frames.popleft()
            self._size -= len(data)

    def history_cursor(self) -> int:
        """The cursor of one who joins: just before the last messages."""
        if len(self._frames) < self._history_size:
            return self.floor
        return self._frames[-self._history_size][0] - 1

    def since(self, cursor: int) -> Page | None:
        """What follows `cursor`, up to `head`, if it is at hand."""
        if cursor < self.floor:
            return None
        if self._since is None or self._since[0] != cursor:
            frames = list(takewhile(lambda frame: frame[0] > cursor, reversed(self._frames)))
            frames.reverse()
            self._since = cursor, page_of(frames, self.head)
        return self._since[1]
