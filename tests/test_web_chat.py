"""The web chat in a real browser: two pages chat with each other."""

import dataclasses
import re

import pytest
from playwright.async_api import expect

from tests.browser import needs_chromium, running_browser
from tests.support import Template, token
from tollerchat.app import hub_key
from tollerchat.protocol import CloseCode

pytestmark = [
    needs_chromium,
    pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"]),
]


async def open_page(browser, server, user_id, **options):
    page = await browser.new_page(**options)
    page.problems = []
    page.on("pageerror", lambda problem: page.problems.append(problem))
    await page.goto(f"{server.url}/#channel=1&token={token(user_id)}")
    await expect(page.locator("#status")).to_have_attribute("data-state", "online")
    return page


async def test_two_pages_chat(server, database):
    database.insert("from the history")
    async with running_browser() as browser:
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
        await expect(alice.locator(".message .content")).to_have_text(["from the history", "<b>hello</b>"])
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


def contents(page):
    return page.locator(".message .content")


async def test_page_itself_does_not_scroll(server, database):
    database.insert(*[f"message {n}" for n in range(60)], user_id=1)
    async with running_browser() as browser:
        page = await open_page(browser, server, 1, viewport={"width": 360, "height": 640})
        await expect(contents(page)).to_have_count(50)
        assert await page.evaluate("document.documentElement.scrollHeight <= innerHeight")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_older_messages_can_be_reached_and_stand_before_what_is_missing(serve, config, database):
    server = await serve(dataclasses.replace(config, history_size=10, max_replay=3))
    database.insert(*[f"old {n}" for n in range(20)])
    async with running_browser() as browser:
        page = await open_page(browser, server, 1)
        await expect(page.locator(".earlier")).to_have_count(1)
        server.app[hub_key].draining = True
        (client,) = server.app[hub_key]._clients()
        client.close(CloseCode.GOING_AWAY, "")
        await expect(page.locator("#status")).to_have_attribute("data-state", "reconnecting")
        database.insert(*[f"new {n}" for n in range(10)])
        server.app[hub_key].draining = False
        await expect(contents(page).last).to_have_text("new 9")
        await page.locator(".earlier").click()
        await expect(contents(page)).to_have_count(23)
        await expect(page.locator(".earlier")).to_have_count(0)
        shown = await page.locator(".message .content, .notice").all_inner_texts()
        assert [text.partition(" ")[0] for text in shown] == ["old"] * 20 + ["Some"] + ["new"] * 3
        assert page.problems == []


async def test_message_that_ended_a_connection_is_not_sent_again_by_a_reload(serve, config, database):
    server = await serve(dataclasses.replace(config, max_frame_size=1024))
    async with running_browser() as browser:
        page = await open_page(browser, server, 1)
        await page.locator("#composer").fill("x" * 2000)
        await page.keyboard.press("Enter")
        await expect(page.locator("#status")).to_have_attribute("data-state", "signed-out")
        await page.reload()
        await expect(page.locator("#status")).to_have_attribute("data-state", "online")
        await expect(page.locator(".failure")).to_contain_text("Perhaps not sent")
        await page.locator("#composer").fill("hello")
        await page.keyboard.press("Enter")
        await expect(page.locator("[data-delivery=sent]")).to_have_text(re.compile("hello"))
        assert database.contents() == ["hello"]
        assert page.problems == []
