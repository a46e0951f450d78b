"""What is logged when the same thing happens again and again."""

import logging

from tollerchat.logs import Seldom


def record(text, at, *arguments):
    record = logging.LogRecord("tollerchat.test", logging.WARNING, __file__, 1, text, arguments, None)
    record.created = at
    return record


def test_same_message_is_logged_once_a_second_with_how_often_it_came():
    seldom = Seldom()
    told = []
    for n in range(25):
        for text in ("user %d is bad", "channel %d is bad"):
            if seldom.filter(each := record(text, 100 + n / 10, n)):
                told.append(each.getMessage())
    assert told == [
        "user 0 is bad",
        "channel 0 is bad",
        "user 10 is bad (and 9 more like it)",
        "channel 10 is bad (and 9 more like it)",
        "user 20 is bad (and 9 more like it)",
        "channel 20 is bad (and 9 more like it)",
    ]
