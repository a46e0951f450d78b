"""`MessageWriter`: group commit. All messages that wait go to the database in one transaction."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from tollerchat.config import Config
from tollerchat.errors import ChannelLocked, ChatError, Unavailable
from tollerchat.hub import Hub
from tollerchat.repository import Repository
from tollerchat.room import Room
from tollerchat.saving import NewMessage, Saved, SaveResult
from tollerchat.tasks import end_tasks

__all__ = ("MessageWriter", "Sender")

logger = logging.getLogger("tollerchat.writer")

BATCH_MESSAGES: Final = 500
BATCH_CHARACTERS: Final = 128 * 1024  # bounds the blob of one commit, and so the buffers of slow clients
WRITES_PER_MESSAGE: Final = 4  # that take as long as the database needs for the message
GATHERING: Final = 0.25  # of the time that delivering took, to wait for more
MIN_GATHERING: Final = 0.0005  # seconds; less is not worth a timer
MAX_GATHERING: Final = 0.005
FIRST_RETRY_DELAY: Final = 0.05  # seconds; doubles up to
LAST_RETRY_DELAY: Final = 0.5


class Sender(Protocol):
    """Who is told what became of a message."""

    def committed(self, message_id: int) -> None: ...  # before the broadcast, which it is not to get
    def hold(self) -> None: ...  # what is written now can wait
    def release(self) -> None: ...  # until now
    def stored(self, saved: Saved, nonce: str | None) -> None: ...
    def refused(self, error: ChatError, message: NewMessage) -> None: ...


class Submission(NamedTuple):
    message: NewMessage
    sender: Sender
    deadline: float  # by time.monotonic(); after it, it is not tried again


class Commit(NamedTuple):
    """A batch on its way to the database."""

    batch: list[Submission]
    rooms: list[Room]  # which are not to read the log past it before its answer
    retry_delay: float = FIRST_RETRY_DELAY  # seconds


class MessageWriter:
    """Takes messages in, stores them in order, has them broadcast, and tells their senders."""

    def __init__(self, config: Config, repository: Repository, hub: Hub) -> None:
        self._config = config
        self._repository = repository
        self._hub = hub
        self._waiting: deque[Submission] = deque()
        self._parked: dict[int, list[Submission]] = {}  # of channels that somebody else holds
        self._parked_count = 0
        self._saving: asyncio.Task[list[SaveResult]] | None = None  # of a batch that began before its turn
        self._work = asyncio.Event()  # there is something to store
        self._idle = asyncio.Event()  # there is nothing to store, and nothing being stored
        self._idle.set()
        self._closed = False
        self._last_try = math.inf  # by time.monotonic(); after it, nothing is tried any more

    def submit(self, message: NewMessage, sender: Sender) -> None:
        """Queue a message. Raises `Unavailable` where it cannot wait; else the sender is told in time."""
        if self._closed:
            raise Unavailable("the server is shutting down: send it again to another one")
        if len(self._waiting) + self._parked_count >= self._config.max_pending:
            raise Unavailable("too many messages wait for the database: send it again later")
        deadline = time.monotonic() + self._config.store_timeout
        self._waiting.append(Submission(message, sender, deadline))
        self._work.set()
        self._idle.clear()

    async def flush(self, timeout: float) -> None:
        """Take nothing more, and wait until all that was taken has its answer.

        After `timeout` seconds nothing is tried any more: the answer is `Unavailable` then.
        """
        self._closed = True
        self._last_try = time.monotonic() + timeout
        await self._idle.wait()

    async def run(self) -> None:
        """Store what is submitted, until cancelled."""
        try:
            while True:
                await self._work.wait()
                commit = self._next()
                while commit is not None:
                    commit = await self._finish(commit)
                self._work.clear()
                if not self._parked:
                    self._idle.set()
        finally:
            await end_tasks(self._saving)

    def _next(self, limit: int = BATCH_MESSAGES) -> Commit | None:
        """What waits, if anything does."""
        if not (batch := self._take_batch(limit)):
            return None
        return Commit(batch, self._hub.begin_commit({each.message.channel_id for each in batch}))

    async def _save(self, commit: Commit) -> list[SaveResult]:
        messages = [submission.message for submission in commit.batch]
        # They may have waited behind others.
        deadline = max(submission.deadline for submission in commit.batch)
        if time.monotonic() >= min(deadline, self._last_try):
            await asyncio.sleep(0)  # there may be many batches of them, and others want their turn
            problem = "the server is shutting down" if self._closed else "the database is too slow"
            return [Unavailable(f"{problem}: send it again later")] * len(messages)
        try:
            heads = {room.channel_id: room.head for room in commit.rooms}
            return await self._repository.save_messages(messages, heads)
        except Unavailable as exc:
            logger.warning("%d messages are not stored yet: %s", len(messages), exc)
            return [exc] * len(messages)
        except Exception:
            logger.exception("%d messages could not be stored", len(messages))
            return [Unavailable("the message could not be stored", sent=True)] * len(messages)

    async def _finish(self, commit: Commit) -> Commit | None:
        """Wait for the database, and deal with its answers; returns what is on its way then."""
        saving, self._saving = self._saving, None
        results = await (saving or self._save(commit))
        following = None
        if self._waiting and self._may_overlap(commit, results):
            # The database works on the next batch while we deliver this one: half of what is under way each.
            limit = min(BATCH_MESSAGES, (len(commit.batch) + len(self._waiting) + 1) // 2)
            if (following := self._next(limit)) is not None:
                self._saving = asyncio.create_task(self._save(following))
                await asyncio.sleep(0)  # has it sent
        started = time.monotonic()
        try:
            retry = self._answer(commit.batch, results)
        except Exception:  # the rows may be stored: the log has them, and the writer must go on
            logger.exception("the answers to %d messages could not be dealt with", len(results))
            retry = []
            for result in results:
                if isinstance(result, Saved):
                    self._hub.hint(result.message.channel_id, result.message.message_id)
        if retry:  # then nothing follows, see _may_overlap()
            await asyncio.sleep(commit.retry_delay)
            return Commit(retry, commit.rooms, min(commit.retry_delay * 2, LAST_RETRY_DELAY))
        self._hub.end_commit(commit.rooms)
        if following is None:
            # Many clients are written to once for all that comes meanwhile.
            gathering = (time.monotonic() - started) * GATHERING
            if gathering > MIN_GATHERING:
                await asyncio.sleep(min(gathering, MAX_GATHERING))
            following = self._next()
        return following

    def _may_overlap(self, commit: Commit, results: Iterable[SaveResult]) -> bool:
        """Whether the next batch may and should be stored before this one is delivered."""
        # Nothing of a client may overtake what has to be tried again.
        if not all(isinstance(result, Saved) for result in results):
            return False
        # Where delivering takes longer than storing, a large batch, one write to each, is worth more.
        writes = sum(len(room.live) for room in commit.rooms)
        return writes <= WRITES_PER_MESSAGE * len(commit.batch)

    def _take_batch(self, limit: int) -> list[Submission]:
        """What waits, in order and within bounds, but no nonce twice: the second waits for the first."""
        batch: list[Submission] = []
        repeated: list[Submission] = []
        nonces: set[tuple[int, int, str]] = set()
        characters = 0
        while self._waiting and len(batch) < limit and characters < BATCH_CHARACTERS:
            submission = self._waiting.popleft()
            message = submission.message
            if message.channel_id in self._parked:
                self._park(submission)
                continue
            if message.nonce is not None:
                key = (message.channel_id, message.user_id, message.nonce)
                if key in nonces:
                    repeated.append(submission)
                    continue
                nonces.add(key)
            batch.append(submission)
            characters += len(message.content)
        self._waiting.extendleft(reversed(repeated))
        return batch

    def _park(self, submission: Submission) -> None:
        """Let a message wait for its channel, without holding up the others."""
        channel_id = submission.message.channel_id
        if channel_id not in self._parked:
            self._parked[channel_id] = []
            asyncio.get_running_loop().call_later(LAST_RETRY_DELAY, self._unpark, channel_id)
        self._parked[channel_id].append(submission)
        self._parked_count += 1

    def _unpark(self, channel_id: int) -> None:
        parked = self._parked.pop(channel_id)
        self._parked_count -= len(parked)
        self._waiting.extendleft(reversed(parked))
        self._work.set()

    def _answer(self, batch: Sequence[Submission], results: Iterable[SaveResult]) -> list[Submission]:
        """Broadcast what is committed and tell the senders; returns what is worth another try."""
        retry: list[Submission] = []
        answers: list[tuple[Submission, SaveResult]] = []
        committed: dict[int, list[Saved]] = {}
        for submission, result in zip(batch, results, strict=True):
            if isinstance(result, Unavailable) and result.sent:
                self._hub.in_doubt.set()  # it may be stored
            if isinstance(result, Saved):
                submission.sender.committed(result.message.message_id)
                if result.repeated:
                    self._hub.hint(result.message.channel_id, result.message.message_id)
                else:
                    committed.setdefault(result.message.channel_id, []).append(result)
            elif self._may_retry(submission, result):
                if isinstance(result, ChannelLocked):
                    self._park(submission)
                else:
                    retry.append(submission)
                continue
            answers.append((submission, result))
        # What a sender gets of this commit, others' messages and its own acks, is one write.
        senders = {submission.sender for submission, _ in answers}
        for sender in senders:
            sender.hold()
        try:
            for channel_id, saved in committed.items():
                self._hub.broadcast(channel_id, saved)
            for submission, result in answers:
                if isinstance(result, Saved):
                    submission.sender.stored(result, submission.message.nonce)
                else:
                    submission.sender.refused(result, submission.message)
        finally:
            for sender in senders:
                sender.release()
        return retry

    def _may_retry(self, submission: Submission, error: ChatError) -> bool:
        """Whether another try is in time, and cannot store the message twice."""
        deadline = min(submission.deadline, self._last_try)
        if not isinstance(error, Unavailable) or time.monotonic() >= deadline:
            return False
        # Where an answer was lost, only a nonce can tell whether the message is stored.
        return submission.message.nonce is not None or not error.sent
