"""The chat's routes added to an application one has, without the web chat, and its parts used from there.

DB_URL=postgresql://... JWT_SECRET=... python examples/added.py
curl -X POST http://127.0.0.1:8080/announce/1 -d "Lunch is ready"
"""

from aiohttp import web

import tollerchat

ROBOT = 1  # the user in whose name the application speaks


async def announce(request: web.Request) -> web.Response:
    """Write a message: those who are connected get it at once."""
    channel_id = int(request.match_info["channel_id"])
    try:
        message = await tollerchat.post_message(request.app, channel_id, ROBOT, await request.text())
    except tollerchat.ChatError as exc:
        return web.json_response({"error": exc.code, "message": str(exc)}, status=exc.status)
    return web.json_response({"message_id": message.message_id})


def make_app(config: tollerchat.Config) -> web.Application:
    app = web.Application()
    app.router.add_post(r"/announce/{channel_id:\d{1,9}}", announce)
    tollerchat.setup(app, config)
    return app


if __name__ == "__main__":
    app = make_app(tollerchat.Config.from_env())
    web.run_app(app, host="127.0.0.1", port=8080, **tollerchat.RUNNER_OPTIONS)
