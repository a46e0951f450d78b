"""Domain exceptions: what can go wrong in a chat, each with its code and HTTP status (docs/protocol.md)."""

from typing import ClassVar

__all__ = (
    "BadRequest",
    "ChannelLocked",
    "ChatError",
    "ConfigError",
    "EmptyContent",
    "Forbidden",
    "InvalidContent",
    "InvalidFrame",
    "InvalidJson",
    "InvalidNonce",
    "NonceConflict",
    "NotFound",
    "NotStored",
    "Unauthorized",
    "Unavailable",
    "UnknownType",
    "UpgradeRequired",
)


class ConfigError(Exception):
    """A setting is missing or wrong; the text is one line and names the remedy."""


class ChatError(Exception):
    """A request or frame that is refused; `str()` is the message shown to the client."""

    code: ClassVar[str]
    status: ClassVar[int] = 400
    nonce: str | None = None  # of the frame, where it was refused as such


class BadRequest(ChatError):
    code = "bad_request"


class UpgradeRequired(ChatError):
    code = "upgrade_required"
    status = 426


class Unauthorized(ChatError):
    code = "unauthorized"
    status = 401


class Forbidden(ChatError):
    code = "forbidden"
    status = 403


class NotFound(ChatError):
    code = "not_found"
    status = 404


class Unavailable(ChatError):
    """The database or the server cannot serve this now.

    `sent` is true where a query may have reached the database and its answer was lost.
    """

    code = "unavailable"
    status = 503

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent


class ChannelLocked(Unavailable):
    """Another transaction holds the channel: nothing was stored, and other channels are not concerned."""


class NotStored(ChatError):
    """The database did not take this message, and may do so later; others are not concerned."""

    code = "unavailable"
    status = 503


class NonceConflict(ChatError):
    code = "nonce_conflict"
    status = 409


class InvalidJson(ChatError):
    code = "invalid_json"


class InvalidFrame(ChatError):
    code = "invalid_frame"


class UnknownType(ChatError):
    code = "unknown_type"


class EmptyContent(ChatError):
    code = "empty_content"


class InvalidContent(ChatError):
    code = "invalid_content"


class InvalidNonce(ChatError):
    code = "invalid_nonce"
