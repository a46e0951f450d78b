"""Embedding: mounted as a sub-application, added to an application, and the examples that show it."""

import logging
import os
import subprocess
import sys

import pytest
from aiohttp import web

import tollerchat
from examples import added, mounted
from tests.support import Chatter, token, until
from tollerchat import bus


async def test_mounted_chat_works_beside_the_routes_of_its_parent(serve, config):
    server = await serve(app=mounted.make_app(config), prefix="/chat")
    async with server.session.get(server.url.removesuffix("/chat")) as response:
        assert "/chat/" in await response.text()
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("hello")
    assert await bob.receive_contents(1) == ["hello"]
    assert (await server.get("/health"))[0] == 200


async def test_mounted_web_chat_is_found_with_and_without_the_slash(serve, config):
    server = await serve(app=mounted.make_app(config), prefix="/chat")
    for path in ("", "/"):
        async with server.session.get(server.url + path) as response:
            assert str(response.url).endswith("/chat/")
            assert "Content-Security-Policy" in response.headers
            page = await response.text()
    assert 'src="static/chat.js"' in page
    async with server.session.get(f"{server.url}/static/chat.js") as response:
        assert response.status == 200
        assert "javascript" in response.headers["Content-Type"]


async def test_added_chat_works_beside_the_applications_own_routes(serve, config, monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 3600)  # nothing is found by comparison
    server = await serve(app=added.make_app(config))
    alice, bob = await server.connect(1), await server.connect(2)
    await alice.send("hello")
    assert await bob.receive_contents(1) == ["hello"]
    async with server.session.post(f"{server.url}/announce/1", data="Lunch is ready") as response:
        assert (await response.json())["message_id"] == 2
    assert await alice.receive_contents(1) == await bob.receive_contents(1) == ["Lunch is ready"]


async def test_message_that_cannot_be_posted_is_told_with_its_code(serve, config, database):
    server = await serve(app=added.make_app(config))

    async def announce(channel_id, text):
        async with server.session.post(f"{server.url}/announce/{channel_id}", data=text) as response:
            return response.status, (await response.json())["error"]

    assert await announce(1, " ") == (400, "empty_content")
    assert await announce(99, "hello") == (404, "not_found")
    with pytest.raises(tollerchat.ChatError, match="lone surrogate"):
        await tollerchat.post_message(server.app, 1, 1, "\ud800")
    with pytest.raises(tollerchat.ChatError, match="nonce must be"):
        await tollerchat.post_message(server.app, 1, 1, "hello", nonce="")
    first = await tollerchat.post_message(server.app, 1, 1, "hello", nonce="n")
    assert await tollerchat.post_message(server.app, 1, 1, "hello", nonce="n") == first
    assert database.contents() == ["hello"]


async def test_parents_access_log_has_no_token_either(serve, config, caplog):
    caplog.set_level(logging.INFO, "aiohttp.access")
    server = await serve(app=mounted.make_app(config), prefix="/chat")
    socket = await server.session.ws_connect(f"{server.url}/ws/channel/1?token={token()}")
    await socket.close()
    await until(lambda: "token=***" in caplog.text)
    assert token().split(".")[0] not in caplog.text


async def test_application_under_aiohttps_test_client(aiohttp_client, config):
    """Its server cancels handlers when a peer drops, where a real one does not."""
    client = await aiohttp_client(tollerchat.create_app(config))
    headers = {"Authorization": f"Bearer {token(1)}"}
    for _ in range(5):
        dropped = await client.ws_connect("/ws/channel/1", headers=headers)
        dropped._response.connection.transport.abort()
    alice, bob = [Chatter(await client.ws_connect("/ws/channel/1", headers=headers)) for _ in range(2)]
    await alice.send("hello")
    assert await bob.receive_contents(1) == ["hello"]


@pytest.mark.parametrize("missing", ["db_url", "jwt_secret"])
def test_missing_setting_is_told_when_the_application_is_made(missing):
    settings = {"db_url": "postgresql://localhost/chat", "jwt_secret": "s" * 32}
    del settings[missing]
    with pytest.raises(tollerchat.ConfigError, match=missing.upper()):
        tollerchat.setup(web.Application(), tollerchat.Config(**settings))


@pytest.mark.parametrize("example", [added, mounted])
def test_example_says_what_it_needs(example):
    environ = {name: value for name, value in os.environ.items() if name not in ("DB_URL", "JWT_SECRET")}
    result = subprocess.run(
        [sys.executable, example.__file__], env=environ, capture_output=True, text=True, timeout=30
    )
    assert "DB_URL is not set" in result.stderr


async def test_message_whose_body_a_middleware_has_read_is_stored_all_the_same(serve, config, database):
    @web.middleware
    async def read_first(request, handler):
        await request.read()
        return await handler(request)

    parent = web.Application(middlewares=[read_first])
    parent.add_subapp("/chat", tollerchat.create_app(config))
    server = await serve(app=parent, prefix="/chat")
    async with server.session.post(
        f"{server.url}/channels/1/messages",
        data='{"content": "hello"}',
        headers={"Authorization": f"Bearer {token()}"},
    ) as response:
        assert response.status == 201
    assert database.contents() == ["hello"]


async def test_application_that_was_shut_down_says_that_it_does_not_run_again(config):
    app = tollerchat.create_app(config)
    runner = web.AppRunner(app)
    await runner.setup()
    await runner.cleanup()
    with pytest.raises(RuntimeError, match="make another one"):
        await web.AppRunner(app).setup()


@pytest.mark.parametrize(
    "settings",
    [{"allowed_origins": "https://app.example"}, {"jwt_algorithms": "HS256"}, {"allowed_origins": None}],
)
def test_string_is_not_taken_for_several(settings):
    with pytest.raises(tollerchat.ConfigError, match="must be a tuple of strings"):
        tollerchat.Config(**settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"db_url": None}, "DB_URL is of type NoneType: it must be of str"),
        ({"jwt_secret": b"secret"}, "JWT_SECRET is of type bytes: it must be of str"),
        ({"port": "8080"}, "PORT is of type str: it must be of int"),
        ({"max_in_flight": 2.5}, "MAX_IN_FLIGHT is of type float: it must be of int"),
        ({"ping_interval": "5"}, "PING_INTERVAL is of type str: it must be of float"),
    ],
)
def test_setting_of_another_type_is_told_without_its_value(settings, problem):
    with pytest.raises(tollerchat.ConfigError, match=f"^{problem}$"):
        tollerchat.Config(**settings)


def test_origin_is_taken_as_browsers_send_it():
    given = (
        "https://Chat.Example",
        "https://a.example:443",
        "http://a.example:80",
        "http://a.example:443",
        "*",
        "null",
    )
    assert tollerchat.Config(allowed_origins=given).allowed_origins == (
        "https://chat.example",
        "https://a.example",
        "http://a.example",
        "http://a.example:443",
        "*",
        "null",
    )


def test_list_is_taken_for_a_tuple():
    assert tollerchat.Config(jwt_algorithms=["HS256"]).jwt_algorithms == ("HS256",)
