"""Refusals before the upgrade: 400, 401, 403, 404, 426, 503, always with a body that says why."""

import asyncio
import dataclasses

import aiohttp
import pytest

from tests.support import WAIT, token, until
from tollerchat.app import hub_key, tasks_key

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def refusal(server, path, *, user_id=1, **headers):
    """The status, headers and error of an upgrade request that is refused."""
    if user_id is not None:
        headers.setdefault("Authorization", f"Bearer {token(user_id)}")
    status, answer_headers, body = await server.get(path, headers={**UPGRADE, **headers})
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["message"]
    return status, body["error"]["code"], answer_headers


@pytest.mark.parametrize(
    "channel_id",
    ["abc", "0", "-1", "1.5", "1e3", "+1", "1_0", "%20", "2147483648", str(2**63), "9" * 400, "%D9%A1"],
)
async def test_channel_id_that_is_not_a_positive_integer_is_a_bad_request(server, channel_id):
    assert (await refusal(server, f"/ws/channel/{channel_id}"))[:2] == (400, "bad_request")


@pytest.mark.parametrize("after", ["", "abc", "-1", "1.5", str(2**63), "9" * 400, "0x10"])
async def test_after_that_is_not_a_message_id_is_a_bad_request(server, after):
    assert (await refusal(server, f"/ws/channel/1?after={after}"))[:2] == (400, "bad_request")


async def test_channel_that_does_not_exist_is_not_found(server):
    assert (await refusal(server, "/ws/channel/999"))[:2] == (404, "not_found")


async def test_without_a_token_nothing_is_disclosed(server):
    for channel_id in (1, 3, 999):
        status, code, headers = await refusal(server, f"/ws/channel/{channel_id}", user_id=None)
        assert (status, code) == (401, "unauthorized")
        assert headers["WWW-Authenticate"] == "Bearer"


async def test_private_channel_is_forbidden_unless_one_is_a_member(server):
    assert (await refusal(server, "/ws/channel/3", user_id=5))[:2] == (403, "forbidden")
    member = await server.connect(2, 3)
    assert await member.settled() == []


async def test_user_who_does_not_exist_is_forbidden(server):
    assert (await refusal(server, "/ws/channel/1", user_id=4711))[:2] == (403, "forbidden")


async def test_plain_http_request_must_upgrade(server):
    status, headers, body = await server.get("/ws/channel/1", headers={"Authorization": f"Bearer {token()}"})
    assert status == 426
    assert body["error"]["code"] == "upgrade_required"
    assert headers["Upgrade"] == "websocket"


@pytest.mark.parametrize(
    "broken",
    [
        {"Sec-WebSocket-Key": "short"},
        {"Sec-WebSocket-Key": ""},
        {"Sec-WebSocket-Version": "12"},
        {"Connection": "keep-alive"},
    ],
)
async def test_broken_handshake_is_a_bad_request(server, broken):
    assert (await refusal(server, "/ws/channel/1", **broken))[:2] == (400, "bad_request")


async def test_handshake_with_a_body_is_a_bad_request(server):
    status, _, body = await server.get(
        f"/ws/channel/1?token={token()}", headers={**UPGRADE, "Content-Length": "3"}, data=b"abc"
    )
    assert (status, body["error"]["code"]) == (400, "bad_request")


async def test_handshake_of_http_1_0_is_a_bad_request(server):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
    writer.write(f"GET /ws/channel/1?token={token()} HTTP/1.0\r\nHost: x\r\n{lines}\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), WAIT)
    writer.close()
    assert answer.split()[1] == b"400"
    assert b"HTTP/1.1" in answer.partition(b"\r\n\r\n")[2]


async def test_headers_may_be_on_several_lines(server):
    """RFC 6455, section 11.3.4."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    headers = [
        *UPGRADE.items(),
        ("Connection", "keep-alive"),
        ("Host", "x"),
        ("Sec-WebSocket-Protocol", "chat"),
    ]
    headers += [("Sec-WebSocket-Protocol", protocol) for protocol in (f"bearer.{token()}", "tollerchat.v1")]
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    writer.write(f"GET /ws/channel/1 HTTP/1.1\r\n{lines}\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)
    writer.close()
    assert head.split()[1] == b"101"
    assert b"Sec-WebSocket-Protocol: tollerchat.v1\r\n" in head


async def test_head_is_not_answered(server):
    async with server.session.head(f"{server.url}/ws/channel/1?token={token()}", headers=UPGRADE) as answer:
        assert answer.status == 405


async def test_foreign_origin_is_forbidden_and_the_own_one_is_not(server):
    assert (await refusal(server, "/ws/channel/1", Origin="https://evil.example"))[:2] == (403, "forbidden")
    for origin in ("null", "http://[", "http://]:80", ""):
        assert (await refusal(server, "/ws/channel/1", Origin=origin))[:2] == (403, "forbidden")
    friend = await server.connect(1, origin=server.url)
    assert await friend.settled() == []


async def test_allowed_origins_are_let_in(serve, config):
    server = await serve(dataclasses.replace(config, allowed_origins=("https://app.example",)))
    friend = await server.connect(1, origin="https://app.example")
    assert await friend.settled() == []
    assert (await refusal(server, "/ws/channel/1", Origin=server.url))[:2] == (403, "forbidden")


async def test_subprotocols_the_server_does_not_know_leave_the_plain_level(server):
    socket = await server.session.ws_connect(
        f"{server.url}/ws/channel/1?token={token()}", protocols=("chat", "mqtt")
    )
    assert socket.protocol is None


async def test_database_that_is_gone_is_unavailable_and_may_be_tried_again(serve, config):
    nowhere = "postgresql://localhost:1/nowhere"
    server = await serve(dataclasses.replace(config, db_url=nowhere))
    status, code, headers = await refusal(server, "/ws/channel/1")
    assert (status, code) == (503, "unavailable")
    assert int(headers["Retry-After"]) >= 0
    assert (await server.get("/health"))[0] == 503


async def test_database_without_tables_is_unavailable(serve, config, database):
    server = await serve(config)
    database.execute("DROP TABLE messages")
    status, _, body = await server.get("/health")
    assert status == 503
    assert "init-db" in body["error"]["message"]


async def test_health_is_ok_while_all_is_well(server):
    status, _, body = await server.get("/health")
    assert (status, body) == (200, {"status": "ok"})


async def test_health_tells_that_a_part_of_the_server_has_failed(server):
    server.app[tasks_key][0].cancel()
    await until(lambda: server.app[tasks_key][0].done())
    status, _, body = await server.get("/health")
    assert (status, body["error"]["code"]) == (503, "unavailable")


async def test_request_that_is_abandoned_during_the_handshake_leaves_nothing_behind(server):
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        request = f"GET /ws/channel/1?token={token()} HTTP/1.1\r\nHost: x\r\n{lines}\r\n"
        writer.write(request.encode())
        writer.transport.abort()
    survivor = await server.connect(2)
    await survivor.send("still here")
    await survivor.settled()
    await survivor.socket.close()
    await until(lambda: not server.app[hub_key].rooms)


async def test_handshake_with_aiohttps_own_client_names_the_status(server):
    with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
        await server.connect(1, 999)
