"""What becomes of a batch that cannot be stored as a whole: answers of the database that are hard to time for real."""

import re

import psycopg2

from tests.support import SECRET
from tollerchat import Config
from tollerchat.connection import ConnectionWatch
from tollerchat.errors import ChannelLocked, Unavailable
from tollerchat.saving import NewMessage, Saver

LOCKED = psycopg2.errors.LockNotAvailable()


class Database(Saver):
    """`answers` are for each attempt to store, in turn: an exception, or None where it succeeds."""

    def __init__(self, *answers):
        super().__init__(Config(jwt_secret=SECRET), ConnectionWatch())
        self._answers = list(answers)
        self.attempts = []  # the channels of each

    async def _run(self, sql, parameters=None):
        if "pg_try" in str(sql):
            return []  # no channel is locked by another writer: it was a row
        array = re.search(rb"\{([\d,]+)\}", sql)[1]
        self.attempts.append([int(number) for number in array.split(b",")])
        if (answer := self._answers.pop(0)) is not None:
            raise answer
        if b"save_one" in sql:
            return [(1, None, "")]
        return [(n + 1, None, "", None) for n in range(sql.count(b'"content"'))]


def batch(*channel_ids):
    return [NewMessage(channel_id, 1, "x") for channel_id in channel_ids]


async def test_without_a_database_the_parts_of_a_batch_do_not_each_wait_for_it():
    database = Database(LOCKED, None, Unavailable("away", sent=True))
    first, second, *rest = await database.save(batch(*range(1, 101)), {})
    assert database.attempts == [list(range(1, 101)), [1], [2]]
    assert first.message.channel_id == 1
    assert second.sent
    assert {(type(result), result.sent) for result in rest} == {(Unavailable, False)}


async def test_what_follows_a_locked_message_is_not_tried_again_before_it():
    """A batch is halved twice, and the database goes away between two messages of a locked channel."""
    refused = psycopg2.errors.NotNullViolation()
    database = Database(refused, refused, LOCKED, Unavailable("away"))
    results = await database.save(batch(1, 2, 3, 1), {})
    assert [type(result) for result in results] == [ChannelLocked, Unavailable, Unavailable, ChannelLocked]
