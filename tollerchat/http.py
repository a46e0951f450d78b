"""What all routes share: how requests are read, and how refusals become responses."""

import base64
import binascii
import contextlib
import hashlib
import logging
from urllib.parse import urlsplit

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http import WS_KEY

from tollerchat.auth import Identity, verify_token
from tollerchat.config import Config
from tollerchat.errors import (
    BadRequest,
    ChatError,
    Forbidden,
    Unauthorized,
    UpgradeRequired,
)
from tollerchat.logs import Seldom
from tollerchat.protocol import MAX_BIGINT, MAX_ID, SUBPROTOCOL

__all__ = (
    "authenticate",
    "channel_id_of",
    "check_origin",
    "error_response",
    "handshake",
    "integer",
    "is_listed",
    "message_id_of",
)

logger = logging.getLogger("tollerchat.http")
logger.addFilter(Seldom())  # anybody may try

BEARER_PREFIX = "bearer."

_ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %s\r\n"
)


def error_response(error: ChatError) -> web.Response:
    """A refusal as JSON, with its status."""
    body = {"error": {"code": error.code, "message": str(error)}}
    headers = {}
    if isinstance(error, UpgradeRequired):
        headers = {hdrs.UPGRADE: "websocket", hdrs.CONNECTION: "upgrade"}
    elif isinstance(error, Unauthorized):
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    elif error.status == 503:
        headers[hdrs.RETRY_AFTER] = "1"
    return web.json_response(body, status=error.status, headers=headers)


def authenticate(request: web.Request, config: Config) -> Identity:
    """Who sends the request, by the first token of the contract's places. Raises `Unauthorized`."""
    return verify_token(_token(request), config)


def _token(request: web.Request) -> str:
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


def handshake(request: web.Request) -> tuple[bytes, bool]:
    """The response that accepts a WebSocket (RFC 6455, section 4.2), and whether it is of level tollerchat.v1.

    Raises `BadRequest`, `UpgradeRequired`.
    """
    headers = request.headers
    if headers.get(hdrs.UPGRADE, "").strip().lower() != "websocket":
        raise UpgradeRequired("this is a WebSocket route: connect with ws:// or wss://")
    if "upgrade" not in [token.lower() for token in _tokens(request, hdrs.CONNECTION)]:
        raise BadRequest("not a valid WebSocket handshake: it needs Connection: Upgrade")
    if request.version < HttpVersion11:
        raise BadRequest("not a valid WebSocket handshake: it needs HTTP/1.1")
    if hdrs.TRANSFER_ENCODING in headers or headers.get(hdrs.CONTENT_LENGTH, "0") != "0":
        raise BadRequest("not a valid WebSocket handshake: it must have no body")
    if headers.get(hdrs.SEC_WEBSOCKET_VERSION) != "13":
        raise BadRequest("not a valid WebSocket handshake: it needs Sec-WebSocket-Version: 13")
    key = headers.get(hdrs.SEC_WEBSOCKET_KEY, "")
    try:
        valid = len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise BadRequest("not a valid WebSocket handshake: Sec-WebSocket-Key must be 16 bytes in base64")
    accept = base64.b64encode(hashlib.sha1(key.encode() + WS_KEY, usedforsecurity=False).digest())
    response = _ACCEPTED % accept
    offered = _offered_protocols(request)
    v1 = SUBPROTOCOL in offered
    if v1:
        response += b"Sec-WebSocket-Protocol: %s\r\n" % SUBPROTOCOL.encode()
    elif any(protocol.startswith(BEARER_PREFIX) for protocol in offered):
        raise BadRequest(f"a token in Sec-WebSocket-Protocol must come with {SUBPROTOCOL}")
    return response + b"\r\n", v1


def _offered_protocols(request: web.Request) -> list[str]:
    return _tokens(request, hdrs.SEC_WEBSOCKET_PROTOCOL)


def _tokens(request: web.Request, name: str) -> list[str]:
    """What a header lists, which may be on several lines (RFC 9110, section 5.3)."""
    return [token.strip() for line in request.headers.getall(name, ()) for token in line.split(",")]


def check_origin(request: web.Request, config: Config) -> None:
    """Raise `Forbidden` if a browser sends this for a page that may not."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or is_listed(origin, config):
        return
    with contextlib.suppress(ValueError):  # what is no URL is no origin of ours
        if not config.allowed_origins and urlsplit(origin).netloc == request.host:
            return
    # Browsers do not show it to the page.
    logger.warning("a page of %.100r may not connect: add its origin to ALLOWED_ORIGINS", origin)
    raise Forbidden(f"the origin {origin} is not allowed: add it to ALLOWED_ORIGINS")


def is_listed(origin: str, config: Config) -> bool:
    """Whether `ALLOWED_ORIGINS` has an origin."""
    return "*" in config.allowed_origins or origin in config.allowed_origins


def channel_id_of(request: web.Request) -> int:
    """The channel in the path. Raises `BadRequest`."""
    return integer(request.match_info["channel_id"], "channel_id", 1, MAX_ID)


def message_id_of(request: web.Request, name: str) -> int | None:
    """A message id in the query, if it is there. Raises `BadRequest`."""
    text = request.query.get(name)
    return None if text is None else integer(text, name, 0, MAX_BIGINT)


def integer(text: str, name: str, low: int, high: int) -> int:
    """A decimal integer within bounds. Raises `BadRequest`."""
    # isdecimal() alone would let other scripts' digits through, and int() a sign or underscores.
    if text.isascii() and text.isdecimal() and len(text) <= 19 and low <= int(text) <= high:
        return int(text)
    raise BadRequest(f"{name} must be an integer from {low} to {high}")
