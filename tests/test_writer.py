"""How a `MessageWriter` makes batches of what is submitted; the database answers when the test says so."""

import asyncio
import types
from unittest import mock

import pytest

from tests.support import SECRET, WAIT, until
from tollerchat import Config, writer
from tollerchat.errors import ChannelLocked, Unavailable
from tollerchat.hub import Hub
from tollerchat.protocol import OutgoingMessage
from tollerchat.saving import NewMessage, Saved
from tollerchat.tasks import end_tasks
from tollerchat.writer import MessageWriter

CONFIG = Config(db_url="postgresql://nowhere/none", jwt_secret=SECRET, max_pending=1000)


class Repository:
    """The batches that are with the database."""

    def __init__(self):
        self.batches = []
        self.stored = []
        self._ids = iter(range(1, 10**6))

    async def save_messages(self, batch, heads):
        answer = asyncio.get_running_loop().create_future()
        self.batches.append((batch, answer))
        return await answer

    def contents(self):
        return [[message.content for message in batch] for batch, _ in self.batches]

    def answer(self, n=0, *, but=()):
        """Store a batch, but for some contents, which have errors of their own."""
        batch, answer = self.batches.pop(n)
        errors = dict(but)
        answer.set_result([errors.get(message.content) or self._save(message) for message in batch])

    def _save(self, message):
        self.stored.append(message.content)
        stored = OutgoingMessage(message.content, message.user_id, message.channel_id, next(self._ids), "now")
        return Saved(stored, repeated=False, previous=0)


class Sender:
    """What all senders are told."""

    def __init__(self):
        self.told = []

    def answer(self):
        pass

    def stored(self, saved, nonce):
        self.told.append(saved.message.content)

    def refused(self, error, message):
        self.told.append((message.content, error.code))


class Desk:
    def __init__(self):
        self.repository = Repository()
        self.sender = Sender()
        self.writer = MessageWriter(CONFIG, self.repository, Hub(CONFIG, self.repository))

    def submit(self, channel_id, *contents, nonce=None, user_id=1):
        for content in contents:
            self.writer.submit(NewMessage(channel_id, user_id, content, nonce), self.sender)

    async def batches(self, *expected):
        """Wait until exactly these batches are with the database."""
        await until(lambda: self.repository.contents() == list(expected))

    async def unchanged(self):
        """Let all that can go on go on, and see that the database is given nothing more."""
        before = self.repository.contents()
        for _ in range(20):
            await asyncio.sleep(0)
        assert self.repository.contents() == before


