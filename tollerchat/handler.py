"""`ChatHandler`: from an HTTP request to a `Client`."""

from urllib.parse import urlsplit

from aiohttp import hdrs, web

from tollerchat.auth import verify_token
from tollerchat.client import Client
from tollerchat.config import Config
from tollerchat.errors import BadRequest, ChatError, Forbidden, NotFound, Unauthorized, Unavailable
from tollerchat.hub import Hub
from tollerchat.protocol import MAX_BIGINT, MAX_ID, SUBPROTOCOL
from tollerchat.repository import Repository
from tollerchat.writer import MessageWriter

__all__ = ("ChatHandler", "error_response")

BEARER_PREFIX = "bearer."


class ChatHandler:
    """Serves `GET /ws/channel/{channel_id}` (docs/protocol.md, "Open a channel")."""

    def __init__(self, config: Config, repository: Repository, hub: Hub, writer: MessageWriter) -> None:
        self._config = config
        self._repository = repository
        self._hub = hub
        self._writer = writer

    async def serve_ws(self, request: web.Request) -> web.StreamResponse:
        """Check the request, upgrade it, and serve the connection until it ends."""
        if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
            return _upgrade_required()
        try:
            if self._hub.draining:
                raise Unavailable("the server is shutting down: connect again")
            identity = verify_token(_token(request), self._config)
            channel_id = _integer(request.match_info["channel_id"], "channel_id", 1, MAX_ID)
            after = request.query.get("after")
            after_id = None if after is None else _integer(after, "after", 0, MAX_BIGINT)
            v1 = _negotiate(request)
            self._check_origin(request)
            await self._repository.check_access(channel_id, identity.user_id)
        except ChatError as exc:
            return error_response(exc)
        client = Client(self._config, self._hub, self._writer, identity, channel_id, v1=v1)
        return await self._serve(request, client, after_id)

    async def _serve(self, request: web.Request, client: Client, after: int | None) -> web.StreamResponse:
        try:
            await client.seek(await self._hub.register(client), after)
            # One byte more: aiohttp refuses frames of exactly its limit.
            connection = web.WebSocketResponse(
                protocols=(SUBPROTOCOL,) if client.v1 else (),
                max_msg_size=self._config.max_frame_size + 1,
                autoping=False,
                compress=False,
            )
            writer = await connection.prepare(request)
            transport = request.transport
            if transport is not None:
                await client.run(connection, transport, writer.drain)
            return connection
        except ChatError as exc:
            return error_response(exc)
        except web.HTTPBadRequest as exc:
            return error_response(BadRequest(f"not a valid WebSocket handshake: {exc.text}"))
        finally:
            await self._hub.unregister(client)

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        allowed = self._config.allowed_origins
        if origin is None or "*" in allowed or origin in allowed:
            return
        if not allowed and urlsplit(origin).netloc == request.host:
            return
        raise Forbidden(f"the origin {origin} is not allowed: add it to ALLOWED_ORIGINS")


def error_response(error: ChatError) -> web.Response:
    """A refusal as JSON, with the status of the contract."""
    body = {"error": {"code": error.code, "message": str(error)}}
    headers = {}
    if isinstance(error, Unauthorized):
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    elif isinstance(error, Unavailable):
        headers[hdrs.RETRY_AFTER] = "1"
    return web.json_response(body, status=_STATUS[type(error)], headers=headers)


_STATUS = {BadRequest: 400, Unauthorized: 401, Forbidden: 403, NotFound: 404, Unavailable: 503}


def _upgrade_required() -> web.Response:
    message = "this is a WebSocket route: connect with ws:// or wss://"
    return web.json_response(
        {"error": {"code": "upgrade_required", "message": message}},
        status=426,
        headers={hdrs.UPGRADE: "websocket", hdrs.CONNECTION: "upgrade"},
    )


def _token(request: web.Request) -> str:
    """The token of a request, from the first place of the contract that has one. Raises `Unauthorized`."""
    scheme, _, credentials = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if "token" in request.query:
        return request.query["token"]
    offered = _offered_protocols(request)
    if SUBPROTOCOL in offered:
        for protocol in offered:
            if protocol.startswith(BEARER_PREFIX):
                return protocol[len(BEARER_PREFIX) :]
    raise Unauthorized('no token: send "Authorization: Bearer <jwt>", or ?token=<jwt>')


def _negotiate(request: web.Request) -> bool:
    """Whether the client speaks tollerchat.v1, else it is at the plain level. Raises `BadRequest`."""
    offered = _offered_protocols(request)
    if SUBPROTOCOL in offered:
        return True
    if any(protocol.startswith(BEARER_PREFIX) for protocol in offered):
        # aiohttp would log the offer, and the token with it.
        raise BadRequest(f"a token in Sec-WebSocket-Protocol must come with {SUBPROTOCOL}")
    return False


def _offered_protocols(request: web.Request) -> list[str]:
    return [offer.strip() for offer in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(",")]


def _integer(text: str, name: str, low: int, high: int) -> int:
    # isdecimal() alone would let other scripts' digits through, and int() a sign or underscores.
    if text.isascii() and text.isdecimal() and len(text) <= 19 and low <= int(text) <= high:
        return int(text)
    raise BadRequest(f"{name} must be an integer from {low} to {high}")
