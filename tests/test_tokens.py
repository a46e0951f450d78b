"""Tokens: where they may stand, which are accepted, and that no log ever has one."""

import asyncio
import base64
import dataclasses
import json
import logging
import time

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import SECRET, WAIT, Chatter, token, until
from tollerchat import Config
from tollerchat.app import hub_key
from tollerchat.auth import issue_token, verify_token
from tollerchat.errors import Unauthorized

CONFIG = Config(jwt_secret=SECRET)
NOW = int(time.time())


def forged(header, claims):
    """A token with a header and claims of one's own choice, and an empty signature."""
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), b"")
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


BAD_TOKENS = {
    "alg none": forged({"alg": "none", "typ": "JWT"}, {"user_id": 1}),
    "alg None": forged({"alg": "None"}, {"user_id": 1}),
    "no alg": forged({"typ": "JWT"}, {"user_id": 1}),
    "another algorithm": token(algorithm="HS512", secret=SECRET * 2),
    "another secret": token(secret="another secret that is long enough too"),
    "expired": token(exp=NOW - 1),
    "not yet valid": token(nbf=NOW + 1000),
    "issued in the future": token(iat=NOW + 1000),
    "exp is text": token(exp="soon"),
    "user_id true": token(True),
    "user_id text": token("1"),
    "user_id float": token(1.5),
    "user_id whole float": token(1.0),
    "user_id negative": token(-1),
    "user_id zero": token(0),
    "user_id 2^31": token(2**31),
    "user_id 2^63": token(2**63),
    "user_id list": token([1]),
    "user_id wrong beside a good sub": token("x", sub="1"),
    "sub not digits": token(None, sub="alice"),
    "sub negative": token(None, sub="-1"),
    "sub other digits": token(None, sub="\u0661"),
    "sub huge": token(None, sub="9" * 5000),
    "sub integer": token(None, sub=1),
    "no user": token(None),
    "claims are a list": jwt.api_jws.encode(b"[1]", SECRET, algorithm="HS256"),
    "exp infinite": jwt.api_jws.encode(b'{"user_id": 1, "exp": 1e999}', SECRET, algorithm="HS256"),
    "exp not a number": jwt.api_jws.encode(b'{"user_id": 1, "exp": NaN}', SECRET, algorithm="HS256"),
    "nested too deep": jwt.api_jws.encode(b"[" * 100_000, SECRET, algorithm="HS256"),
    "empty": "",
    "garbage": "garbage",
    "dots": "...",
    "not base64": "a.b.c",
    "not ascii": "é.é.é",
    "two parts": ".".join(token().split(".")[:2]),
    "cut": token()[:-2],
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_token_is_refused_without_being_repeated(name):
    with pytest.raises(Unauthorized) as refusal:
        verify_token(BAD_TOKENS[name], CONFIG)
    assert str(refusal.value)
    for part in BAD_TOKENS[name].split("."):
        assert len(part) < 4 or part not in str(refusal.value)


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused_as_a_token(text):
    with pytest.raises(Unauthorized):
        verify_token(text, CONFIG)


@given(
    st.dictionaries(
        st.sampled_from(["user_id", "sub", "exp", "nbf", "iat", "aud", "iss", "jti", "name"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_any_signed_claims_give_a_user_in_range_or_a_refusal(claims):
    signed = jwt.api_jws.encode(json.dumps(claims).encode(), SECRET, algorithm="HS256")
    try:
        identity = verify_token(signed, CONFIG)
    except Unauthorized:
        return
    assert type(identity.user_id) is int
    assert 1 <= identity.user_id < 2**31
    assert identity.expires_at > time.time() - 1


@pytest.mark.parametrize(
    ("claims", "user_id"),
    [
        ({"user_id": 7}, 7),
        ({"user_id": None, "sub": "7"}, 7),
        ({"user_id": 7, "sub": "alice"}, 7),
        ({"user_id": 7, "sub": 8}, 7),
        ({"user_id": 7, "aud": "somebody", "iss": "issuer"}, 7),
        ({"user_id": 7, "exp": None}, 7),
        ({"user_id": 7, "nbf": NOW - 5, "iat": NOW - 5}, 7),
        ({"user_id": 2**31 - 1}, 2**31 - 1),
    ],
)
def test_good_token_names_its_user(claims, user_id):
    assert verify_token(token(**claims), CONFIG).user_id == user_id


def test_issued_token_is_accepted_until_it_expires():
    identity = verify_token(issue_token(3, CONFIG, ttl=60), CONFIG)
    assert identity.user_id == 3
    assert 50 < identity.expires_at - time.time() <= 60


async def test_token_may_stand_in_the_header_the_query_or_the_subprotocol(server):
    url = f"{server.url}/ws/channel/1"
    for options in (
        {"headers": {"Authorization": f"Bearer {token()}"}},
        {"headers": {"Authorization": f"bearer  {token()}"}},
        {"params": {"token": token()}},
        {"protocols": ("tollerchat.v1", f"bearer.{token()}")},
        {"protocols": (f"bearer.{token()}", "tollerchat.v1")},
    ):
        socket = await server.session.ws_connect(url, **options)
        await Chatter(socket).settled()
        assert socket.protocol == ("tollerchat.v1" if "protocols" in options else None)


async def test_first_token_of_the_contracts_order_counts(server):
    bad = {"Authorization": "Bearer garbage"}
    status, _, _ = await server.get(f"/channels/1/messages?token={token()}", headers=bad)
    assert status == 401
    good = {"Authorization": f"Bearer {token()}"}
    status, _, _ = await server.get("/channels/1/messages?token=garbage", headers=good)
    assert status == 200


async def test_no_log_has_a_token(server, caplog):
    """Wherever it stood, also where the client forgot to offer our subprotocol beside it."""
    caplog.set_level(logging.DEBUG)
    caplog.handler.addFilter(lambda record: record.name != "asyncio")
    url = f"{server.url}/ws/channel/1"
    socket = await server.session.ws_connect(f"{url}?a=b&token={token()}&c=d")
    await socket.close()
    async with server.session.get(f"{server.url}/health?token={token()}"):
        pass
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    for headers in (
        {"Sec-WebSocket-Protocol": f"bearer.{token()}"},
        {"Sec-WebSocket-Protocol": f"bearer.{token()}", "Authorization": f"Bearer {token()}"},
        {"Authorization": f"Bearer {token()}x"},
    ):
        status, _, _ = await server.get("/ws/channel/1", headers={**upgrade, **headers})
        assert status in (400, 401)
    assert "/ws/channel/1?a=b&token=***&c=d" in caplog.text
    signature = token().rsplit(".", 1)[1]
    assert signature[:10] not in caplog.text
    assert token().split(".")[0] not in caplog.text


@pytest.mark.parametrize(
    "request_text",
    [
        "GET /ws/channel/1?token={} x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /ws/channel/1 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\0\r\n\r\n",
        "GET /ws/channel/1?token={} HTTP/9.9\r\nHost: a\r\n\r\n",
        "GET /health?%74oken={} HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /channels/1/messages HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\nContent-Length: 9\r\n\r\n{{}}",
    ],
)
async def test_no_log_has_a_token_of_a_malformed_request(server, caplog, request_text):
    caplog.set_level(logging.INFO)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_text.format(token()).encode())
    writer.write_eof()
    await asyncio.wait_for(reader.read(), WAIT)
    writer.close()
    await asyncio.sleep(0)
    for part in token().split("."):
        assert part[:20] not in caplog.text
    assert "Traceback" not in caplog.text


async def test_connection_ends_when_its_token_expires(serve, config):
    server = await serve(dataclasses.replace(config, ping_interval=1))
    url = f"{server.url}/ws/channel/1?token={token(exp=int(time.time()) + 2)}"
    assert await Chatter(await server.session.ws_connect(url)).closed() == 4401


async def test_fresh_token_extends_the_session(serve, config):
    server = await serve(dataclasses.replace(config, ping_interval=0.4))
    expires_at = int(time.time()) + 2
    url = f"{server.url}/ws/channel/1?token={token(exp=expires_at)}"
    chatter = Chatter(await server.session.ws_connect(url))
    await chatter.send_frame({"type": "auth", "token": token()})
    assert await chatter.settled() == []
    await until(lambda: time.time() > expires_at + 1)
    assert await chatter.settled() == []


async def test_token_of_a_shorter_life_ends_the_session_sooner(server):
    chatter = await server.connect(1)
    (client,) = server.app[hub_key].rooms[1].audience.clients
    await until(lambda: client.due)  # it was checked, and will be again after 5 seconds
    start = time.monotonic()
    await chatter.send_frame({"type": "auth", "token": token(exp=int(time.time()) + 2)})
    assert await chatter.closed() == 4401
    assert time.monotonic() - start < 4


# By name: the tokens are others in each process that collects tests.
@pytest.mark.parametrize(
    "bad",
    [pytest.param(token(2), id="of another user"), pytest.param(token(exp=NOW - 5), id="expired"), "garbage"],
)
async def test_token_of_another_user_or_a_bad_one_does_not_extend(server, bad):
    chatter = await server.connect(1)
    await chatter.send_frame({"type": "auth", "token": bad})
    frame = await chatter.receive()
    assert (frame["type"], frame["code"]) == ("error", "unauthorized")
    assert bad not in frame["message"]
    assert await chatter.settled() == []
