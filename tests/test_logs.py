"""What is logged when the same thing happens again and again."""

import logging
import time

import pytest
from aiohttp.http_exceptions import BadStatusLine

from tollerchat.logs import Seldom, hide_tokens


def record(text, at, *arguments):
    record = logging.LogRecord("tollerchat.test", logging.WARNING, __file__, 1, text, arguments, None)
    record.created = at
    return record


def test_same_message_is_logged_once_in_ten_seconds_with_how_often_it_came():
    seldom = Seldom()
    told = []
    for n in range(25):
        for text in ("user %d is bad", "channel %d is bad"):
            if seldom.filter(each := record(text, 100 + n, n)):
                told.append(each.getMessage())
    assert told == [
        "user 0 is bad",
        "channel 0 is bad",
        "user 10 is bad (and 9 more like it)",
        "channel 10 is bad (and 9 more like it)",
        "user 20 is bad (and 9 more like it)",
        "channel 20 is bad (and 9 more like it)",
    ]


def test_bad_requests_are_logged_once_however_many_there_are(caplog):
    hide_tokens()
    caplog.set_level(logging.INFO, "aiohttp.server")
    for _ in range(100):
        error = BadStatusLine("GET /?token=a.b.c")
        logging.getLogger("aiohttp.server").error("Error handling request", exc_info=error)
    assert caplog.messages == ["Error handling request (BadStatusLine)"]
    assert "token" not in caplog.text


@pytest.mark.parametrize("text", ["?%", "?", "&%=", "eyJ", "eyJa.", "%3DeyJ", "?token", "%3f"])
def test_hiding_tokens_takes_time_in_proportion(text, caplog):
    """Strangers choose what an access log has of their requests."""
    hide_tokens()
    caplog.set_level(logging.INFO, "aiohttp.access")
    start = time.process_time()
    logging.getLogger("aiohttp.access").info(text * (100_000 // len(text)))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("line", "logged"),
    [
        ("GET /x?token=a.b.c HTTP/1.1", "GET /x?token=*** HTTP/1.1"),
        ("GET /x?a=1?&token=a.b.c&b=2 HTTP/1.1", "GET /x?a=1?&token=***&b=2 HTTP/1.1"),
        ("GET /x?%74oken=abc&after=5 HTTP/1.1", "GET /x?%74oken=***&after=5 HTTP/1.1"),
        ("GET /x?x=1?token=abc HTTP/1.1", "GET /x?x=1?token=*** HTTP/1.1"),
        ("GET /x?token%3DeyJhbGciOiJI.eyJ1c2VyX2.c2lnbmF0 HTTP/1.1", "GET /x?token%3D*** HTTP/1.1"),
        ("GET /eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoxfQ.c2lnbmF0dXJl HTTP/1.1", "GET /*** HTTP/1.1"),
    ],
)
def test_tokens_are_hidden_and_the_rest_is_not(line, logged, caplog):
    hide_tokens()
    caplog.set_level(logging.INFO, "aiohttp.access")
    logging.getLogger("aiohttp.access").info(line)
    assert caplog.messages == [logged]
