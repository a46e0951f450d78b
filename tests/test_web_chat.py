"""The web chat in a real browser: two pages chat with each other."""

from playwright.async_api import expect

from tests.browser import needs_chromium, running_browser
from tests.support import token

pytestmark = needs_chromium


async def open_page(browser, server, user_id):
    page = await browser.new_page()
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
