"""`Outbox`: what a client has sent, and what becomes of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from tollerchat.errors import ChatError, Unavailable
from tollerchat.protocol import MAX_BIGINT, AckFrame, OutgoingMessage, encode, error_frame
from tollerchat.saving import NewMessage, Saved
from tollerchat.tail import Page
from tollerchat.websocket import WebSocket

__all__ = ("Outbox",)

# Seconds after a refusal, in which PostgreSQL may begin to store the message after all.
LINGERS_FOR: Final = 10.0


class Outbox:
    """The messages that one connection sent: their answers, and which of the log's it is not to be sent.

    An ack stands where its message would, were it another's: behind all that is before it in the log.
    To the `MessageWriter`, it is their sender. A message is

    - in flight: counted, and among the `unsettled` if it has a nonce;
    - then stored: its id is among its `own`, and its ack waits, until the cursor reaches it;
    - or refused, and among the `doubts` where it may be stored all the same, to be recognised if it comes up;
    - or not taken: then its refusal is late, behind the answers to those before.
    """

    __slots__ = (
        "_answers",
        "_cursor",
        "_early",
        "_in_flight",
        "_late",
        "_max_in_flight",
        "_socket",
        "_v1",
        "doubts",
        "own",
        "unsettled",
        "user_id",
    )

    def __init__(self, websocket: WebSocket, user_id: int, max_in_flight: int, *, v1: bool) -> None:
        self.user_id = user_id
        self._socket = websocket
        self._v1 = v1
        self._max_in_flight = max_in_flight
        self._in_flight = 0  # messages without an answer
        self._cursor = 0  # the client's; while idle, it may be behind
        # Answers in the order of the messages, each with the id that the cursor must reach first, 0 for a refusal.
        self._answers: deque[tuple[int, bytes]] = deque()
        # Refusals that tell by their nonce which message they are of: they need not wait for acks, which need the log.
        self._early: list[bytes] = []
        self.own: set[int] = set()  # ids of its messages that its cursor has not passed yet
        # Of its messages without an answer that have a nonce: it, and a hash of the content.
        self.unsettled: set[tuple[str, int]] = set()
        # The same of those that may be stored although they were refused, with a nonce or without, and since when.
        self.doubts: list[tuple[str | None, int, float]] = []
        # Refusals of messages that were not taken, until those before have their answers.
        self._late: list[bytes] = []

    @property
    def idle(self) -> bool:
        """Whether all that follows in the log is another's, and no answer is to be put in its place."""
        return not (self._in_flight or self.own or self.unsettled or self.doubts)

    @property
    def is_refusing(self) -> bool:
        """Whether a message was not taken, and its sender does not know yet: what follows must not overtake it."""
        return bool(self._late)

    @property
    def owes(self) -> bool:
        """Whether there are answers that its cursor has not reached."""
        return bool(self._answers)

    def sent(self, content: str, nonce: str | None, cursor: int) -> None:
        """A message is under way; `cursor` is where its sender is in the log."""
        self._cursor = cursor
        self._in_flight += 1
        self._stop_if_full()
        if nonce is not None:
            sent = (nonce, hash(content))
            self.unsettled.add(sent)
            if self.doubts:  # it may be sent again
                self.doubts = [doubt for doubt in self.doubts if doubt[:2] != sent]

    def not_taken(self, error: ChatError, nonce: str | None) -> None:
        """A message was not taken; it is told in its turn, because without a nonce only the order can tell which."""
        if self._in_flight:
            self._late.append(error_frame(error, nonce))
            self._stop_if_full()
        else:
            self._socket.write(error_frame(error, nonce))

    def _stop_if_full(self) -> None:
        """Take nothing more from the client while as many messages are under way as may be."""
        if self._in_flight + len(self._late) >= self._max_in_flight:
            self._socket.busy = True

    def stored(self, saved: Saved, nonce: str | None) -> None:
        """The message is committed: it is not to be sent to its sender, but its ack, in its place."""
        message = saved.message
        if nonce is not None:
            self.unsettled.discard((nonce, hash(message.content)))
        if message.message_id > self._cursor:
            self.own.add(message.message_id)
        ack = encode(AckFrame(nonce, message.message_id, message.created_at)) if self._v1 else b""
        self._answers.append((message.message_id, ack))

    def refused(self, error: ChatError, message: NewMessage) -> None:
        """It is not stored, or, for all we know, may be: then it is remembered, to be recognised in the log."""
        nonce, content = message.nonce, hash(message.content)
        answer = error_frame(error, nonce)
        if nonce is None:
            self._answers.append((0, answer))
        else:
            self._early.append(answer)
            self.unsettled.discard((nonce, content))
        # With a nonce in any case: an earlier copy may have been refused.
        if isinstance(error, Unavailable) and (error.sent or nonce is not None):
            self.doubts.append((nonce, content, time.monotonic()))

    def answer(self) -> None:
        """Write the answers whose place is not behind the cursor; drop all if the connection is closing."""
        if self._answers or self._early:
            until = MAX_BIGINT if self._socket.closing else self._cursor
            early, self._early = self._early, []
            if data := b"".join(self._take_answers(until) + self._answered(early)):
                self._socket.write(data)

    def _take_answers(self, message_id: int) -> list[bytes]:
        """The answers whose place is not behind this id."""
        taken: list[bytes] = []
        answers = self._answers
        while answers and answers[0][0] <= message_id:
            taken.append(answers.popleft()[1])
        return self._answered(taken)

    def _answered(self, answers: list[bytes]) -> list[bytes]:
        """What is to be written for answers: behind the last one, the refusals that waited for it."""
        if answers:
            self._in_flight -= len(answers)
            if self._socket.busy:
                self._socket.busy = False
                self._socket.read_on()
            if self._late and not self._in_flight:
                answers += self._late
                self._late = []
        return answers

    def recognise(self, messages: Sequence[OutgoingMessage], nonces: Mapping[int, str]) -> None:
        """Find its messages of unknown fate among new ones from the log; `nonces` are by message id."""
        for message in messages:
            if message.user_id != self.user_id or message.message_id in self.own:
                continue
            # Or it is of another connection of the same user.
            if self._claim(nonces.get(message.message_id), hash(message.content)):
                self.own.add(message.message_id)

    def _claim(self, nonce: str | None, content: int) -> bool:
        """Whether it sent this, and does not know what became of it; asked once."""
        if nonce is not None and (nonce, content) in self.unsettled:
            self.unsettled.remove((nonce, content))
            return True
        for doubt in self.doubts:
            if doubt[:2] == (nonce, content):
                self.doubts.remove(doubt)
                return True
        return False

    def end_doubts(self, compared_at: float) -> None:
        """All that the log had then has come up: what was refused long before is not in it."""
        if self.doubts:
            self.doubts = [doubt for doubt in self.doubts if doubt[2] > compared_at - LINGERS_FOR]

    def others(self, page: Page) -> bytes:
        """The frames of a page, with answers in place of its own ones; the cursor passes them."""
        self._cursor = page.cursor
        own, answers = self.own, self._answers
        if not own and not answers:
            return page.blob
        parts: list[bytes] = []
        for message_id, data in page.frames:
            if answers and answers[0][0] <= message_id:
                parts += self._take_answers(message_id)
            if message_id in own:
                own.remove(message_id)
            else:
                parts.append(data)
        if answers:
            parts += self._take_answers(page.cursor)
        if own:  # some may have been deleted before they came up
            self.own = {message_id for message_id in own if message_id > page.cursor}
        return b"".join(parts)
