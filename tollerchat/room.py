"""`Room`: one channel on this server, and how far its clients have been told its log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from tollerchat.audience import Audience
from tollerchat.errors import Unavailable
from tollerchat.logs import Seldom
from tollerchat.protocol import MAX_BIGINT, OutgoingMessage
from tollerchat.repository import Repository
from tollerchat.saving import Saved
from tollerchat.tail import Page, Tail, encode_all, page_of
from tollerchat.tasks import end_tasks

__all__ = ("PAGE_SIZE", "Room")

logger = logging.getLogger("tollerchat.room")
logger.addFilter(Seldom())  # it may be about many at once

# Messages read from the log at a time: a page of the largest ones must stay well under 1 MiB.
PAGE_SIZE: Final = 64

REACH_TIMEOUT: Final = 5.0  # seconds
RETRY_DELAY: Final = 0.5  # seconds, while the database is away


class Room:
    """The log of one channel, as far as `head`; every live client has been given all of it.

    Ids are handed out in commit order, so what follows `head` is either the next commit of this server
    (`commit`), or was written by somebody else, who told us (`hint`): then the room reads it from the log.
    """

    def __init__(self, channel_id: int, repository: Repository, history_size: int) -> None:
        self.channel_id = channel_id
        self.audience = Audience(channel_id)
        self.tail = Tail(history_size)  # of the log, up to what the live clients were given
        self._repository = repository
        self._history_size = history_size
        self._loaded = False
        self._loading: asyncio.Task[None] | None = None
        # The commit in flight: one at a time, because the writer has a channel in one batch.
        self._is_committing = False
        self._is_spoilt = False  # something was forgotten since it began, which may be in it
        self._is_stale = True  # it did not begin here, or the log has started again since
        self._commits_ended = 0
        # What is known to be in the log, each the newest id.
        self.stored = 0  # by this server, since ids started
        self._committed = 0  # told by a commit of this server, also of what it found there
        self._heard = 0  # announced by anybody
        self._target = 0  # that may be read from the log; if not beyond the head, there is nothing to read
        # A new message has an id that was passed before, and live clients did not get it: have ids gone back?
        self.is_suspect = False
        # Reading it.
        self.catching_up: asyncio.Task[None] | None = None
        self._edition = 0  # counts deletions, and all else that makes earlier readings stale
        self._generation = 0  # counts restarts: earlier readings are of a log that is gone
        self._progress: asyncio.Future[None] | None = None  # for those who wait in reach()
        self._readings = 0  # how often it began to
        self._read_to = (0, 0)  # which reading found nothing up to which id

    @property
    def head(self) -> int:
        """The newest message id that the live clients were given."""
        return self.tail.head

    # -- starting and ending -----------------------------------------------------------------------

    async def load(self) -> None:
        """Have the latest messages at hand: read once, for all who join meanwhile. Raises `Unavailable`."""
        while not (self._loaded and self.tail.has_history):
            if self._loading is None or self._loading.done():
                self._loading = asyncio.create_task(self._load())
            # One who stops waiting must not stop the load for the others.
            await asyncio.shield(self._loading)

    async def _load(self) -> None:
        edition, tail = None, self.tail
        while edition != self._edition:  # what was read may have been deleted while it was read
            edition = self._edition
            until = tail.head if self._loaded else MAX_BIGINT
            messages = await self._repository.load_last_messages(
                self.channel_id, until, self._history_size + 1
            )
        if not self._loaded:
            tail.head = messages[-1].message_id if messages else 0
            self._loaded = True
            self._tell_progress()
        elif tail.floor > until:
            return  # so much came meanwhile that the tail is long enough by now
        tail.fill(encode_all(messages), until)
        self._pursue()  # commits may have landed meanwhile

    async def close(self) -> None:
        """Stop reading the log; nobody is in the room any more."""
        self._loaded = False  # a commit that ends later must not start again
        await end_tasks(self._loading, self.catching_up)

    # -- how the log grows -------------------------------------------------------------------------

    def begin_commit(self) -> None:
        """A commit of this server is on its way: the log is not to be read past it before its answer."""
        self._is_committing, self._is_spoilt, self._is_stale = True, False, False

    def end_commit(self) -> None:
        """The answer has been dealt with."""
        self._is_committing = False
        self._commits_ended += 1
        if self._is_spoilt:
            self._drop()
        self._pursue()
        self._tell_progress()

    def commit(self, saved: Sequence[Saved]) -> bool:
        """Take what this server committed, in id order, and what it found committed under the same nonces.

        False if it cannot be: ids have gone back.
        """
        if self._is_stale:  # it may be of a log that is gone
            self.hint(max(each.message.message_id for each in saved))
            return True
        following: list[OutgoingMessage] = []
        head = self.tail.head
        follows = self._loaded
        for each in saved:
            message_id = each.message.message_id
            if message_id > self._committed:
                self._committed = message_id
            if not each.repeated:
                if message_id <= self.stored:
                    return False
                self.stored = message_id
                follows = follows and each.previous <= head
                # Or somebody else wrote in between: the rest is read from the log; or it was read from there already.
                if follows and message_id > head:
                    following.append(each.message)
                    head = message_id
                elif message_id <= each.previous:
                    self.is_suspect = True
        if following:
            self._extend(following)
        self._target = max(self._target, self._committed)
        return True

    def hint(self, message_id: int) -> None:
        """Somebody says that the log has grown to `message_id`. May be late, doubled or out of order."""
        self._heard = max(self._heard, message_id)
        self._pursue()

    def forget(self) -> None:
        """Messages were deleted or changed: do not send the old ones from memory."""
        self._is_spoilt = True
        self._drop()

    def _drop(self) -> None:
        self._edition += 1
        self.tail.forget()

    def restart(self) -> None:
        """The log was emptied, and its ids may start again; all who are in the room are being closed."""
        self._loaded = False
        self._generation += 1
        self._is_stale = True
        self.stored = self._committed = self._heard = self._target = 0
        self.is_suspect = False
        self.tail.head = 0
        self.forget()

    async def reach(self, message_id: int) -> None:
        """Wait until the head is at `message_id`, which the log has. Raises `Unavailable`.

        Then nothing is under way that was read or written before, and may have been deleted since.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + REACH_TIMEOUT
        commits = self._commits_ended + self._is_committing
        before = self._readings  # earlier ones may be from before the log had the message
        while True:
            reading, read_to = self._read_to
            if self.head >= message_id or (reading > before and read_to >= message_id):
                if self.catching_up is None and self._commits_ended >= commits:
                    return
            else:
                self.hint(message_id)
            if self._progress is None:
                self._progress = loop.create_future()
            try:
                await asyncio.wait_for(asyncio.shield(self._progress), end - loop.time())
            except asyncio.TimeoutError:
                raise Unavailable("the channel's log cannot be read: connect again") from None

    def _pursue(self) -> None:
        # A hint may be of a commit in flight, whose frames its sender must not get. After the answer
        # each sender knows its own, so only then is the hint a target.
        if not self._is_committing:
            self._target, self._heard = max(self._target, self._heard), 0
        if self._loaded and self._target > self.tail.head and self.catching_up is None:
            self.catching_up = asyncio.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        try:
            while self._loaded and self.head < self._target:
                edition, generation, committed = self._edition, self._generation, self._committed
                # What is announced from now on may be newer than what is read.
                target, self._target = self._target, 0
                self._readings += 1
                try:
                    messages = await self._repository.load_messages_after(
                        self.channel_id, self.head, target, PAGE_SIZE
                    )
                    await self._recognise(messages)
                except Unavailable as exc:
                    logger.warning("channel %d cannot catch up yet: %s", self.channel_id, exc)
                    messages = None
                if generation != self._generation:
                    continue  # it is of a log that is gone
                if messages is None:
                    self._target = max(self._target, target)
                    await asyncio.sleep(RETRY_DELAY)
                    continue
                is_complete = len(messages) < PAGE_SIZE
                # What was committed and deleted is passed, too: its sender waits for that.
                head = self.head  # commits may have landed meanwhile
                new = [message for message in messages if message.message_id > head]
                self._extend(new, until=committed if is_complete else 0)
                if edition != self._edition:
                    self._drop()  # what was read may have been deleted meanwhile: it was sent, but is not kept
                if is_complete:  # maybe with less than was announced: it was deleted, or never was
                    self._read_to = self._readings, target
                else:
                    self._target = max(self._target, target)
        finally:
            self.catching_up = None
            self._tell_progress()

    async def _recognise(self, messages: Sequence[OutgoingMessage]) -> None:
        """Find the messages of unknown fate among those from the log: their senders must not get them."""
        outboxes = [outbox for outbox in self.audience.outboxes() if outbox.unsettled or outbox.doubts]
        users = {outbox.user_id for outbox in outboxes}
        if ids := [message.message_id for message in messages if message.user_id in users]:
            nonces = await self._repository.nonces_of(self.channel_id, ids)
            for outbox in outboxes:  # one user may have sent it over several connections
                outbox.recognise(messages, nonces)

    def _tell_progress(self) -> None:
        if self._progress is not None:
            self._progress.set_result(None)
            self._progress = None

    def _extend(self, messages: Sequence[OutgoingMessage], until: int = 0) -> None:
        """Move the head, to the last message or to `until`: one blob for all live clients."""
        before = self.tail.head
        frames = encode_all(messages)
        page = page_of(frames, max(frames[-1][0] if frames else before, until))
        if page.cursor == before:
            return
        self.tail.extend(page)
        self._tell_progress()
        self.audience.deliver(page, before)

    # -- reading it --------------------------------------------------------------------------------

    async def seek(self, after: int | None, limit: int) -> tuple[int, bool]:
        """Where one who joins starts: before the last messages, or at `after`, but with no more than `limit` to come.

        Returns the cursor, and whether it is behind `after`, so that there is a gap. Raises `Unavailable`.
        """
        await self.load()
        if after is None:
            return self.tail.history_cursor(), False
        if after > self.head:  # the room may be behind the log
            newest = (await self._repository.newest_ids([self.channel_id]))[self.channel_id]
            await self.reach(min(after, newest))
            # Beyond the newest row there is nothing, its rows were deleted; new ones have greater ids.
            after = min(after, self.head)
        if (page := self.tail.since(after)) is None:
            start = await self._repository.nth_newest_id(self.channel_id, after, self.head, limit)
        else:
            start = page.frames[-limit - 1][0] if len(page.frames) > limit else None
        return (after, False) if start is None else (start, True)

    async def read(self, cursor: int) -> Page:
        """A page of what follows `cursor`, from the log. Raises `Unavailable`."""
        until = self.head
        messages = await self._repository.load_messages_after(self.channel_id, cursor, until, PAGE_SIZE)
        frames = encode_all(messages)
        return page_of(frames, frames[-1][0] if len(frames) == PAGE_SIZE else until)
