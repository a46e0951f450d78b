"""The plain level: history, message, typing, as the original has them."""

import json
import re

import pytest

from tollerchat.app import hub_key
from tollerchat.audience import TYPING_RATE, Audience


async def test_message_reaches_the_others_with_its_id_and_time(server, database):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("hello")
    frame = await bob.receive()
    created_at = frame.pop("created_at")
    assert frame == {"type": "message", "content": "hello", "user_id": 1, "channel_id": 1, "message_id": 1}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", created_at)
    assert database.execute("SELECT id, channel_id, user_id, content FROM messages") == [(1, 1, 1, "hello")]


async def test_created_at_is_the_time_of_the_row_in_utc(server, database):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("hello")
    live = (await bob.receive())["created_at"]
    ((stored,),) = database.execute(
        """SELECT to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') FROM messages"""
    )
    assert live == stored
    carol = await server.connect(3)
    assert (await carol.receive())["created_at"] == stored


async def test_sender_does_not_get_its_own_message(server):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("from alice")
    await bob.receive()
    assert await alice.settled() == []


async def test_other_connection_of_the_same_user_gets_the_message(server):
    phone, laptop = await server.connect(1), await server.connect(1)
    await phone.send("from the phone")
    assert (await laptop.receive())["content"] == "from the phone"


async def test_message_stays_in_its_channel(server):
    alice, elsewhere = await server.connect(1, 1), await server.connect(2, 2)
    await alice.send("for channel 1")
    here = await server.connect(3, 1)
    await here.receive()
    assert await elsewhere.settled() == []


async def test_history_is_the_last_50_messages_oldest_first(server, database):
    ids = database.insert(*(f"m{n}" for n in range(60)))
    alice = await server.connect(1)
    frames = await alice.receive_many(50)
    assert [frame["message_id"] for frame in frames] == ids[10:]
    assert [frame["content"] for frame in frames] == [f"m{n}" for n in range(10, 60)]
    assert await alice.settled() == []


async def test_history_of_a_warm_room_has_what_was_said_live(server, database):
    database.insert("before")
    alice, bob = await server.connect(1), await server.connect(2)
    assert await alice.receive_contents(1) == await bob.receive_contents(1) == ["before"]
    await alice.send("live")
    assert await bob.receive_contents(1) == ["live"]
    carol = await server.connect(3)
    assert await carol.receive_contents(2) == ["before", "live"]
    assert await carol.settled() == []


async def test_history_is_whole_though_messages_change_while_one_joins(server, database, monkeypatch):
    """A deletion, or the bus coming back, empties the room's memory between its load and the look at it."""
    hub = server.app[hub_key]
    register = hub.register

    async def register_and_forget(client):
        room = await register(client)
        room.forget()
        return room

    monkeypatch.setattr(hub, "register", register_and_forget)
    database.insert("a", "b", "c")
    assert await (await server.connect(1)).receive_contents(3) == ["a", "b", "c"]


async def test_empty_channel_has_no_history(server):
    alice = await server.connect(1)
    assert await alice.settled() == []


async def test_plain_client_gets_no_ack_and_no_ready(server):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("with a nonce", nonce="n1")
    await bob.receive()
    assert await alice.settled() == []


async def test_typing_reaches_the_others_and_is_not_stored(server, database):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send_frame({"type": "typing"})
    assert await bob.receive() == {"type": "typing", "content": "", "user_id": 1, "channel_id": 1}
    assert await alice.settled() == []
    assert database.contents() == []


async def test_typing_is_passed_on_at_most_once_a_second(server):
    alice, bob = await server.connect(1), await server.connect(2)
    for _ in range(5):
        await alice.send_frame({"type": "typing"})
    await alice.settled()
    assert [frame["type"] for frame in await bob.settled()] == ["typing"]


async def test_typing_over_many_connections_of_one_user_is_passed_on_as_over_one(server):
    """Or they would cost the square of their number."""
    connections = [await server.connect(1) for _ in range(10)]
    bob = await server.connect(2)
    for each in connections:
        await each.send_frame({"type": "typing"})
        await each.settled()
    assert [frame["type"] for frame in await bob.settled()] == ["typing"]


def test_typing_in_a_large_room_is_passed_on_as_often_as_it_can_be():
    audience = Audience(1)
    audience.live = dict.fromkeys(range(1000), -1)
    told = [audience.may_type(user_id, now=100 + user_id / 1000) for user_id in range(1000)]
    assert sum(told) == TYPING_RATE / 1000
    assert not audience.may_type(0, now=100.9)
    assert audience.may_type(0, now=101.1)


async def test_typing_with_the_originals_extra_fields_is_understood(server):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send_frame({"type": "typing", "content": "", "channel_id": 2, "user_id": 7})
    assert await bob.receive() == {"type": "typing", "content": "", "user_id": 1, "channel_id": 1}


@pytest.mark.parametrize(
    "content",
    [
        "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈",
        "control \x01\x1f\x7f\x85\u2028\u2029",
        "line\r\nbreaks\tand tabs",
        "right to left \u202e \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "quotes ' \" ` \\ $$ %s %(x)s {} -- ; DROP TABLE messages",
        "<script>alert(1)</script>",
        "\ufeff\ufffd\uffff\U0010ffff",
        "\\u0041 \\x41 \\\\",
        " surrounded by white space \n",
    ],
)
async def test_text_comes_through_whole_live_and_from_history(server, database, content):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send(content)
    assert await bob.receive_contents(1) == [content]
    assert await (await server.connect(3)).receive_contents(1) == [content]
    assert database.contents() == [content]


@pytest.mark.parametrize("character", ["a", "é", "😀", "\x01"])
async def test_frame_of_exactly_the_limit_comes_through(server, config, character):
    alice, bob = await server.connect(1), await server.connect(2)
    empty = json.dumps({"type": "message", "content": ""}, ensure_ascii=False)
    encoded = json.dumps(character, ensure_ascii=False)[1:-1]
    count, rest = divmod(config.max_frame_size - len(empty), len(encoded.encode()))
    content = character * count + "b" * rest
    frame = json.dumps({"type": "message", "content": content}, ensure_ascii=False)
    assert len(frame.encode()) == config.max_frame_size
    await alice.send_frame(frame)
    assert await bob.receive_contents(1) == [content]


@pytest.mark.parametrize("size", [8193, 100_000, 5_000_000])
async def test_frame_over_the_limit_closes_with_1009(server, size):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("x" * size)
    assert await alice.closed() == 1009
    await (await server.connect(1)).send("still here")
    assert await bob.receive_contents(1) == ["still here"]


async def test_messages_of_one_client_keep_their_order(server):
    alice, bob = await server.connect(1), await server.connect(2)
    contents = [f"m{n}" for n in range(500)]
    for content in contents:
        await alice.send(content)
    assert await bob.receive_contents(500) == contents


async def test_client_that_leaves_right_after_sending_has_its_message_stored(server):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("last words")
    await alice.socket.close()
    assert await bob.receive_contents(1) == ["last words"]
