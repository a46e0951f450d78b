"""When a sender may be written to like one who only listens: not while anything of its own is on its way."""

import contextlib
import time

import psycopg2
import pytest

from tests.support import until
from tollerchat import bus
from tollerchat import outbox as outbox_module
from tollerchat.app import hub_key
from tollerchat.errors import InvalidContent, Unavailable
from tollerchat.outbox import LINGERS_FOR, Outbox
from tollerchat.protocol import OutgoingMessage
from tollerchat.saving import LOCK_KEY, NewMessage, Saved
from tollerchat.tail import encode_all, page_of


class Socket:
    busy = closing = False

    def __init__(self):
        self.written = []

    def write(self, data):
        self.written.append(data)


def stored(message_id):
    return OutgoingMessage("x", 1, 1, message_id, "2026-01-01T00:00:00.000000Z")


def page(*message_ids):
    return page_of(encode_all([stored(message_id) for message_id in message_ids]), message_ids[-1])


@pytest.fixture
def outbox():
    return Outbox(Socket(), 1, 8, v1=True)


@pytest.mark.parametrize("nonce", ["n", None])
def test_sender_is_busy_until_its_message_has_passed(outbox, nonce):
    assert outbox.idle
    outbox.sent("x", nonce, 4)
    assert not outbox.idle
    outbox.stored(Saved(stored(6), repeated=False, previous=5), nonce)
    assert outbox.others(page(5)) == page(5).blob
    assert not outbox.idle
    assert b'"ack"' in outbox.others(page(6))
    assert outbox.idle


@pytest.mark.parametrize("nonce", ["n", None])
def test_sender_is_busy_while_its_message_may_be_stored_after_all(outbox, nonce):
    outbox.sent("x", nonce, 4)
    outbox.refused(Unavailable("no answer", sent=True), NewMessage(1, 1, "x", nonce))
    outbox.answer()
    assert b'"unavailable"' in outbox._socket.written[0]
    assert outbox.others(page(5)) == page(5).blob
    assert not outbox.idle
    outbox.recognise([stored(6)], {6: nonce} if nonce else {})
    assert not outbox.idle
    assert outbox.others(page(6)) == b""
    assert outbox.idle


@pytest.mark.parametrize("nonce", ["n", None])
def test_sender_is_idle_again_when_its_message_can_not_come_any_more(outbox, nonce):
    outbox.sent("x", nonce, 4)
    outbox.refused(Unavailable("no answer", sent=True), NewMessage(1, 1, "x", nonce))
    outbox.answer()
    now = time.monotonic()
    outbox.end_doubts(now + LINGERS_FOR - 1)
    assert not outbox.idle
    outbox.end_doubts(now + LINGERS_FOR + 1)
    assert outbox.idle


def test_sender_is_idle_again_when_its_message_was_stored_at_the_second_try(outbox):
    for _ in range(2):
        outbox.sent("x", "n", 4)
        outbox.refused(Unavailable("no answer", sent=True), NewMessage(1, 1, "x", "n"))
        outbox.answer()
    outbox.sent("x", "n", 4)
    outbox.stored(Saved(stored(5), repeated=False, previous=4), "n")
    assert outbox.others(page(5)).count(b'"ack"') == 1
    assert outbox.idle


@pytest.mark.parametrize("nonce", ["n", None])
def test_sender_whose_message_was_refused_is_idle_again(outbox, nonce):
    outbox.sent("x", nonce, 4)
    outbox.refused(InvalidContent("no"), NewMessage(1, 1, "x", nonce))
    outbox.answer()
    assert outbox.idle


async def test_idle_sender_is_written_to_by_its_room(server):
    (alice, _), (bob, _) = await server.join(1), await server.join(2)
    await alice.send("hello")
    assert (await alice.receive())["type"] == "ack"
    assert (await bob.receive())["content"] == "hello"
    assert all(descriptor >= 0 for descriptor in server.app[hub_key].rooms[1].audience.live.values())
    await bob.send("hi")
    assert (await alice.receive())["content"] == "hi"
    assert (await bob.receive())["type"] == "ack"


async def test_what_was_lost_is_not_taken_for_the_same_text_of_another_connection(
    serve, config, database, monkeypatch
):
    """Not for ever, at least: without a nonce, nothing else tells them apart."""
    monkeypatch.setattr(outbox_module, "LINGERS_FOR", 0)
    for name in ("PROBE_INTERVAL", "DOUBT_DELAY"):  # only we compare
        monkeypatch.setattr(bus, name, 3600)
    server, other = await serve(config), await serve(config)
    phone, _ = await server.join(1)
    laptop, _ = await other.join(1)
    await phone.send("before")
    assert [(await each.receive())["type"] for each in (phone, laptop)] == ["ack", "message"]
    database.execute(
        "CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NEW; END';"
        "CREATE TRIGGER stall BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION stall()"
    )
    await phone.send("hi")
    stuck = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    await until(lambda: database.execute(f"SELECT 1 {stuck}"))
    database.execute(f"SELECT pg_terminate_backend(pid) {stuck}")
    assert (await phone.receive())["code"] == "unavailable"
    database.execute("DROP FUNCTION stall CASCADE")
    hub = server.app[hub_key]
    with contextlib.closing(psycopg2.connect(database.url)) as holder, holder.cursor() as cursor:
        # While somebody has the lock, it may be being stored yet.
        cursor.execute("SELECT pg_advisory_xact_lock(%s, 1)", (LOCK_KEY,))
        await hub.compare_with_log()
        assert hub.rooms[1].audience.doubts
        holder.rollback()  # close() does not wait until the lock is free
    await hub.compare_with_log()
    assert not hub.rooms[1].audience.doubts
    await laptop.send("hi")
    assert (await laptop.receive())["type"] == "ack"
    assert (await phone.receive())["content"] == "hi"
