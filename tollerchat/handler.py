"""`ChatHandler`: from an HTTP request to a `Client`."""

from aiohttp import hdrs, web

from tollerchat.client import Client
from tollerchat.config import Config
from tollerchat.errors import ChatError
from tollerchat.http import (
    authenticate,
    channel_id_of,
    check_origin,
    error_response,
    handshake,
    message_id_of,
)
from tollerchat.hub import Hub
from tollerchat.turns import Turns
from tollerchat.websocket import WebSocket
from tollerchat.writer import MessageWriter

__all__ = ("ChatHandler",)


class ChatHandler:
    """Serves `GET /ws/channel/{channel_id}` (docs/protocol.md, "Open a channel")."""

    def __init__(self, config: Config, hub: Hub, writer: MessageWriter) -> None:
        self._config = config
        self._hub = hub
        self._writer = writer
        self._turns = Turns()

    async def serve_ws(self, request: web.Request) -> web.StreamResponse:
        """Check the request and upgrade it. The connection lives on when this has returned."""
        try:
            headers = handshake(request)
            identity = authenticate(request, self._config)
            channel_id = channel_id_of(request)
            after = message_id_of(request, "after")
            check_origin(request, self._config)
            v1 = hdrs.SEC_WEBSOCKET_PROTOCOL in headers
            client = Client(self._config, self._hub, self._writer, identity, channel_id, v1=v1)
            response = web.StreamResponse(status=101, headers=headers)
            await self._upgrade(request, response, client, after)
        except ChatError as exc:
            return error_response(exc)
        except ConnectionError:
            pass  # it hung up meanwhile, as aiohttp will find out
        return response

    async def _upgrade(
        self, request: web.Request, response: web.StreamResponse, client: Client, after: int | None
    ) -> None:
        try:
            room = await self._hub.register(client)
            # In this order: who loses access from now on is found in the room, and closed.
            await self._hub.access.check(client.channel_id, client.user_id)
            await client.seek(room, after)
            await response.prepare(request)
            if request.transport is None:
                raise ConnectionResetError
            websocket = WebSocket(
                request.transport, client, self._turns, max_size=self._config.max_frame_size
            )
            websocket.take_over(request)
            client.start(websocket)
        except BaseException:
            client.abort()  # where its connection is ours already
            await self._hub.unregister(client)
            raise
