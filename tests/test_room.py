"""What a room must not be misled by while it reads the log: moments too short for the tests with a database."""

import asyncio
import types

import pytest

from tests.support import WAIT
from tollerchat.protocol import OutgoingMessage
from tollerchat.room import Room
from tollerchat.saving import Saved


def message(message_id):
    return OutgoingMessage(f"m{message_id}", 1, 1, message_id, "2026-01-01T00:00:00.000000Z")


class Log:
    """The messages of one channel; while `paused`, what was read is not answered yet."""

    def __init__(self, *ids):
        self.ids = list(ids)
        self.readings = 0
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    def pause(self):
        self._goes_on.clear()

    def go_on(self):
        self._goes_on.set()

    async def load_last_messages(self, channel_id, until, limit):
        return await self._answer([n for n in self.ids if n <= until][-limit:])

    async def load_messages_after(self, channel_id, after, until, limit):
        return await self._answer([n for n in self.ids if after < n <= until][:limit])

    async def _answer(self, ids):
        self.readings += 1
        await asyncio.sleep(0)
        await self._goes_on.wait()
        return [message(n) for n in ids]


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("the condition did not come true")


async def joined(room):
    """What somebody who joins now is sent."""
    await asyncio.wait_for(room.load(), WAIT)
    return [message_id for message_id, _ in room.tail.since(room.tail.history_cursor()).frames]


async def test_message_deleted_while_it_is_read_is_not_kept():
    log = Log(1, 2)
    room = Room(1, log, 2)
    assert await joined(room) == [1, 2]
    log.ids += [3, 4]
    log.pause()
    room.hint(4)
    await until(lambda: log.readings == 2)
    log.ids.remove(3)
    room.forget()
    log.go_on()
    await until(lambda: room.head == 4)
    assert await joined(room) == [2, 4]


async def test_message_whose_deletion_is_known_before_its_commit_is_not_kept():
    log = Log(1)
    room = Room(1, log, 2)
    assert await joined(room) == [1]
    room.begin_commit()
    room.forget()  # 2 is committed and deleted, but the answer is on its way
    room.commit([Saved(message(2), repeated=False, previous=1)])
    room.end_commit()
    room.begin_commit()
    room.commit([Saved(message(3), repeated=False, previous=2)])
    log.ids.append(3)
    room.end_commit()
    assert await joined(room) == [1, 3]


async def test_hint_of_what_is_not_in_the_log_hides_nothing():
    log = Log(1)
    room = Room(1, log, 50)
    assert await joined(room) == [1]
    room.hint(10**30)
    await until(lambda: log.readings == 2)
    log.ids.append(2)
    await room.reach(2)
    assert await joined(room) == [1, 2]


async def test_reach_does_not_wait_for_what_was_deleted():
    log = Log(1)
    room = Room(1, log, 50)
    await room.load()
    await asyncio.wait_for(room.reach(5), WAIT)
    assert room.head == 1


async def test_emptied_log_starts_again_whatever_is_being_read():
    log = Log(*range(1, 100))
    room = Room(1, log, 50)
    await room.load()
    log.ids += range(100, 120)
    log.pause()
    room.hint(119)
    await until(lambda: log.readings == 2)
    log.ids = [1, 2]
    room.restart()
    log.go_on()
    assert await joined(room) == [1, 2]
    await until(lambda: room.catching_up is None)
    log.ids.append(3)
    room.hint(3)
    await until(lambda: room.head == 3)
    assert await joined(room) == [1, 2, 3]


@pytest.mark.parametrize("joined_since", [False, True])
async def test_commit_in_a_log_that_was_emptied_since_hides_nothing_in_the_new_one(joined_since):
    """Its answer is late, and meanwhile ids have started again."""
    log = Log(1)
    room = Room(1, log, 50)
    await room.load()
    room.begin_commit()
    log.ids = []
    room.restart()
    current = Room(1, log, 50) if joined_since else room  # all have left, and somebody came again
    await current.load()
    current.commit([Saved(message(6), repeated=False, previous=1)])
    room.end_commit()
    await until(lambda: log.readings > 2 and current.catching_up is None)
    assert current.head == 0
    current.begin_commit()
    log.ids.append(1)
    current.commit([Saved(message(1), repeated=False, previous=0)])
    current.end_commit()
    assert await joined(current) == [1]


