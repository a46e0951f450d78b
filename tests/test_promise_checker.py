"""The checker of the fault-injection tests finds each kind of broken promise, and finds none where all were kept."""

import dataclasses

import pytest

from tests.checker import Log, Row, check

ROWS = [Row(n, 1 + n % 2, f"m{n}", f"n{n}", f"t{n}") for n in (1, 2, 3, 5, 8)]  # ids have holes


def message(row, **changes):
    frame = {"type": "message", "channel_id": 1, **dataclasses.asdict(row), **changes}
    del frame["nonce"]
    return frame


def ready(head, gap=False):
    return {"type": "ready", "channel_id": 1, "user_id": 3, "last_message_id": head, "gap": gap}


def ack(row, **changes):
    return {"type": "ack", "nonce": row.nonce, "message_id": row.message_id, **changes}


def send(row):
    return {"type": "message", "content": row.content, "nonce": row.nonce}


def reader(*frames, complete=True, **fields):
    return Log("reader", 3, events=[("received", frame) for frame in frames], complete=complete, **fields)


def sender(row, *frames, **fields):
    """The log of one that sent `row` at once and then received `frames`."""
    events = [("received", ready(0)), ("sent", send(row)), *(("received", frame) for frame in frames)]
    return Log("sender", row.user_id, events=events, **fields)


ALL = [message(row) for row in ROWS]


@pytest.mark.parametrize(
    "log",
    [
        reader(ready(0), *ALL),
        reader(*ALL, ready(8)),
        reader(*ALL[:2], ready(2), *ALL[2:]),
        reader(*ALL[3:], ready(8), after=3),
        reader(ready(8), after=8),
        reader(ready(8), after=4711),
        reader(*ALL[3:], ready(8, gap=True), after=1),
        reader(ready(0), *ALL[:2], complete=False),
        reader(*ALL[:2], complete=False),
        sender(ROWS[2], ALL[0], ALL[1], ack(ROWS[2]), ALL[3], ALL[4], complete=True),
        sender(ROWS[0], ack(ROWS[0]), ack(ROWS[0])),
        sender(ROWS[0], {"type": "error", "code": "unavailable", "message": "", "nonce": "n1"}),
    ],
)
def test_kept_promises_are_not_reported(log):
    assert check([log], ROWS) is None


def test_own_message_from_another_connection_is_not_reported():
    first = sender(ROWS[4])
    second = Log("second", 1, after=5, events=[("received", frame) for frame in (ready(5), ALL[4])])
    second.events += [("sent", send(ROWS[4])), ("received", ack(ROWS[4]))]
    assert check([first, second], ROWS) is None


def test_deleted_rows_may_be_received_and_may_be_missing():
    with_it, without = reader(*ALL, ready(8)), reader(*ALL[:2], *ALL[3:], ready(8))
    assert check([with_it, without], ROWS[:2] + ROWS[3:], deleted=[ROWS[2]]) is None


def test_history_may_start_late_only_when_it_is_full():
    late = reader(*ALL[2:], ready(8))
    assert check([late], ROWS, history_size=3) is None
    assert "gap: reader never received 1" in check([late], ROWS, history_size=4)


@pytest.mark.parametrize(
    ("violation", "log"),
    [
        ("lost message: sender has the ack of 9", sender(Row(9, 1, "m9", "n9"), ack(Row(9, 1, "m9", "n9")))),
        ("lost message: sender has the ack of 9", sender(Row(9, 1, "m9"), ack(Row(9, 1, "m9")))),
        ("wrong ack: sender was told that 'n1' is 3", sender(ROWS[0], ack(ROWS[2], nonce="n1"))),
        ("duplicate frame: reader received 2 twice", reader(ready(0), ALL[0], ALL[1], ALL[1])),
        ("duplicate frame: reader received 1 twice", reader(*ALL, ready(8), ALL[0])),
        ("duplicate frame: reader resumed after 3 and received 3", reader(*ALL[2:], ready(8), after=3)),
        ("inversion: reader received 2 after 3", reader(ready(0), ALL[0], ALL[2], ALL[1])),
        ("inversion: reader received 8 after 8", reader(ready(8), ALL[4], after=5)),
        ("inversion: reader was told the head 3", reader(*ALL, ready(3))),
        ("gap: reader never received 2", reader(ready(0), ALL[0], *ALL[2:])),
        ("gap: reader never received 2", reader(ALL[0], *ALL[2:], ready(8))),
        ("gap: reader never received 8", reader(ready(0), *ALL[:4])),
        ("gap: reader never received 8", reader(*ALL[:4], ready(8), complete=False)),
        ("gap: reader never received 5", reader(ALL[4], ready(8), after=3)),
        ("gap: reader never received 5", reader(ready(8), after=3)),
        ("gap: reader never received 1", reader(ready(8))),
        ("own message: sender received 3", sender(ROWS[2], ack(ROWS[2]), ALL[2])),
        ("own message: sender received 3", sender(ROWS[2], ALL[2])),
        ("phantom: reader received 9", reader(ready(8), message(Row(9, 1, "m9")), after=8)),
        ("wrong frame: reader received", reader(ready(0), message(ROWS[0], content="other"))),
        ("wrong frame: reader received", reader(ready(0), message(ROWS[0], user_id=7))),
        ("wrong frame: reader received", reader(ready(0), message(ROWS[0], created_at="later"))),
    ],
)
def test_violation_is_told_in_words(violation, log):
    assert violation in (check([log], ROWS) or "nothing")


def test_duplicate_row_is_told():
    assert "duplicate row: 1 and 9" in check([], [*ROWS, Row(9, ROWS[0].user_id, "m1", None)])
    assert "duplicate row: 1 and 9" in check([], [*ROWS, Row(9, ROWS[0].user_id, "m9", "n1")])


def test_own_message_is_told_after_its_ack_even_if_another_connection_sent_it_too():
    first, second = sender(ROWS[4]), sender(ROWS[4], *ALL[:4], ack(ROWS[4]), ALL[4])
    assert "own message: sender received 8" in check([first, second], ROWS)
