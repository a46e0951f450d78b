"""tollerchat as it comes, mounted in an application of one's own.

    DB_URL=postgresql://... JWT_SECRET=... python examples/mounted.py

The chat is at /chat/, its channels at /chat/ws/channel/1.
"""

from aiohttp import web

import tollerchat


async def home(request: web.Request) -> web.Response:
    return web.Response(text='<a href="/chat/">Chat</a>', content_type="text/html")


def make_app(config: tollerchat.Config) -> web.Application:
    app = web.Application()
    app.router.add_get("/", home)
    app.add_subapp("/chat", tollerchat.create_app(config))
    return app


if __name__ == "__main__":
    app = make_app(tollerchat.Config.from_env())
    web.run_app(app, host="127.0.0.1", port=8080, **tollerchat.RUNNER_OPTIONS)
