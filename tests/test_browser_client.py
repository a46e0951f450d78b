"""tollerchat.js, the client for browsers, in a real one: against a server, and against one that is played."""

import dataclasses

import pytest

from examples import mounted
from tests.browser import needs_chromium, running_browser
from tests.support import Template, token, until
from tollerchat.app import hub_key
from tollerchat.client import Client
from tollerchat.protocol import CloseCode

pytestmark = [
    needs_chromium,
    pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"]),
]

# Pages are about:blank: of no origin, which browsers tell as "null".
CONNECTING = """async ([url, token]) => {
    const { TollerChat } = await import(`${url}/static/tollerchat.js`);
    window.chat = new TollerChat({ channelId: 1, token, base: url });
    chat.connect();
}"""
ONLINE = "chat.state === 'online'"


@pytest.fixture
def config(config):
    return dataclasses.replace(config, allowed_origins=("null",))


@pytest.fixture
async def page():
    async with running_browser() as browser:
        yield await browser.new_page()


FROM_ANOTHER_ORIGIN = """async ([url, token]) => {
    const { TollerChat } = await import(`${url}/static/tollerchat.js`);
    const chat = new TollerChat({ channelId: 1, token, base: url });
    const event = (type) => new Promise((resolve) => chat.addEventListener(type, resolve, { once: true }));
    const ready = event("ready");
    chat.connect();
    await ready;
    const acked = event("ack");
    chat.send("hello");
    await acked;
    const failed = [];
    chat.addEventListener("failed", ({ detail }) => failed.push(detail));
    const ended = new Promise((resolve) =>
        chat.addEventListener("state", ({ detail }) => detail.state === "signed-out" && resolve(detail.code)));
    chat.send(" ");
    chat.send("x".repeat(400));
    const code = await ended;
    const careful = new TollerChat({ channelId: 1, token, base: url, maxFrameBytes: 256 });
    let refused;
    try { careful.send("x".repeat(400)); } catch (error) { refused = error.name; }
    return { code, refused, failed: failed.map(({ code, mayBeStored }) => [code, mayBeStored]) };
}"""


async def test_client_of_a_page_from_elsewhere_tells_what_may_be_stored(page, serve, config, database):
    config = dataclasses.replace(config, max_frame_size=256)
    server = await serve(app=mounted.make_app(config), prefix="/chat")
    assert await page.evaluate(FROM_ANOTHER_ORIGIN, [server.url, token(1)]) == {
        "code": 1009,
        "refused": "RangeError",
        "failed": [["empty_content", False], ["1009", True]],
    }
    assert database.contents() == ["hello"]


# `socket` is the newest; what it sent is in `sent`. Events are told as [type, message_id or state].
PLAYED = """async ([url, token]) => {
    window.sent = [];
    window.WebSocket = class {
        constructor(url) { this.after = url.searchParams.get("after"); window.socket = this; }
        send(text) { sent.push(JSON.parse(text)); }
        close() {}
    };
    window.say = (frame) => socket.onmessage({ data: JSON.stringify(frame) });
    window.ready = (id) => say({ type: "ready", channel_id: 1, user_id: 1, last_message_id: id, gap: false });
    window.message = (id, content, created_at = "then") =>
        say({ type: "message", message_id: id, user_id: 1, channel_id: 1, content, created_at });
    window.ack = (nonce, id) => say({ type: "ack", nonce, message_id: id, created_at: "" });
    const { TollerChat } = await import(`${url}/static/tollerchat.js`);
    window.events = [];
    window.chat = new TollerChat({ channelId: 1, token, base: url });
    for (const type of ["message", "ack", "reset"])
        chat.addEventListener(type, ({ detail }) => events.push([type, detail?.message_id]));
    chat.connect();
}"""


async def test_same_text_from_another_device_comes_in_its_order(page, server):
    await page.evaluate(PLAYED, [server.url, token()])
    assert await page.evaluate(
        """() => {
            ready(0);
            const nonce = chat.send("same");
            message(1, "same");
            message(2, "another");
            ack(nonce, 3);
            return events;
        }"""
    ) == [["message", 1], ["message", 2], ["ack", 3]]


async def test_message_whose_ack_was_lost_is_reported_once(page, server):
    """Sent over one connection, it comes back in the history of the next."""
    await page.clock.install()
    await page.evaluate(PLAYED, [server.url, token()])
    nonce = await page.evaluate(
        """() => {
            socket.onopen();
            ready(0);
            const nonce = chat.send("same");
            socket.onclose({ code: 1006 });
            return nonce;
        }"""
    )
    await page.clock.fast_forward(2000)
    assert await page.evaluate(
        """(nonce) => {
            message(1, "same");
            message(2, "same");
            ready(2);
            ack(nonce, 1);
            return events;
        }""",
        nonce,
    ) == [["ack", 1], ["message", 2]]


async def test_token_that_changes_while_it_connects_is_sent_when_it_has(page, server):
    await page.evaluate(PLAYED, [server.url, token()])
    fresh = token(exp=4_000_000_000)
    assert await page.evaluate("(fresh) => { chat.setToken(fresh); ready(0); return sent; }", fresh) == [
        {"type": "auth", "token": fresh}
    ]


