"""`ChatHandler`: from an HTTP request to a `Client`."""

from aiohttp import hdrs, web

from tollerchat.client import Client
from tollerchat.config import Config
from tollerchat.errors import BadRequest, ChatError, Unavailable, UpgradeRequired
from tollerchat.http import (
    authenticate,
    channel_id_of,
    check_origin,
    error_response,
    message_id_of,
    negotiate,
)
from tollerchat.hub import Hub
from tollerchat.protocol import SUBPROTOCOL
from tollerchat.repository import Repository
from tollerchat.writer import MessageWriter

__all__ = ("ChatHandler",)


class ChatHandler:
    """Serves `GET /ws/channel/{channel_id}` (docs/protocol.md, "Open a channel")."""

    def __init__(self, config: Config, repository: Repository, hub: Hub, writer: MessageWriter) -> None:
        self._config = config
        self._repository = repository
        self._hub = hub
        self._writer = writer

    async def serve_ws(self, request: web.Request) -> web.StreamResponse:
        """Check the request, upgrade it, and serve the connection until it ends."""
        try:
            if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
                raise UpgradeRequired("this is a WebSocket route: connect with ws:// or wss://")
            if self._hub.draining:
                raise Unavailable("the server is shutting down: connect again")
            identity = authenticate(request, self._config)
            channel_id = channel_id_of(request)
            after = message_id_of(request, "after")
            v1 = negotiate(request)
            check_origin(request, self._config)
            edition = self._hub.access_edition
            await self._repository.check_access(channel_id, identity.user_id)
        except ChatError as exc:
            return error_response(exc)
        client = Client(self._config, self._hub, self._writer, identity, channel_id, v1=v1)
        return await self._serve(request, client, after, edition)

    async def _serve(
        self, request: web.Request, client: Client, after: int | None, edition: int
    ) -> web.StreamResponse:
        try:
            room = await self._hub.register(client)
            if edition != self._hub.access_edition:
                # Access was withdrawn from somebody after we looked, and before this client could be found.
                await self._repository.check_access(client.channel_id, client.user_id)
            await client.seek(room, after)
            connection = web.WebSocketResponse(
                protocols=(SUBPROTOCOL,) if client.v1 else (),
                max_msg_size=self._config.max_frame_size + 1,  # aiohttp refuses frames of exactly its limit
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
