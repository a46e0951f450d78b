"""`Outbox`: what a client has sent, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

from tollerchat.errors import ChatError, Unavailable
from tollerchat.protocol import OutgoingMessage
from tollerchat.repository import NewMessage
from tollerchat.room import Page

__all__ = ("Outbox",)

# Seconds in which a message without a nonce, whose answer was lost, may come up in the log after all.
RECOGNISED_FOR: Final = 60.0


class Outbox:
    """The messages of one connection: how many are under way, and which of the log's it is not to be sent."""

    __slots__ = ("_nameless", "in_flight", "own", "unsettled", "user_id")

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.in_flight = 0
        self.own: set[int] = set()  # ids of its messages that its cursor has not passed yet
        self.unsettled: set[str] = set()  # nonces of its messages that may be stored, or may not
        self._nameless: list[tuple[str, float]] = []  # contents of such without one, and until when

    def sent(self, nonce: str | None) -> None:
        """A message is under way."""
        self.in_flight += 1
        if nonce is not None:
            self.unsettled.add(nonce)

    def stored(self, nonce: str | None) -> None:
        """It is committed; its id was added to `own` before."""
        self.in_flight -= 1
        if nonce is not None:
            self.unsettled.discard(nonce)

    def refused(self, error: ChatError, message: NewMessage) -> None:
        """It is not stored, or, for all we know, may be: then it is remembered, to be recognised in the log."""
        self.in_flight -= 1
        if not isinstance(error, Unavailable):
            if message.nonce is not None:
                self.unsettled.discard(message.nonce)
        elif error.sent and message.nonce is None:
            self._nameless.append((message.content, time.monotonic() + RECOGNISED_FOR))

    def recognise(self, messages: Sequence[OutgoingMessage], ids: Mapping[tuple[int, str], int]) -> None:
        """Find its messages of unknown fate among new ones from the log; `ids` are by user and nonce."""
        for nonce in list(self.unsettled):
            if (message_id := ids.get((self.user_id, nonce))) is not None:
                self.unsettled.discard(nonce)
                self.own.add(message_id)
        if not self._nameless:
            return
        now = time.monotonic()
        for message in messages:  # without a nonce, the content has to do
            for each in self._nameless if message.user_id == self.user_id else ():
                if each[0] == message.content and now < each[1]:
                    self._nameless.remove(each)
                    self.own.add(message.message_id)
                    break

    def others(self, page: Page) -> bytes:
        """The frames of a page without its own ones, and forget those: the cursor passes them."""
        if not (own := self.own):
            return page.blob
        self.own = {message_id for message_id in own if message_id > page.cursor}
        return b"".join([data for message_id, data in page.frames if message_id not in own])
