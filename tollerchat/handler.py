"""`ChatHandler`: from an HTTP request to a `Client`."""

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

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
            accepted, v1 = handshake(request)
            identity = authenticate(request, self._config)
            channel_id = channel_id_of(request)
            after = message_id_of(request, "after")
            check_origin(request, self._config)
            client = Client(self._config, self._hub, self._writer, identity, channel_id, v1=v1)
            await self._upgrade(request, accepted, client, after)
        except ChatError as exc:
            return error_response(exc)
        return _Answered(status=101)

    async def _upgrade(
        self, request: web.Request, accepted: bytes, client: Client, after: int | None
    ) -> None:
        try:
            room = await self._hub.register(client)
            # In this order: who loses access from now on is found in the room, and closed.
            await self._hub.access.check(client.channel_id, client.user_id)
            await client.seek(room, after)
            if request.transport is None:  # it hung up meanwhile
                await self._hub.unregister(client)
                return
            websocket = WebSocket(
                request.transport, client, self._turns, max_size=self._config.max_frame_size
            )
            websocket.take_over(request)
            websocket.hold()  # the answer and the history are one write
            websocket.write(accepted)
            client.start(websocket)
            websocket.release()
        except BaseException:
            client.abort()  # where its connection is ours already
            await self._hub.unregister(client)
            raise


class _Answered(web.StreamResponse):
    """For aiohttp, which has nothing to send any more: the connection is ours, or gone."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        pass
