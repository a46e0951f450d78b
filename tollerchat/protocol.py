"""The wire contract as code: frames in, frames out, codes (docs/protocol.md). No I/O.

A new frame type starts here: add a struct and put it into `IncomingFrame` (or make it an
outgoing frame), then handle it in `Client`.
"""

import json
import re
from enum import IntEnum
from typing import Final, get_args

import msgspec

from tollerchat.errors import (
    ChatError,
    EmptyContent,
    InvalidContent,
    InvalidFrame,
    InvalidJson,
    InvalidNonce,
    UnknownType,
)

__all__ = (
    "MAX_BIGINT",
    "MAX_ID",
    "MAX_NONCE_LENGTH",
    "PING_FRAME",
    "SUBPROTOCOL",
    "AckFrame",
    "CloseCode",
    "ErrorFrame",
    "IncomingAuth",
    "IncomingFrame",
    "IncomingMessage",
    "IncomingTyping",
    "OutgoingFrame",
    "OutgoingMessage",
    "OutgoingTyping",
    "ReadyFrame",
    "close_frame",
    "encode",
    "error_frame",
    "parse",
    "parse_message",
    "pong_frame",
)

SUBPROTOCOL: Final = "tollerchat.v1"
MAX_NONCE_LENGTH: Final = 64
MAX_ID: Final = 2**31 - 1  # channel_id and user_id are INT columns
MAX_BIGINT: Final = 2**63 - 1  # message_id is a BIGINT column
PING_FRAME: Final = b"\x89\x00"


class CloseCode(IntEnum):
    GOING_AWAY = 1001
    INTERNAL_ERROR = 1011
    TOO_SLOW = 1013
    TOKEN_EXPIRED = 4401
    ACCESS_WITHDRAWN = 4403
    CHANNEL_DELETED = 4404


# -- client to server ------------------------------------------------------------------------------


class IncomingMessage(msgspec.Struct, tag="message", gc=False):
    """Store `content`, then broadcast it; `nonce` names the message so that it can be sent again."""

    content: str
    nonce: str | None = None

    def check(self) -> None:
        """Refuse what the contract does not allow in a message.

        Raises `EmptyContent`, `InvalidContent` or `InvalidNonce`.
        """
        if not self.content or self.content.isspace():
            raise EmptyContent("content is empty: send at least one character that is not white space")
        if "\0" in self.content:
            raise InvalidContent("content contains a NUL character: remove it")
        if self.nonce is not None:
            if not 1 <= len(self.nonce) <= MAX_NONCE_LENGTH:
                raise InvalidNonce(f"nonce must be a string of 1 to {MAX_NONCE_LENGTH} characters")
            if "\0" in self.nonce:
                raise InvalidNonce("nonce contains a NUL character: remove it")


class IncomingTyping(msgspec.Struct, tag="typing", gc=False):
    """The user is typing."""


class IncomingAuth(msgspec.Struct, tag="auth", gc=False):
    """Extend the session with a fresh token of the same user."""

    token: str


IncomingFrame = IncomingMessage | IncomingTyping | IncomingAuth

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_TYPES: Final = tuple(frame.__struct_config__.tag for frame in get_args(IncomingFrame))
_message_decoder = msgspec.json.Decoder(IncomingMessage)
_decoder: msgspec.json.Decoder[IncomingFrame] = msgspec.json.Decoder(IncomingFrame)


def parse(text: str) -> IncomingFrame:
    """Turn the text of a WebSocket frame into a valid incoming frame.

    Raises one of the `ChatError`s of this contract, with the frame's nonce if it has a usable one.
    """
    try:
        frame = _decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as exc:
        lenient = _lenient(text)
        error = _explain(exc, lenient)
        if isinstance(lenient, dict):
            error.nonce = _usable(lenient.get("nonce"))
        raise error from None
    if isinstance(frame, IncomingMessage):
        try:
            frame.check()
        except ChatError as error:
            error.nonce = _usable(frame.nonce)
            raise
    return frame


