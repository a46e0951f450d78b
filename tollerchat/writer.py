"""`MessageWriter`: group commit. Messages that wait go to the database together, in one transaction."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import msgspec

from tollerchat.config import Config
from tollerchat.errors import ChannelLocked, ChatError, Unavailable
from tollerchat.hub import Hub
from tollerchat.logs import Seldom
from tollerchat.repository import Repository
from tollerchat.room import Room
from tollerchat.saving import LANES, NewMessage, Saved, SaveResult
from tollerchat.tasks import end_tasks

__all__ = ("MessageWriter", "Sender")

logger = logging.getLogger("tollerchat.writer")
logger.addFilter(Seldom())  # it may be about many at once

BATCH_MESSAGES: Final = 500
BATCH_CHARACTERS: Final = 128 * 1024  # bounds the blob of one commit, and so the buffers of slow clients
FEW: Final = 4  # messages; while more are with the database, nothing else is: it would slow them down
GATHERING: Final = 0.25  # of the time that delivering took, to wait for more
MIN_GATHERING: Final = 0.0005  # seconds; less is not worth a timer
MAX_GATHERING: Final = 0.005
FIRST_RETRY_DELAY: Final = 0.05  # seconds; doubles up to
LAST_RETRY_DELAY: Final = 0.5


class Sender(Protocol):
    """Who is told what became of a message."""

    def stored(self, saved: Saved, nonce: str | None) -> None: ...
    def refused(self, error: ChatError, message: NewMessage) -> None: ...
    def answer(self) -> None: ...  # now: what was stored has been broadcast


class Submission(msgspec.Struct):
    message: NewMessage
    sender: Sender
    deadline: float  # by time.monotonic(); after it, it is not tried again


class MessageWriter:
    """Takes messages in, stores them in order, has them broadcast, and tells their senders.

    A channel is in one batch at a time; what is submitted meanwhile waits behind it, and is the next one's: so a
    room is written to once for many messages, and nothing overtakes. Other channels need not wait for it.
    """

    def __init__(self, config: Config, repository: Repository, hub: Hub) -> None:
        self._config = config
        self._repository = repository
        self._hub = hub
        # What waits, by channel: for the next batch; behind a batch, or a lock; and what was in a batch, and is tried
        # again before what is behind it. A channel has a list in one of the first two, or in none.
        self._ready: dict[int, list[Submission]] = {}
        self._behind: dict[int, list[Submission]] = {}
        self._parked: dict[int, list[Submission]] = {}
        self._locked: set[int] = set()  # channels that somebody else holds
        self._count = 0  # messages in all of them
        self._storing = 0  # messages with the database
        self._pause: asyncio.TimerHandle | None = None  # while the database does not do, until the next try
        self._retry_delay = FIRST_RETRY_DELAY  # of the next pause
        self._resting: list[asyncio.Future[None]] = []  # lanes without work
        self._flushed: asyncio.Future[None] | None = None  # for flush()
        self._closed = False
        # By time.monotonic(): when nothing is tried any more, and when the last try is over.
        self._last_try = self._end = math.inf

    def submit(self, message: NewMessage, sender: Sender) -> None:
        """Queue a message. Raises `Unavailable` where it cannot wait; else the sender is told in time."""
        if self._closed:
            raise Unavailable("the server is shutting down: send it again to another one")
        if self._count >= self._config.max_pending:
            raise Unavailable("too many messages wait for the database: send it again later")
        submission = Submission(message, sender, time.monotonic() + self._config.store_timeout)
        self._count += 1
        if (behind := self._behind.get(message.channel_id)) is not None:
            behind.append(submission)
        else:
            self._ready.setdefault(message.channel_id, []).append(submission)
            self._wake()

    async def flush(self, timeout: float) -> None:
        """Take nothing more, and wait until all that was taken has its answer.

        After half of `timeout` seconds nothing is tried any more: the answer is `Unavailable` then. It takes longer
        only where a try that began before takes its whole `db_timeout`.
        """
        self._closed = True
        now = time.monotonic()
        self._last_try, self._end = now + timeout / 2, now + timeout
        self._flushed = asyncio.get_running_loop().create_future()
        self._tell_if_idle()
        await self._flushed
        await self._hub.settle_acks()

    async def run(self) -> None:
        """Store what is submitted, until cancelled."""
        lanes = [asyncio.create_task(self._lane()) for _ in range(LANES)]
        try:
            await asyncio.gather(*lanes)
        finally:
            await end_tasks(*lanes)
            self._resting.clear()
            if self._pause is not None:
                self._pause.cancel()

    async def _lane(self) -> None:
        """Store one batch after the other."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._may_begin():
                resting = loop.create_future()
                self._resting.append(resting)
                await resting
            if self._closed:
                self._refuse_late()
            if self._ready:
                await self._store(self._next())

    def _may_begin(self) -> bool:
        return bool(self._ready) and self._storing <= FEW and self._pause is None

    def _wake(self) -> bool:
        """Have a lane take what waits, if one can: the one that rested last, all of whose memory is warm."""
        if wakes := bool(self._resting) and self._may_begin():
            self._resting.pop().set_result(None)
        return wakes

    def _next(self) -> list[Submission]:
        """A batch of what is ready, within bounds, each channel's in order; the rest of these channels is behind it."""
        batch: list[Submission] = []
        size = 0
        while self._ready and len(batch) < BATCH_MESSAGES and size < BATCH_CHARACTERS:
            channel_id = next(iter(self._ready))
            ready = self._ready.pop(channel_id)
            behind = self._behind[channel_id] = []
            nonces = set()
            for n, submission in enumerate(ready):
                if len(batch) >= BATCH_MESSAGES or size >= BATCH_CHARACTERS:
                    behind += ready[n:]
                    break
                message = submission.message
                if message.nonce is not None:
                    if (key := (message.user_id, message.nonce)) in nonces:  # the second waits for the first
                        behind.append(submission)
                        continue
                    nonces.add(key)
                batch.append(submission)
                size += len(message.content)
        self._count -= len(batch)
        return batch

    async def _store(self, batch: Sequence[Submission]) -> None:
        """Store a batch, have it broadcast, and tell the senders; what fails is parked."""
        channel_ids = {submission.message.channel_id for submission in batch}
        rooms = self._hub.begin_commit(channel_ids)  # which are not to read the log past it before its answer
        self._storing += len(batch)
        results = await self._save([submission.message for submission in batch], rooms)
        self._storing -= len(batch)
        self._back_off(results)
        if self._wake():
            await asyncio.sleep(0)  # the database shall work while we deliver
        started = time.monotonic()
        try:
            self._answer(batch, results)
        except Exception:  # the rows may be stored: the log has them, and the writer must go on
            logger.exception("the answers to %d messages could not be dealt with", len(results))
            for result in results:
                if isinstance(result, Saved):
                    self._hub.hint(result.message.channel_id, result.message.message_id)
        self._hub.end_commit(rooms)
        # The many clients of a room are written to once for all that comes meanwhile.
        gathering = (time.monotonic() - started) / len(channel_ids) * GATHERING
        if gathering > MIN_GATHERING:
            await asyncio.sleep(min(gathering, MAX_GATHERING))
        for channel_id in channel_ids:
            self._release(channel_id)

    async def _save(self, messages: Sequence[NewMessage], rooms: Iterable[Room]) -> list[SaveResult]:
        try:
            heads = {room.channel_id: room.head for room in rooms}
            saving = self._repository.save_messages(messages, heads)
            if self._closed:
                return await asyncio.wait_for(saving, self._end - time.monotonic())
            return await saving
        except asyncio.TimeoutError:
            return [Unavailable("the server is shutting down", sent=True)] * len(messages)
        except Unavailable as exc:
            logger.warning("%d message(s) not stored yet: %s", len(messages), exc)
            return [exc] * len(messages)
        except Exception:
            logger.exception("%d messages could not be stored", len(messages))
            return [Unavailable("the message could not be stored", sent=True)] * len(messages)

    def _back_off(self, results: Iterable[SaveResult]) -> None:
        """Where the database did not do, let it be for a while, and longer if it still does not."""
        if not any(isinstance(each, Unavailable) and not isinstance(each, ChannelLocked) for each in results):
            self._retry_delay = FIRST_RETRY_DELAY
        elif self._pause is None:
            self._pause = asyncio.get_running_loop().call_later(self._retry_delay, self._go_on)
            self._retry_delay = min(2 * self._retry_delay, LAST_RETRY_DELAY)

    def _go_on(self) -> None:
        self._pause = None
        self._refuse_late()
        self._wake()

    def _release(self, channel_id: int) -> None:
        """A batch of the channel is dealt with: what failed and what is behind it can be next, if it is not locked."""
        if channel_id in self._locked:
            asyncio.get_running_loop().call_later(LAST_RETRY_DELAY, self._unlock, channel_id)
            return
        ready = self._parked.pop(channel_id, []) + self._behind.pop(channel_id)
        if ready:
            self._ready[channel_id] = ready
        else:
            self._tell_if_idle()

    def _unlock(self, channel_id: int) -> None:
        self._locked.discard(channel_id)
        self._release(channel_id)
        self._wake()

    def _refuse_late(self) -> None:
        """Answer what has waited too long: a batch might take as long again."""
        now = time.monotonic()
        problem = "the server is shutting down" if self._closed else "the database is too slow"
        error = Unavailable(f"{problem}: send it again later")
        refused: list[Submission] = []
        for channel_id, ready in list(self._ready.items()):
            late = list(itertools.takewhile(lambda each: now >= min(each.deadline, self._last_try), ready))
            refused += late
            if len(late) == len(ready):
                del self._ready[channel_id]
            elif late:
                del ready[: len(late)]
        self._count -= len(refused)
        try:
            self._answer(refused, [error] * len(refused))
        except Exception:  # one bad sender must not end the writer
            logger.exception("%d messages could not be answered", len(refused))
        self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        """Nothing waits, and nothing is being stored."""
        if self._flushed is not None and not (self._ready or self._behind or self._flushed.done()):
            self._flushed.set_result(None)

    def _answer(self, batch: Sequence[Submission], results: Iterable[SaveResult]) -> None:
        """Broadcast what is committed and tell the senders; park what is worth another try."""
        senders: dict[Sender, None] = {}
        committed: dict[int, list[Saved]] = {}
        for submission, result in zip(batch, results, strict=True):
            if isinstance(result, Saved):
                submission.sender.stored(result, submission.message.nonce)
                committed.setdefault(result.message.channel_id, []).append(result)
                senders[submission.sender] = None
                continue
            if isinstance(result, Unavailable) and result.sent:
                self._hub.compare_soon.set()  # it may be stored
            if self._may_retry(submission, result):
                self._parked.setdefault(submission.message.channel_id, []).append(submission)
                self._count += 1
                if isinstance(result, ChannelLocked):
                    self._locked.add(submission.message.channel_id)
            else:
                submission.sender.refused(result, submission.message)
                senders[submission.sender] = None
        try:
            for channel_id, saved in committed.items():
                self._hub.broadcast(channel_id, saved)
        finally:
            for sender in senders:
                sender.answer()

    def _may_retry(self, submission: Submission, error: ChatError) -> bool:
        """Whether another try is in time, and cannot store the message twice."""
        deadline = min(submission.deadline, self._last_try)
        if not isinstance(error, Unavailable) or time.monotonic() >= deadline:
            return False
        # Where an answer was lost, only a nonce can tell whether the message is stored.
        return submission.message.nonce is not None or not error.sent
