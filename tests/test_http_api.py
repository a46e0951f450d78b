"""The HTTP routes beside the WebSocket: pages of history, and posting."""

import asyncio
import dataclasses
import gzip
import json
import socket

import pytest
import yarl

from tests.faults import running
from tests.support import WAIT, token, until


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


async def test_page_of_long_messages_is_shorter_and_leads_on_all_the_same(server, database):
    ids = database.insert(*("x" * 8000 for _ in range(70)))
    _, newest = await get(server, "/channels/1/messages?limit=200")
    _, oldest = await get(server, "/channels/1/messages?limit=200&after=0")
    taken = [[message["message_id"] for message in page["messages"]] for page in (newest, oldest)]
    assert taken == [ids[-32:], ids[:32]]
    assert newest["has_more"] is oldest["has_more"] is True
    database.insert("x" * 1_000_000)
    _, page = await get(server, "/channels/1/messages")
    assert [len(message["content"]) for message in page["messages"]] == [1_000_000]
    assert page["has_more"] is True


async def test_who_is_removed_while_a_body_is_on_its_way_does_not_post_it(server, database):
    database.execute("INSERT INTO channel_users (user_id, channel_id) VALUES (5, 3)")
    alice, _ = await server.join(5, 3)
    removed = asyncio.Event()

    async def body():
        yield b'{"content": "hello"'
        await removed.wait()
        yield b"}"

    posting = asyncio.ensure_future(
        server.session.post(
            f"{server.url}/channels/3/messages",
            data=body(),
            headers={"Authorization": f"Bearer {token(5)}"},
        )
    )
    database.execute("DELETE FROM channel_users WHERE user_id = 5")
    assert await alice.closed() == 4403
    removed.set()
    async with await posting as response:
        assert response.status == 403
    assert database.contents(3) == []


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


async def test_compressed_body_is_refused(server):
    """A small one could unpack to gigabytes."""
    async with server.session.post(
        f"{server.url}/channels/1/messages",
        data=gzip.compress(b'{"content": "x"}'),
        headers={"Authorization": f"Bearer {token()}", "Content-Encoding": "gzip"},
    ) as response:
        assert response.status == 400
        assert "Content-Encoding" in (await response.json())["error"]["message"]


async def test_body_that_does_not_come_is_not_waited_for(serve, config):
    server = await serve(dataclasses.replace(config, write_timeout=0.2))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = f"Host: a\r\nAuthorization: Bearer {token()}\r\nContent-Length: 100\r\n"
    writer.write(f'POST /channels/1/messages HTTP/1.1\r\n{lines}\r\n{{"content"'.encode())
    assert b" 400 " in await asyncio.wait_for(reader.readline(), WAIT)
    writer.close()


async def test_page_that_is_not_read_is_given_up(database):
    """More of it than the system's own buffers take."""
    database.insert(*["x" * 100_000] * 100)
    async with running(database.url, write_timeout=0.5) as server:
        descriptors = server.descriptors()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        request = f"GET /channels/1/messages?limit=100 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token()}\r\n\r\n"
        await loop.sock_sendall(client, request.encode())
        await until(lambda: server.descriptors() > descriptors)
        await until(lambda: server.descriptors() == descriptors)
        client.close()


@pytest.mark.parametrize("name", ["nothing.js", "%00", "..%2f..%2fsetup.cfg", "a" * 5000])
async def test_files_that_are_not_there_are_not_found(server, name):
    async with server.session.get(yarl.URL(f"{server.url}/static/{name}", encoded=True)) as response:
        assert response.status == 404


async def test_head_of_a_page_has_no_body(server, database):
    """It would be taken for the next answer."""
    database.insert("text")
    async with server.session.head(
        f"{server.url}/channels/1/messages", headers={"Authorization": f"Bearer {token()}"}
    ) as response:
        assert response.status == 405
    assert (await get(server, "/channels/1/messages"))[0] == 200


async def test_page_of_an_allowed_origin_may_read_what_the_api_answers(serve, config, database):
    database.insert("text")
    page, url = "https://app.example", "/channels/1/messages"
    server = await serve(dataclasses.replace(config, allowed_origins=[page]))
    for origin, allowed in ((page, page), ("https://evil.example", None), ("https://app.exampl", None)):
        async with server.session.options(
            server.url + url,
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        ) as response:
            assert response.status == 204
            assert response.headers.get("Access-Control-Allow-Origin") == allowed
            assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
        for headers, status in (({"Authorization": f"Bearer {token()}"}, 200), ({}, 401)):
            async with server.session.get(
                server.url + url, headers={"Origin": origin, **headers}
            ) as response:
                assert response.status == status
                assert response.headers.get("Access-Control-Allow-Origin") == allowed
    async with server.session.get(server.url + "/health", headers={"Origin": page}) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("header", ["If-Modified-Since", "If-Unmodified-Since"])
async def test_date_that_does_not_exist_is_no_reason_to_hang_up(server, header):
    for path in ("/", "/static/chat.js"):
        async with server.session.get(
            server.url + path, headers={header: f"Thu, 01 Jan {20 * '9'} 00:00:00 GMT"}
        ) as response:
            assert response.status == 200
            assert "charset=utf-8" in response.headers["Content-Type"]


@pytest.mark.parametrize("encoding", ["Identity", ""])
async def test_body_that_is_said_not_to_be_compressed_is_taken(server, encoding):
    async with server.session.post(
        f"{server.url}/channels/1/messages",
        data='{"content": "x"}',
        headers={"Authorization": f"Bearer {token()}", "Content-Encoding": encoding},
    ) as response:
        assert response.status == 201
