"""When a connection is pinged, and when it is taken for dead; by a clock of its own."""

import types

import pytest

from tests.support import SECRET
from tollerchat import Config
from tollerchat.auth import Identity
from tollerchat.client import Client
from tollerchat.protocol import PING_FRAME

CONFIG = Config(db_url="postgresql://nowhere/none", jwt_secret=SECRET, ping_interval=54, pong_timeout=60)


class Connection:
    """What a client sees of its connection; it was opened at 0."""

    closing = full = paused = False

    def __init__(self):
        self.heard_at = 0.0
        self.pings = 0
        self.aborted = False
        self.transport = types.SimpleNamespace(abort=self._abort)

    def write(self, data):
        assert data == PING_FRAME
        self.pings += 1

    def _abort(self):
        self.aborted = True


@pytest.fixture
def connection():
    return Connection()


@pytest.fixture
def client(connection):
    client = Client(CONFIG, None, None, Identity(1, float("inf")), 1, v1=True)
    client._socket, client._started, client.due = connection, True, 0.0
    client._next_ping = 54.0
    return client


def look(client, connection, *, until, answers=True):
    """Look at it each second, as long as it lives; returns when it was aborted, if it was."""
    for now in range(until):
        if client.due <= now:
            pings = connection.pings
            client.check(now, 0.0)
            if connection.aborted:
                return now
            if answers and connection.pings > pings:
                connection.heard_at = now + 0.1
    return None


def test_one_that_answers_is_pinged_again_and_again(client, connection):
    assert look(client, connection, until=600) is None
    assert connection.pings == 600 // 54


def test_one_that_does_not_answer_is_aborted_in_time(client, connection):
    assert 60 <= look(client, connection, until=100, answers=False) <= 62
    assert connection.pings == 1


def test_one_that_was_heard_just_before_it_was_asked_has_its_time(client, connection):
    connection.heard_at = 53.5
    assert 113 < look(client, connection, until=200, answers=False) <= 115
    assert connection.pings == 1


def test_one_that_was_not_asked_is_not_dead(client, connection):
    """The server stood still when the time came."""
    client.check(40, 0.0)
    client.check(100, 0.0)
    assert connection.pings == 1
    assert not connection.aborted
    connection.heard_at = 100.1
    client.check(107, 0.0)
    assert not connection.aborted


def test_one_whose_ping_was_answered_late_in_a_standstill_lives(client, connection):
    client.check(54, 0.0)
    connection.heard_at = 99.9  # it is read before anybody is judged
    client.check(100, 0.0)
    assert not connection.aborted
