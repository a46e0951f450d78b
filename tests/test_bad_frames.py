"""What a client may get wrong: an error frame that says what, and the connection lives."""

import contextlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tollerchat.errors import ChatError, InvalidJson
from tollerchat.protocol import IncomingMessage, IncomingTyping, error_frame, parse, parse_message

BAD_FRAMES = [
    ("", "invalid_json"),
    ("{", "invalid_json"),
    ("hello", "invalid_json"),
    ('{"type": "message", "content": "a"} trailing', "invalid_json"),
    ("[" * 4000, "invalid_json"),
    ("[]", "invalid_frame"),
    ("1", "invalid_frame"),
    ('"message"', "invalid_frame"),
    ("{}", "invalid_frame"),
    ('{"type": null}', "invalid_frame"),
    ('{"type": 5}', "invalid_frame"),
    ('{"type": "message"}', "invalid_frame"),
    ('{"type": "message", "content": null}', "invalid_frame"),
    ('{"type": "message", "content": 5}', "invalid_frame"),
    ('{"type": "message", "content": ["a"]}', "invalid_frame"),
    ('{"type": "typing", "type": "message", "content": "a"}', "invalid_frame"),
    ('{"type": "auth"}', "invalid_frame"),
    ('{"type": "Message", "content": "a"}', "unknown_type"),
    ('{"type": "", "content": "a"}', "unknown_type"),
    ('{"type": "ack"}', "unknown_type"),
    ('{"type": "message", "content": ""}', "empty_content"),
    ('{"type": "message", "content": " \\t\\n\\u00a0\\u3000"}', "empty_content"),
    ('{"type": "message", "content": "a\\u0000b"}', "invalid_content"),
    ('{"type": "message", "content": "\\ud800"}', "invalid_content"),
    ('{"type": "message", "content": "a\\udc00b"}', "invalid_content"),
    ('{"type": "message", "content": "a", "nonce": 5}', "invalid_nonce"),
    ('{"type": "message", "content": "a", "nonce": ""}', "invalid_nonce"),
    ('{"type": "message", "content": "a", "nonce": "' + "n" * 65 + '"}', "invalid_nonce"),
    ('{"type": "message", "content": "a", "nonce": "\\u0000"}', "invalid_nonce"),
    ('{"type": "message", "content": "a", "nonce": "\\ud800"}', "invalid_nonce"),
]


@pytest.mark.parametrize(("text", "code"), BAD_FRAMES)
def test_bad_frame_has_the_code_of_its_fault(text, code):
    with pytest.raises(ChatError) as refusal:
        parse(text)
    assert refusal.value.code == code
    assert str(refusal.value)


async def test_bad_frames_are_answered_and_the_connection_lives(server):
    alice, bob = await server.connect(1), await server.connect(2)
    for text, code in BAD_FRAMES:
        await alice.send_frame(text)
        frame = await alice.receive()
        assert (frame["type"], frame["code"]) == ("error", code), text
        assert frame["message"]
    await alice.send("a good one")
    assert await bob.receive_contents(1) == ["a good one"]


async def test_frame_nested_too_deeply_is_refused_or_understood_and_the_connection_lives(server):
    """How deep is too deep depends on Python's version; what is not asked for is ignored."""
    text = '{"type": "typing", "x": ' + "[" * 3000 + "]" * 3000 + "}"
    try:
        assert isinstance(parse(text), IncomingTyping)
        answers = []
    except InvalidJson:
        answers = ["invalid_json"]
    alice = await server.connect(1)
    await alice.send_frame(text)
    assert [frame["code"] for frame in await alice.settled()] == answers


async def test_binary_frame_is_answered_and_the_connection_lives(server):
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.socket.send_bytes(b'{"type": "message", "content": "a"}')
    frame = await alice.receive()
    assert (frame["type"], frame["code"]) == ("error", "invalid_frame")
    await alice.send("a good one")
    assert await bob.receive_contents(1) == ["a good one"]


async def test_error_names_the_nonce_of_the_frame(server):
    alice = await server.connect(1)
    await alice.send("", nonce="n1")
    assert (await alice.receive())["nonce"] == "n1"
    await alice.send_frame('{"type": "message", "content": "\\ud800", "nonce": "n2"}')
    assert (await alice.receive())["nonce"] == "n2"
    await alice.send("")
    assert "nonce" not in await alice.receive()


async def test_channel_deleted_under_a_connection_is_not_found(server, database, caplog):
    """The deletion itself is announced late here, as it would be with a slow notification."""
    database.execute("ALTER TABLE channels DISABLE TRIGGER tollerchat_channel_deleted")
    alice = await server.connect(1)
    # The server looks at all channels when it begins to listen: that must be over.
    database.insert("listening")
    assert await alice.receive_contents(1) == ["listening"]
    database.execute("DELETE FROM channels WHERE id = 1")
    await alice.send("too late", nonce="n1")
    frame = await alice.receive()
    assert (frame["type"], frame["code"], frame["nonce"]) == ("error", "not_found", "n1")
    assert await alice.settled() == []
    assert "Traceback" not in caplog.text


async def test_one_bad_message_of_a_batch_fails_alone(server, database):
    """A row that the database itself refuses must not take others down with it."""
    database.execute("ALTER TABLE messages ADD CHECK (content <> 'forbidden')")
    alice, bob, carol = await server.connect(1), await server.connect(2), await server.connect(3)
    for n in range(20):
        await alice.send("forbidden" if n % 5 == 0 else f"a{n}")
        await bob.send(f"b{n}")
    received = await carol.receive_contents(36)
    assert [content for content in received if content[0] == "a"] == [f"a{n}" for n in range(20) if n % 5]
    assert [content for content in received if content[0] == "b"] == [f"b{n}" for n in range(20)]
    errors = [frame for frame in await alice.settled() if frame["type"] == "error"]
    while len(errors) < 4:
        errors.append(await alice.receive())
    assert {frame["code"] for frame in errors if frame["type"] == "error"} == {"invalid_content"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
frames = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "typing", "auth", "ready"]) | json_values,
        "content": st.text() | json_values,
        "nonce": st.text(max_size=70) | json_values,
        "token": st.text() | json_values,
        "extra": json_values,
    },
)


@given(st.text() | json_values.map(json.dumps) | frames.map(json.dumps))
@example('{"type": "message", "content": "\\ud83d\\ude00"}')
def test_any_text_is_a_valid_frame_or_a_refusal(text):
    for read in (parse, parse_message):
        try:
            frame = read(text)
        except ChatError as error:
            error_frame(error, error.nonce).decode("latin-1")
            continue
        if isinstance(frame, IncomingMessage):
            assert frame.content.strip()
            assert "\0" not in frame.content
            frame.content.encode()


@given(st.binary())
def test_any_bytes_as_text_are_a_valid_frame_or_a_refusal(data):
    with contextlib.suppress(ChatError):
        parse(data.decode("utf-8", "surrogateescape"))
