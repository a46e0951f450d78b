"""The HTTP routes beside the WebSocket: pages of history, and posting."""

import json

import pytest

from tests.support import token


async def get(server, path, user_id=1):
    status, _, body = await server.get(path, headers={"Authorization": f"Bearer {token(user_id)}"})
    return status, body


async def post(server, body, *, channel_id=1, user_id=1):
    async with server.session.post(
        f"{server.url}/channels/{channel_id}/messages",
        data=body if isinstance(body, (str, bytes)) else json.dumps(body),
        headers={"Authorization": f"Bearer {token(user_id)}"},
    ) as response:
        return response.status, await response.json()


async def test_pages_of_history_lead_to_its_beginning(server, database):
    ids = database.insert(*(f"m{n}" for n in range(7)))
    status, page = await get(server, "/channels/1/messages?limit=3")
    assert status == 200
    assert [message["message_id"] for message in page["messages"]] == ids[4:]
    assert page["has_more"] is True
    assert page["messages"][0]["type"] == "message"
    _, page = await get(server, f"/channels/1/messages?limit=3&before={ids[4]}")
    assert [message["message_id"] for message in page["messages"]] == ids[1:4]
    _, page = await get(server, f"/channels/1/messages?limit=3&before={ids[1]}")
    assert [message["message_id"] for message in page["messages"]] == ids[:1]
    assert page["has_more"] is False


async def test_pages_after_an_id_lead_to_the_newest(server, database):
    ids = database.insert(*(f"m{n}" for n in range(5)))
    _, page = await get(server, f"/channels/1/messages?limit=3&after={ids[0]}")
    assert [message["message_id"] for message in page["messages"]] == ids[1:4]
    assert page["has_more"] is True
    _, page = await get(server, f"/channels/1/messages?after={ids[0]}&before={ids[3]}")
    assert [message["message_id"] for message in page["messages"]] == ids[1:3]
    assert page["has_more"] is False


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "before=-1", "after=x"])
async def test_query_that_is_out_of_range_is_a_bad_request(server, query):
    status, body = await get(server, f"/channels/1/messages?{query}")
    assert (status, body["error"]["code"]) == (400, "bad_request")


async def test_history_is_for_those_who_may_join(server):
    assert (await server.get("/channels/1/messages"))[0] == 401
    assert (await get(server, "/channels/3/messages", user_id=5))[0] == 403
    assert (await get(server, "/channels/999/messages"))[0] == 404


async def test_posted_message_is_stored_and_broadcast(server, database):
    alice = await server.connect(1)
    status, message = await post(server, {"content": "posted"}, user_id=2)
    assert status == 201
    assert await alice.receive() == message
    assert message["user_id"] == 2
    assert database.contents() == ["posted"]


async def test_posting_again_with_the_same_nonce_gives_the_original(server, database):
    first = await post(server, {"content": "once", "nonce": "n1"})
    assert await post(server, {"content": "once", "nonce": "n1"}) == (200, first[1])
    status, body = await post(server, {"content": "other", "nonce": "n1"})
    assert (status, body["error"]["code"]) == (409, "nonce_conflict")
    assert database.contents() == ["once"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", "invalid_json"),
        ("[]", "invalid_frame"),
        ({}, "invalid_frame"),
        ({"content": " "}, "empty_content"),
        ({"content": "\0"}, "invalid_content"),
        ({"content": "a", "nonce": ""}, "invalid_nonce"),
        ({"content": "a", "type": "typing"}, "invalid_frame"),
        (b"\xff", "bad_request"),
        ({"content": "x" * 9000}, "bad_request"),
    ],
)
async def test_bad_post_is_refused(server, body, code):
    status, answer = await post(server, body)
    assert (status, answer["error"]["code"]) == (400, code)