async def test_end_of_the_token_before_is_not_the_end_of_a_fresh_one(page, server, monkeypatch):
    """It may be on its way while the fresh one is."""
    monkeypatch.setattr(Client, "_on_auth", lambda self, _: self.close(CloseCode.TOKEN_EXPIRED, "expired"))
    await page.evaluate(CONNECTING, [server.url, token()])
    await page.wait_for_function(ONLINE)
    (client,) = server.app[hub_key]._clients()
    await page.evaluate("(fresh) => chat.setToken(fresh)", token(exp=4_000_000_000))
    await until(lambda: client not in server.app[hub_key]._clients())
    await page.wait_for_function(ONLINE)
    (client,) = server.app[hub_key]._clients()
    assert client.expires_at == 4_000_000_000


async def test_question_why_it_was_refused_is_not_waited_for_without_bound(page, server):
    await page.clock.install()
    server.app[hub_key].draining = True  # refuses upgrades
    asked = []
    await page.route("**/channels/**", lambda route: asked.append(route))  # and nobody answers
    await page.evaluate(CONNECTING, [server.url, token()])
    await until(lambda: asked)
    server.app[hub_key].draining = False
    await page.clock.fast_forward(16_000)
    await page.wait_for_function("chat.state !== 'connecting'")
    await page.clock.fast_forward(2_000)
    await page.wait_for_function(ONLINE)


async def test_ids_that_start_again_are_noticed_though_more_came_than_were_known(page, server):
    await page.clock.install()
    await page.evaluate(PLAYED, [server.url, token()])
    await page.evaluate(
        """() => {
            socket.onopen();
            message(1, "old");
            message(2, "old");
            ready(2);
            socket.onclose({ code: 1001 });
        }"""
    )
    await page.clock.fast_forward(2_000)
    assert await page.evaluate("socket.after") == "1"  # one that is known, to compare it
    await page.evaluate("message(2, 'new', 'now')")
    assert await page.evaluate("[socket.after, events.slice(2)]") == [None, [["reset", None]]]
    await page.evaluate("[1, 2, 3].forEach((id) => message(id, 'new', 'now')), ready(3)")
    assert await page.evaluate("events.slice(3)") == [["message", 1], ["message", 2], ["message", 3]]


async def test_link_that_is_dead_is_noticed_by_one_who_only_reads(page, server):
    await page.clock.install()
    await page.evaluate(PLAYED, [server.url, token()])
    await page.evaluate("ready(0)")
    for _ in range(2):
        await page.evaluate("window.sent = []")
        await page.clock.fast_forward(61_000)
        assert await page.evaluate("sent") == [{"type": "ping"}]
        await page.evaluate("say({ type: 'error', code: 'unknown_type', message: '' })")
    await page.clock.fast_forward(61_000)
    assert await page.evaluate("chat.state") == "online"
    await page.clock.fast_forward(16_000)
    await page.wait_for_function("chat.state === 'reconnecting'")


async def test_server_answers_what_asks_whether_it_is_there(page, server):
    await page.clock.install()
    await page.evaluate(CONNECTING, [server.url, token()])
    await page.wait_for_function(ONLINE)
    for _ in range(3):
        (client,) = server.app[hub_key]._clients()
        heard_at = client._socket.heard_at
        await page.clock.fast_forward(61_000)
        await until(lambda: client._socket.heard_at > heard_at)  # noqa: B023 - awaited at once
        await page.evaluate("chat.history()")  # behind it is the answer
        assert await page.evaluate("chat.state") == "online"


async def test_message_that_is_sent_again_under_its_nonce_is_reported_once(page, server):
    """As after a reload: it may be in the history, which comes first."""
    await page.evaluate(PLAYED, [server.url, token()])
    assert await page.evaluate(
        """() => {
            chat.send("hello", "n1");
            message(7, "hello");
            ready(7);
            ack("n1", 7);
            return events;
        }"""
    ) == [["ack", 7]]


@pytest.mark.parametrize("state", ["connecting", "reconnecting", "online"])
async def test_client_that_a_listener_closes_stays_closed(page, server, state):
    await page.clock.install()
    await page.evaluate(PLAYED, [server.url, token()])
    await page.evaluate(
        """([state, fresh]) => {
            chat.close();
            chat.addEventListener("state", ({ detail }) => detail.state === state && chat.close());
            window.socket = null;
            chat.connect();
            if (!socket) return;
            chat.setToken(fresh);
            socket.onopen();
            ready(0);
            socket.onclose({ code: 1006 });
        }""",
        [state, token(exp=4_000_000_000)],
    )
    dialled = await page.evaluate("socket")
    await page.clock.fast_forward(60_000)
    assert await page.evaluate("chat.state") == "offline"
    assert (await page.evaluate("socket") is None) == (dialled is None) == (state == "connecting")


async def test_token_of_another_user_is_not_taken(page, server):
    await page.evaluate(PLAYED, [server.url, token(1)])
    change = "(other) => { try { chat.setToken(other); } catch (error) { return error.message; } }"
    assert await page.evaluate(change, token(2)) == "token is of another user"
    assert await page.evaluate("chat.userId") == 1