@pytest.fixture
async def desk(monkeypatch):
    monkeypatch.setattr(writer, "LAST_RETRY_DELAY", 0.1)
    desk = Desk()
    task = asyncio.create_task(desk.writer.run())
    yield desk
    await end_tasks(task)


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(writer, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def test_what_waits_is_one_batch(desk):
    desk.submit(1, "a", "b")
    desk.submit(2, "c")
    await desk.batches(["a", "b", "c"])
    desk.repository.answer()
    await until(lambda: desk.sender.told == ["a", "b", "c"])


async def test_small_batches_of_other_channels_do_not_wait(desk):
    desk.submit(1, "a")
    await desk.batches(["a"])
    desk.submit(2, "b")
    await desk.batches(["a"], ["b"])
    desk.submit(3, "c")
    await desk.unchanged()
    desk.repository.answer(1)
    await desk.batches(["a"], ["c"])
    assert desk.sender.told == ["b"]


async def test_channel_is_in_one_batch_at_a_time(desk):
    desk.submit(1, "a")
    await desk.batches(["a"])
    desk.submit(1, "b", "c")
    desk.submit(2, "d")
    await desk.batches(["a"], ["d"])
    desk.submit(1, "e")
    desk.repository.answer(1)
    await until(lambda: desk.sender.told == ["d"])
    await desk.unchanged()
    desk.repository.answer()
    await desk.batches(["b", "c", "e"])


async def test_large_batch_has_the_database_for_itself_and_the_next_one_is_there_before_it_is_delivered(desk):
    desk.submit(1, *"abcdefgh")
    await desk.batches(list("abcdefgh"))
    desk.submit(2, "i")
    desk.submit(3, "j")
    await desk.unchanged()
    stored = []
    desk.sender.stored = lambda saved, nonce: stored.append(
        (saved.message.content, desk.repository.contents())
    )
    desk.repository.answer()
    await until(lambda: len(stored) == 8)
    assert stored[0] == ("a", [["i", "j"]])


async def test_batch_is_bounded_and_the_rest_of_a_channel_is_behind_it(desk, monkeypatch):
    monkeypatch.setattr(writer, "BATCH_MESSAGES", 3)
    desk.submit(1, "a", "b")
    desk.submit(2, "c", "d", "e")
    desk.submit(3, "f")
    await desk.batches(["a", "b", "c"], ["f"])
    desk.submit(2, "g")
    desk.repository.answer()
    await desk.batches(["f"], ["d", "e", "g"])


async def test_batch_is_bounded_in_characters(desk):
    half = "x" * (writer.BATCH_CHARACTERS // 2)
    desk.submit(1, half, half, "behind")
    await desk.batches([half, half])
    desk.repository.answer()
    await desk.batches(["behind"])


async def test_nonce_is_not_twice_in_a_batch(desk):
    desk.submit(1, "a", "b", nonce="n")
    desk.submit(1, "c", nonce="n", user_id=2)
    desk.submit(1, "d")
    await desk.batches(["a", "c", "d"])
    desk.repository.answer()
    await desk.batches(["b"])


async def test_messages_of_a_locked_channel_keep_their_order_and_hold_up_no_other(desk):
    locked = ChannelLocked("locked")
    desk.submit(1, "a", "b")
    desk.submit(2, "c")
    await desk.batches(["a", "b", "c"])
    desk.submit(1, "d")
    desk.repository.answer(but={"a": locked, "b": locked}.items())
    await until(lambda: desk.sender.told == ["c"])
    desk.submit(1, "e")
    desk.submit(2, "f")
    await desk.batches(["f"])
    await desk.batches(["f"], ["a", "b", "d", "e"])
    desk.submit(3, *(str(n) for n in range(CONFIG.max_pending)))
    with pytest.raises(Unavailable):
        desk.submit(3, "one too many")


async def test_what_failed_is_tried_again_before_what_is_behind_it(desk):
    desk.submit(1, "a", nonce="n")
    desk.submit(2, "b")
    await desk.batches(["a", "b"])
    desk.submit(1, "c")
    desk.repository.answer(but={"a": Unavailable("lost", sent=True)}.items())
    await until(lambda: desk.sender.told == ["b"])
    desk.submit(2, "d")
    await desk.batches(["a", "c", "d"])


async def test_database_that_fails_is_let_be_for_a_while(desk):
    """However many channels have messages, and lanes nothing else to do."""
    desk.submit(1, "a")
    await desk.batches(["a"])
    desk.submit(2, "b")
    await desk.batches(["a"], ["b"])
    desk.submit(3, "c")
    down = Unavailable("down")
    desk.repository.answer(but={"a": down}.items())
    await desk.unchanged()
    desk.repository.answer(but={"b": down}.items())
    await desk.unchanged()
    await desk.batches(["c", "a", "b"])


async def test_what_waited_too_long_is_refused_at_once_where_the_database_fails(desk, clock):
    """Each try may take seconds, and those of many channels would wait for one after the other."""
    desk.submit(1, *"abcde", nonce=None)
    await desk.batches(list("abcde"))
    for channel_id in range(2, 30):
        desk.submit(channel_id, f"early {channel_id}")
    clock.now = CONFIG.store_timeout - 1
    desk.submit(2, "late")
    clock.now += 1
    lost = Unavailable("lost", sent=True)
    desk.repository.answer(but=dict.fromkeys("abcde", lost).items())
    await desk.batches(["late"])
    early = [f"early {channel_id}" for channel_id in range(2, 30)]
    await until(lambda: len(desk.sender.told) == 33)
    assert sorted(desk.sender.told) == sorted((content, "unavailable") for content in [*"abcde", *early])


async def test_what_waited_long_is_stored_where_the_database_is_only_slow(desk, clock):
    desk.submit(1, *"abcde")
    await desk.batches(list("abcde"))
    desk.submit(2, "f")
    clock.now = 2 * CONFIG.store_timeout
    desk.repository.answer(but={"a": ChannelLocked("locked")}.items())  # which is no failure
    await desk.batches(["f"])


async def test_at_the_end_nothing_begins_that_is_not_in_time(desk):
    desk.submit(1, *"abcde")
    await desk.batches(list("abcde"))
    desk.submit(2, "f")
    flushed = asyncio.create_task(desk.writer.flush(0))
    await asyncio.sleep(0)
    desk.repository.answer()
    await asyncio.wait_for(flushed, WAIT)
    assert set(desk.sender.told) == {*"abcde", ("f", "unavailable")}


async def test_at_the_end_a_try_that_takes_too_long_is_given_up(desk):
    desk.submit(1, "a")
    await desk.batches(["a"])
    flushed = asyncio.create_task(desk.writer.flush(0.5))
    await asyncio.sleep(0)
    desk.repository.answer(but={"a": Unavailable("down")}.items())
    await desk.batches(["a"])  # and never an answer
    await asyncio.wait_for(flushed, WAIT)
    assert desk.sender.told == [("a", "unavailable")]


async def test_error_while_answering_does_not_end_the_writer(desk):
    desk.submit(1, "a")
    await desk.batches(["a"])
    desk.sender.stored = mock.Mock(side_effect=ZeroDivisionError)
    desk.repository.answer()
    await until(lambda: desk.sender.stored.called)
    del desk.sender.stored
    desk.submit(1, "b")
    await desk.batches(["b"])


async def test_flush_waits_for_what_is_behind_and_what_is_parked(desk):
    desk.submit(1, "a")
    desk.submit(2, "b")
    await desk.batches(["a", "b"])
    desk.submit(1, "c")
    flushed = asyncio.create_task(desk.writer.flush(WAIT))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        desk.submit(3, "too late")
    desk.repository.answer(but={"b": ChannelLocked("locked")}.items())
    await desk.batches(["c"])
    desk.repository.answer()
    await desk.batches(["b"])
    assert not flushed.done()
    desk.repository.answer()
    await asyncio.wait_for(flushed, WAIT)
    assert desk.sender.told == ["a", "c", "b"]


async def test_more_than_may_wait_is_refused_until_some_are_stored(desk):
    desk.submit(1, *(str(n) for n in range(1000)))
    with pytest.raises(Unavailable):
        desk.submit(2, "one too many")
    await until(lambda: desk.repository.batches)
    desk.submit(2, *(str(n) for n in range(500)))
    with pytest.raises(Unavailable):
        desk.submit(2, "one too many")
    while len(desk.sender.told) < 1500:
        await until(lambda: desk.repository.batches)
        desk.repository.answer()
        await until(lambda: desk.repository.batches or len(desk.sender.told) == 1500)
    desk.submit(2, *(str(n) for n in range(1000)))


async def test_error_while_refusing_does_not_end_the_writer(desk, clock):
    desk.submit(1, *"abcde")
    await desk.batches(list("abcde"))
    desk.submit(2, "f")
    clock.now = 2 * CONFIG.store_timeout
    desk.sender.refused = mock.Mock(side_effect=ZeroDivisionError)
    desk.repository.answer(but=dict.fromkeys("abcde", Unavailable("lost", sent=True)).items())
    await until(lambda: desk.sender.refused.called and desk.sender.refused.call_args.args[1].content == "f")
    del desk.sender.refused
    desk.submit(1, "g")
    await desk.batches(["g"])
