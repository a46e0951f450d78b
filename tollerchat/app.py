"""The application: every part made, connected, started and stopped."""

import asyncio
import contextlib
import json
import logging
import mimetypes
from collections.abc import AsyncIterator, Coroutine, Mapping
from importlib import resources
from typing import Any, Final

from aiohttp import hdrs, web

from tollerchat.api import MessagesApi
from tollerchat.bus import PostgresBus
from tollerchat.config import Config
from tollerchat.errors import Unavailable
from tollerchat.handler import ChatHandler
from tollerchat.http import error_response
from tollerchat.hub import Hub
from tollerchat.logs import hide_tokens
from tollerchat.protocol import OutgoingMessage, parse_message
from tollerchat.repository import Repository
from tollerchat.saving import NewMessage
from tollerchat.tasks import end_tasks
from tollerchat.writer import MessageWriter

__all__ = (
    "RUNNER_OPTIONS",
    "config_key",
    "create_app",
    "drain",
    "hub_key",
    "post_message",
    "repository_key",
    "setup",
    "tasks_key",
    "writer_key",
)

logger = logging.getLogger("tollerchat.app")

config_key = web.AppKey("config_key", Config)
repository_key = web.AppKey("repository_key", Repository)
hub_key = web.AppKey("hub_key", Hub)
writer_key = web.AppKey("writer_key", MessageWriter)
tasks_key = web.AppKey("tasks_key", list)  # which run for as long as the server

HEALTH_TIMEOUT = 2.0  # seconds

# For the runner of an application: by aiohttp's defaults, strangers may hold much memory for an hour, and a
# small request may unpack to gigabytes.
RUNNER_OPTIONS: Final[dict[str, Any]] = {
    "auto_decompress": False,
    "keepalive_timeout": 30.0,  # seconds, also to send a whole request
    "max_headers": 64,
    "tcp_keepalive": False,  # pings find dead peers sooner
}

# The page needs no more than its own files and its own server.
_CSP = "default-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'self'; base-uri 'none'"


def create_app(config: Config) -> web.Application:
    """An application with everything that `setup` adds, and the web chat at `/`.

    Run it on its own, or mount it: `parent.add_subapp("/chat", create_app(config))`.
    Raises `ConfigError` where `db_url` or `jwt_secret` is missing.
    """
    app = web.Application()
    setup(app, config)
    # From memory: there are few. aiohttp would fail loudly on odd names, and on dates that do not exist.
    static = resources.files("tollerchat").joinpath("static")
    files = {path.name: path.read_bytes() for path in static.iterdir()}

    async def page(request: web.Request) -> web.StreamResponse:
        return _file("index.html", files["index.html"], headers={"Content-Security-Policy": _CSP})

    async def add_slash(request: web.Request) -> web.StreamResponse:
        raise web.HTTPPermanentRedirect(request.path + "/")

    async def file(request: web.Request) -> web.StreamResponse:
        if (content := files.get(name := request.match_info["name"])) is None:
            raise web.HTTPNotFound
        # Modules that any page may import: nothing in them is secret.
        return _file(name, content, headers={hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*"})

    app.router.add_get("/", page)
    app.router.add_get("", add_slash)  # where mounted: the page's links are relative to "/chat/", not "/chat"
    app.router.add_get("/static/{name}", file)
    return app


def _file(name: str, content: bytes, headers: Mapping[str, str]) -> web.Response:
    content_type = mimetypes.guess_type(name)[0]
    return web.Response(body=content, content_type=content_type, charset="utf-8", headers=headers)


def setup(app: web.Application, config: Config) -> None:
    """Add the chat to an application: the WebSocket route, the HTTP routes beside it, and `/health`.

    Raises `ConfigError` where `db_url` or `jwt_secret` is missing.
    """
    config.require_db_url()
    config.require_jwt_secret()
    hide_tokens()
    repository = Repository(config)
    hub = Hub(config, repository)
    writer = MessageWriter(config, repository, hub)
    app[config_key] = config
    app[repository_key] = repository
    app[hub_key] = hub
    app[writer_key] = writer
    app[tasks_key] = []
    handler = ChatHandler(config, hub, writer)
    app.router.add_get("/ws/channel/{channel_id}", handler.serve_ws, allow_head=False)
    api = MessagesApi(config, repository, hub, writer)
    app.router.add_get("/channels/{channel_id}/messages", api.get_messages, allow_head=False)
    app.router.add_post("/channels/{channel_id}/messages", api.post_message)
    if config.allowed_origins:
        app.router.add_options("/channels/{channel_id}/messages", api.preflight)
        app.on_response_prepare.append(api.allow_origin)
    app.router.add_get("/health", health)
    app.cleanup_ctx.append(_parts)
    # Not in the context: a parent's contexts, which may own what we write to, are cleaned before ours.
    app.on_shutdown.append(drain)


async def post_message(
    app: web.Application, channel_id: int, user_id: int, content: str, nonce: str | None = None
) -> OutgoingMessage:
    """Store a message in the name of any user, and broadcast it to everybody in the channel; returns it as committed.

    `app` is the one that `create_app` made, or `setup` was called with. Whether the user may join the channel is not
    asked. Raises a `ChatError`, with the `code` of docs/protocol.md; where it is `unavailable`, only a message with a
    `nonce` can be posted again without the risk that it is there twice.
    """
    # As JSON: it is checked as what clients send is, types and text too.
    new = parse_message(json.dumps({"content": content, "nonce": nonce}))
    return await app[repository_key].save_message(NewMessage(channel_id, user_id, new.content, new.nonce))


async def _parts(app: web.Application) -> AsyncIterator[None]:
    if app[hub_key].draining:
        raise RuntimeError("this application was shut down: make another one")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(app[repository_key].close)
        stack.push_async_callback(app[hub_key].access.close)
        works = (
            app[repository_key].watch.run,
            app[writer_key].run,
            PostgresBus(app[config_key], app[hub_key], app[repository_key]).run,
            app[hub_key].keep_alive,
        )
        for work in works:
            app[tasks_key].append(await stack.enter_async_context(_background(work())))
        yield


@contextlib.asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> "AsyncIterator[asyncio.Task[None]]":
    """Run an endless task, and report at once if it ends all the same."""

    def report(task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        logger.critical("a background task ended: restart the server", exc_info=error)

    task = asyncio.create_task(work)
    task.add_done_callback(report)
    try:
        yield task
    finally:
        task.remove_done_callback(report)
        await end_tasks(task)


async def drain(app: web.Application) -> None:
    """Let nobody in, answer what was taken, close all connections; within `shutdown_timeout`."""
    hub, timeout = app[hub_key], app[config_key].shutdown_timeout
    if hub.draining:
        return
    hub.draining = True
    try:
        # In the end, it waits for those who are behind in the log.
        await asyncio.wait_for(app[writer_key].flush(0.5 * timeout), 0.6 * timeout)
    except asyncio.TimeoutError:
        logger.error("shutting down with messages whose senders have no answer: the database does not do")
    await hub.close_all(0.4 * timeout)


async def health(request: web.Request) -> web.StreamResponse:
    """`GET /health`: 200 while the server takes connections and the database answers."""
    app = request.app
    try:
        if app[hub_key].draining:
            raise Unavailable("the server is shutting down")
        if any(task.done() for task in app[tasks_key]):
            raise Unavailable("a part of the server has failed: restart it")
        await asyncio.wait_for(app[repository_key].ping(), HEALTH_TIMEOUT)
    except asyncio.TimeoutError:
        return error_response(Unavailable("the database does not answer"))
    except Unavailable as exc:
        return error_response(exc)
    return web.json_response({"status": "ok"})