async def test_closed_room_reads_no_more():
    log = Log(1)
    room = Room(1, log, 50)
    await room.load()
    room.begin_commit()
    room.hint(10)
    await room.close()
    room.end_commit()
    await asyncio.sleep(0)
    assert log.readings == 1
    assert len(asyncio.all_tasks()) == 1


async def test_stream_of_changes_does_not_stop_what_goes_live():
    log = Log(1)
    room = Room(1, log, 50)
    await room.load()
    log.ids += range(2, 200)
    room.hint(199)
    for _ in range(1000):
        room.forget()
        await asyncio.sleep(0)
    assert room.head == 199


async def test_hint_of_what_is_not_in_the_log_is_read_for_once():
    log = Log(1)
    room = Room(1, log, 50)
    await room.load()
    room.hint(10**30)
    await until(lambda: log.readings == 2 and room.catching_up is None)
    for message_id in (2, 3, 4):
        room.begin_commit()
        room.commit([Saved(message(message_id), repeated=False, previous=message_id - 1)])
        room.end_commit()
        await asyncio.sleep(0)
    assert log.readings == 2


@pytest.mark.parametrize("announced_by", ["hint", "commit"])
async def test_wrong_hint_does_not_hide_what_is_announced_while_it_is_read_for(announced_by):
    log = Log(1)
    room = Room(1, log, 50)
    await room.load()
    log.pause()
    room.hint(10**30)
    await until(lambda: log.readings == 2)
    log.ids += [2, 3]
    if announced_by == "hint":
        room.hint(3)
    else:  # behind a message of somebody else
        room.begin_commit()
        room.commit([Saved(message(3), repeated=False, previous=2)])
        room.end_commit()
    log.go_on()
    await until(lambda: room.head == 3)
    await until(lambda: room.catching_up is None)
    assert log.readings == 3


class Listener:
    """A client of a room; what is done for it is added to `order`."""

    def __init__(self, name, order, *, lags=False):
        self._name, self._order, self._lags = name, order, lags
        self.outbox = None

    def deliver(self, page, written):
        self._order.append((self._name, page.blob[written:]))
        return None if self._lags else 9

    def catch_up(self, cursor):
        self._order.append((self._name, cursor))


async def test_everybody_is_served_once_and_whole(monkeypatch):
    order, taken = [], {3: None, 4: 10, 5: OSError}

    def write(descriptor, data):
        order.append((descriptor, data))
        if taken[descriptor] is OSError:
            raise BlockingIOError
        return taken[descriptor] or len(data)

    monkeypatch.setattr("tollerchat.audience.os", types.SimpleNamespace(write=write))
    room = Room(1, Log(1), 50)
    await room.load()
    names = {"reads": 3, "reads some": 4, "full": 5, "sends": -1, "lags": -1}
    clients = {name: Listener(name, order, lags=name == "lags") for name in names}
    room.audience.live = {clients[name]: descriptor for name, descriptor in names.items()}
    room.begin_commit()
    room.commit([Saved(message(2), repeated=False, previous=1)])
    room.end_commit()
    blob = room.tail.since(1).blob
    assert order == [
        (3, blob), (4, blob), ("reads some", blob[10:]), (5, blob), ("full", blob),
        ("sends", blob), ("lags", blob), ("lags", 1),
    ]  # fmt: skip
    left = {name: room.audience.live[clients[name]] for name in names if clients[name] in room.audience.live}
    assert left == {"reads": 3, "reads some": 9, "full": 9, "sends": 9}
