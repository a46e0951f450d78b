"""The web chat in a real browser: two pages chat with each other."""

import dataclasses
import shutil

import pytest
from playwright.async_api import async_playwright, expect

from examples import mounted
from tests.support import token

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]


async def open_page(browser, server, user_id):
    page = await browser.new_page()
    page.problems = []
    page.on("pageerror", lambda problem: page.problems.append(problem))
    await page.goto(f"{server.url}/#channel=1&token={token(user_id)}")
    await expect(page.locator("#status")).to_have_attribute("data-state", "online")
    return page


async def test_two_pages_chat(server, database):
    database.insert("from the history")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            alice, bob = await open_page(browser, server, 1), await open_page(browser, server, 2)
            assert "token" not in alice.url
            await expect(alice.locator(".message .content")).to_have_text(["from the history"])

            await bob.locator("#composer").type("<b>hello</b>")
            await expect(alice.locator("#typing")).not_to_be_empty()
            await bob.keyboard.press("Enter")
            await expect(alice.locator(".message .content").last).to_have_text("<b>hello</b>")
            await expect(alice.locator("#typing")).to_be_empty()
            await expect(bob.locator(".message.own[data-message-id] .content")).to_have_text(["<b>hello</b>"])
            await expect(alice.locator(".message.own")).to_have_count(0)

            await alice.reload()
            await expect(alice.locator(".message .content")).to_have_text(
                ["from the history", "<b>hello</b>"]
            )
            assert database.contents() == ["from the history", "<b>hello</b>"]

            database.execute("TRUNCATE messages RESTART IDENTITY")
            for page in (alice, bob):
                await expect(page.locator(".message")).to_have_count(0)
                await expect(page.locator("#status")).to_have_attribute("data-state", "online")
            await bob.locator("#composer").type("under an id that was there before")
            await bob.keyboard.press("Enter")
            for page in (alice, bob):
                await expect(page.locator(".message[data-message-id] .content")).to_have_text(
                    ["under an id that was there before"]
                )
            assert alice.problems == bob.problems == []
        finally:
            await browser.close()


# The page is about:blank: of no origin, which browsers tell as "null".
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


async def test_client_of_a_page_from_elsewhere_tells_what_may_be_stored(serve, config, database):
    config = dataclasses.replace(config, allowed_origins=("null",), max_frame_size=256)
    server = await serve(app=mounted.make_app(config), prefix="/chat")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = await browser.new_page()
            assert await page.evaluate(FROM_ANOTHER_ORIGIN, [server.url, token(1)]) == {
                "code": 1009,
                "refused": "RangeError",
                "failed": [["empty_content", False], ["1009", True]],
            }
        finally:
            await browser.close()
    assert database.contents() == ["hello"]
