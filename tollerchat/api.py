"""The HTTP routes beside the WebSocket: pages of history, and posting without a connection."""

import asyncio
import itertools
from collections.abc import Sequence

import msgspec
from aiohttp import hdrs, web

from tollerchat.config import Config
from tollerchat.errors import BadRequest, ChatError, Unavailable
from tollerchat.http import (
    authenticate,
    channel_id_of,
    error_response,
    integer,
    is_listed,
    message_id_of,
)
from tollerchat.hub import Hub
from tollerchat.protocol import MAX_BIGINT, OutgoingMessage, parse_message
from tollerchat.repository import Repository
from tollerchat.saving import NewMessage, Saved
from tollerchat.websocket import bound_send_buffer
from tollerchat.writer import MessageWriter

__all__ = ("MessagesApi",)

MAX_LIMIT = 200  # messages of one page
MAX_CHARACTERS = 256 * 1024  # of their contents, unless one is longer: nobody may have read any of it yet
SLICE = 128 * 1024  # bytes of it that must be read in WRITE_TIMEOUT


class HistoryPage(msgspec.Struct):
    messages: Sequence[OutgoingMessage]
    has_more: bool


class Poster:
    """The sender of one posted message: no connection, so nothing to keep from it."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[Saved | ChatError] = asyncio.get_running_loop().create_future()

    def stored(self, saved: Saved, nonce: str | None) -> None:
        self._set(saved)

    def refused(self, error: ChatError, message: NewMessage) -> None:
        self._set(error)

    def answer(self) -> None:
        """Its outcome is its answer."""

    def _set(self, outcome: Saved | ChatError) -> None:
        if not self.outcome.done():  # whoever posted may be gone
            self.outcome.set_result(outcome)


class MessagesApi:
    """Serves `/channels/{channel_id}/messages` (docs/protocol.md, "HTTP beside it")."""

    def __init__(self, config: Config, repository: Repository, hub: Hub, writer: MessageWriter) -> None:
        self._config = config
        self._hub = hub
        self._repository = repository
        self._writer = writer

    async def get_messages(self, request: web.Request) -> web.StreamResponse:
        """A page of history, oldest first; the newest one without `before` and `after`."""
        try:
            channel_id, _ = await self._admit(request)
            before, after = message_id_of(request, "before"), message_id_of(request, "after")
            limit = integer(request.query.get("limit", "50"), "limit", 1, MAX_LIMIT)
            until = MAX_BIGINT if before is None else before - 1
            # One more than asked for tells whether there is more.
            if after is None:
                messages = await self._repository.load_last_messages(channel_id, until, limit + 1)
                page = _within_bounds(messages[::-1], limit)[::-1]
            else:
                messages = await self._repository.load_messages_after(channel_id, after, until, limit + 1)
                page = _within_bounds(messages, limit)
        except ChatError as exc:
            return error_response(exc)
        body = msgspec.json.encode(HistoryPage(page, has_more=len(messages) > len(page)))
        del messages, page  # it may take a while until it is read
        return await self._send(request, body)

    async def post_message(self, request: web.Request) -> web.StreamResponse:
        """Store and broadcast: 201 with the message, 200 with the original one for a nonce seen before."""
        try:
            await self._admit(request)
            incoming = parse_message(await self._body(request))
            channel_id, user_id = await self._admit(request)  # again: the body may have taken its time
            poster = Poster()
            self._writer.submit(NewMessage(channel_id, user_id, incoming.content, incoming.nonce), poster)
            # The last try may take some queries; later than that, the writer has failed.
            bound = self._config.store_timeout + 5 * self._config.db_timeout
            outcome = await asyncio.wait_for(poster.outcome, bound)
        except asyncio.TimeoutError:
            return error_response(
                Unavailable("the message may be stored, or not: send it again with its nonce")
            )
        except ChatError as exc:
            return error_response(exc)
        if isinstance(outcome, ChatError):
            return error_response(outcome)
        return _json(outcome.message, status=200 if outcome.repeated else 201)

    async def preflight(self, request: web.Request) -> web.Response:
        """What a browser asks before a page of another origin may send a token."""
        return web.Response(
            status=204,
            headers={
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type",
                hdrs.ACCESS_CONTROL_MAX_AGE: "600",
            },
        )

    async def allow_origin(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let pages of `ALLOWED_ORIGINS` read our answers (Fetch standard, "CORS protocol")."""
        if request.match_info.handler in (self.get_messages, self.post_message, self.preflight):
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
            origin = request.headers.get(hdrs.ORIGIN)
            if origin is not None and is_listed(origin, self._config):
                response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin

    async def _admit(self, request: web.Request) -> tuple[int, int]:
        identity = authenticate(request, self._config)
        channel_id = channel_id_of(request)
        await self._hub.access.check(channel_id, identity.user_id)
        return channel_id, identity.user_id

    async def _body(self, request: web.Request) -> str:
        limit = self._config.max_frame_size
        if request.headers.get(hdrs.CONTENT_ENCODING, "").lower() not in ("", "identity"):
            raise BadRequest("the body must not be compressed: send it without Content-Encoding")
        try:
            body = await asyncio.wait_for(_read(request, limit + 1), self._config.write_timeout)
        except asyncio.TimeoutError:
            raise BadRequest("the body did not come in time") from None
        except (ConnectionError, web.RequestPayloadError):
            raise BadRequest("the body is not complete") from None
        if len(body) > limit:
            raise BadRequest(f"the body is larger than {limit} bytes")
        try:
            return body.decode()
        except UnicodeDecodeError:
            raise BadRequest("the body is not UTF-8") from None

    async def _send(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Send a large body, for as long as it is read."""
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/json"})
        response.content_length = len(body)
        transport = request.transport
        try:
            await response.prepare(request)
            if transport is not None:
                transport.set_write_buffer_limits(0)  # it is sent when the kernel has it
                bound_send_buffer(transport)
            rest = memoryview(body)
            while len(rest) > SLICE:
                await asyncio.wait_for(response.write(rest[:SLICE]), self._config.write_timeout)
                rest = rest[SLICE:]
            await asyncio.wait_for(response.write_eof(bytes(rest)), self._config.write_timeout)
        except asyncio.TimeoutError:
            if transport is not None:
                transport.abort()
        except ConnectionError:
            pass  # it hung up meanwhile, as aiohttp will find out
        return response


def _within_bounds(messages: Sequence[OutgoingMessage], limit: int) -> Sequence[OutgoingMessage]:
    """The first messages, as many as one page may have."""
    sizes = itertools.accumulate(len(message.content) for message in messages[:limit])
    count = sum(size <= MAX_CHARACTERS for size in sizes)
    return messages[: max(count, 1)]


async def _read(request: web.Request, size: int) -> bytes:
    """All there is, but not much more than `size` bytes."""
    if request.content.at_eof():  # it has none, or a middleware of an embedding application has read it
        return await request.read()
    body = b""
    while len(body) < size and (more := await request.content.read(size)):
        body += more
    return body


def _json(content: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")