def parse_message(text: str) -> IncomingMessage:
    """Turn the body of a posted message, where `type` may be missing, into a valid message.

    Raises the same `ChatError`s as `parse`.
    """
    try:
        message = _message_decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as exc:
        frame = _lenient(text)
        raise _explain(exc, {"type": "message", **frame} if isinstance(frame, dict) else frame) from None
    message.check()
    return message


def _usable(nonce: object) -> str | None:
    """A nonce that an answer can repeat."""
    if isinstance(nonce, str) and len(nonce) <= MAX_NONCE_LENGTH and not _has_surrogate(nonce):
        return nonce
    return None


def _lenient(text: str) -> object:
    """Decode what may not fit any struct. Only for refusals, off the hot path."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _has_surrogate(text: str) -> bool:
    return _SURROGATE.search(text) is not None


def _explain(exc: Exception, frame: object) -> ChatError:
    """What is wrong with a frame that did not fit its struct; `frame` is None if it is not even JSON."""
    if isinstance(exc, RecursionError):  # before all else: how deep json goes depends on Python's version
        return InvalidJson("the JSON is nested too deeply")
    if frame is None:
        return InvalidJson(f"not valid JSON: {exc}")
    if not isinstance(frame, dict):
        return InvalidFrame("the frame must be a JSON object")
    if "type" not in frame:
        return InvalidFrame('the frame has no "type"')
    if not isinstance(frame["type"], str):
        return InvalidFrame('"type" must be a string')
    if frame["type"] not in _TYPES:
        return UnknownType(f'unknown "type": it must be one of {", ".join(_TYPES)}')
    if isinstance(content := frame.get("content"), str) and _has_surrogate(content):
        return InvalidContent("content contains a lone surrogate: send valid Unicode")
    nonce = frame.get("nonce")
    if nonce is not None and (not isinstance(nonce, str) or _has_surrogate(nonce)):
        return InvalidNonce(f"nonce must be a string of 1 to {MAX_NONCE_LENGTH} characters")
    return InvalidFrame(f"the frame does not fit its type: {exc}")


# -- server to client ------------------------------------------------------------------------------


class OutgoingMessage(msgspec.Struct, tag="message", gc=False):
    """A stored message; `created_at` is RFC 3339 in UTC."""

    content: str
    user_id: int
    channel_id: int
    message_id: int
    created_at: str


class OutgoingTyping(msgspec.Struct, tag="typing", gc=False):
    """Another user is typing; `content` is always empty."""

    user_id: int
    channel_id: int
    content: str = ""


class ErrorFrame(msgspec.Struct, tag="error", gc=False, omit_defaults=True):
    """A frame was refused; the connection lives on."""

    code: str
    message: str
    nonce: str | None = None


class ReadyFrame(msgspec.Struct, tag="ready", gc=False):
    """History is over, live frames follow. Level tollerchat.v1 only."""

    channel_id: int
    user_id: int
    last_message_id: int
    gap: bool


class AckFrame(msgspec.Struct, tag="ack", gc=False):
    """The message is committed. Level tollerchat.v1 only."""

    nonce: str | None
    message_id: int
    created_at: str


OutgoingFrame = OutgoingMessage | OutgoingTyping | ErrorFrame | ReadyFrame | AckFrame

_encode_json = msgspec.json.Encoder().encode


def encode(frame: OutgoingFrame) -> bytes:
    """A whole, unmasked WebSocket text frame (RFC 6455, section 5.2), ready for the transport."""
    payload = _encode_json(frame)
    size = len(payload)
    if size < 126:
        return b"\x81" + size.to_bytes(1, "big") + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def error_frame(error: ChatError, nonce: str | None = None) -> bytes:
    """What a client is told of a frame that was refused; `nonce` is the frame's."""
    return encode(ErrorFrame(error.code, str(error), nonce))


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping (RFC 6455, section 5.5.3)."""
    return b"\x8a" + len(payload).to_bytes(1, "big") + payload


def close_frame(code: int, reason: str) -> bytes:
    """The first or the last half of a closing handshake (RFC 6455, section 5.5.1); 0 is no code."""
    payload = code.to_bytes(2, "big") + reason.encode()[:123] if code else b""
    return b"\x88" + len(payload).to_bytes(1, "big") + payload
