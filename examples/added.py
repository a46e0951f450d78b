"""The chat's routes added to an application one has, without the web chat, and its parts used from there.

DB_URL=postgresql://... JWT_SECRET=... python examples/added.py
curl -X POST http://127.0.0.1:8080/announce/1 -d "Lunch is ready"
"""

from aiohttp import web

import tollerchat
from tollerchat.app import repository_key
from tollerchat.saving import NewMessage

ROBOT = 1  # the user in whose name the application speaks


async def announce(request: web.Request) -> web.Response:
    """Write a message like any other program that knows the database: those connected get it at once."""
    message = NewMessage(int(request.match_info["channel_id"]), ROBOT, await request.text())
    stored = await request.app[repository_key].save_message(message)
    return web.json_response({"message_id": stored.message_id})


def make_app(config: tollerchat.Config) -> web.Application:
    app = web.Application()
    app.router.add_post("/announce/{channel_id}", announce)
    tollerchat.setup(app, config)
    return app


if __name__ == "__main__":
    web.run_app(make_app(tollerchat.Config.from_env()), host="127.0.0.1", port=8080)
