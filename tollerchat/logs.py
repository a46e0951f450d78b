"""Logging: tokens never reach a log."""

import logging
import re

__all__ = ("hide_tokens",)

_TOKEN = re.compile(r"([?&]token=)[^&\s\"']+")


class _HideTokens(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = _TOKEN.sub(r"\1***", record.getMessage())
        record.args = None
        for name in ("first_request_line", "request_header"):  # aiohttp's extras, for structured logs
            if isinstance(value := getattr(record, name, None), str):
                setattr(record, name, _TOKEN.sub(r"\1***", value))
        return True


_filter = _HideTokens()


def hide_tokens() -> None:
    """Keep `?token=` out of aiohttp's access log, whichever application writes it."""
    logging.getLogger("aiohttp.access").addFilter(_filter)  # adding it again changes nothing
