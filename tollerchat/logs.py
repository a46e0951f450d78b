"""Logging: tokens never reach a log, and nobody can flood it."""

import logging
import re

from aiohttp.http import HttpProcessingError

__all__ = ("Seldom", "hide_tokens")

# Strangers write what these are applied to: nothing that one of them repeats may begin where it can go on, or
# their time would grow with the square of the length.
_QUERY = re.compile(r"([?&]([^=&?\s\"']*)=)[^&?\s\"']+")
_JWT = re.compile(r"(?:(?<![\w-])|(?<=%[0-9A-Fa-f]{2}))eyJ[\w-]+\.[\w-]+\.[\w-]*")


def _hide(text: str) -> str:
    return _JWT.sub("***", _QUERY.sub(_hide_value, text))


def _hide_value(pair: re.Match[str]) -> str:
    # A name with an escape in it may be "token", too.
    return f"{pair[1]}***" if pair[2] == "token" or "%" in pair[2] else pair[0]


class _HideTokens(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._bad_requests = Seldom()

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = _hide(record.getMessage())
        record.args = None
        for name in ("first_request_line", "request_header"):  # aiohttp's extras, for structured logs
            if isinstance(value := getattr(record, name, None), str):
                setattr(record, name, _hide(value))
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            # Not our error, and it would quote the request; and anybody can have as many as they like.
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg += f" ({type(error).__name__})"
            record.exc_info = record.exc_text = None
            return self._bad_requests.filter(record)
        if record.exc_info and error is not None:
            record.exc_text = _hide(logging.Formatter().formatException(record.exc_info))
        return True


class Seldom(logging.Filter):
    """Lets the same message through once in ten seconds, and tells how often it was left out."""

    INTERVAL = 10.0  # seconds

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, tuple[float, int]] = {}  # message without its arguments -> when, left out since

    def filter(self, record: logging.LogRecord) -> bool:
        said_at, left_out = self._said.get(record.msg, (0.0, 0))
        if 0 <= record.created - said_at < self.INTERVAL:
            self._said[record.msg] = said_at, left_out + 1
            return False
        self._said[record.msg] = record.created, 0
        if left_out:
            record.msg, record.args = f"{record.getMessage()} (and {left_out} more like it)", None
        return True


_filter = _HideTokens()


def hide_tokens() -> None:
    """Keep tokens, and what else strangers sent, out of aiohttp's logs, whichever application writes them."""
    for name in ("aiohttp.access", "aiohttp.server"):
        logging.getLogger(name).addFilter(_filter)  # adding it again changes nothing
