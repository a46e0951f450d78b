"""The checker: reads what the clients saw, and the table, and tells the first broken promise."""

import collections
import dataclasses

from tests.support import psql

__all__ = ("Log", "Row", "check", "rows_of")


@dataclasses.dataclass
class Row:
    message_id: int
    user_id: int
    content: str
    nonce: str = None
    created_at: str = None


def rows_of(url, channel_id=1):
    """The table, in the order of ids."""
    time_of = """to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
    sql = f"SELECT id, user_id, content, nonce, {time_of} FROM messages WHERE channel_id = %s ORDER BY id"
    return [Row(*row) for row in psql(url, sql, channel_id)]


@dataclasses.dataclass
class Log:
    """What one connection at level tollerchat.v1 sent and received. A client that comes again starts a new one.

    `events` are ("sent" | "received", frame) in order; `complete` is true where the connection was given
    the time to receive all there was in the end. Each message has a content of its own.
    """

    name: str
    user_id: int
    after: int = None
    events: list = dataclasses.field(default_factory=list)
    complete: bool = False

    def sent(self, frame):
        self.events.append(("sent", frame))

    def received(self, frame):
        self.events.append(("received", frame))

    def acks(self):
        """The acks it received."""
        return [frame for what, frame in self.events if what == "received" and frame["type"] == "ack"]

    def contents(self):
        """What it sent."""
        return {
            frame["content"] for what, frame in self.events if what == "sent" and frame["type"] == "message"
        }


def check(logs, rows, *, deleted=(), history_size=50):
    """The first broken promise, in words; None if all were kept.

    `rows` are the table, `deleted` are those that were in it once: they need not be received, but may be.
    """
    return next(_violations(logs, rows, deleted, history_size), None)


def _violations(logs, rows, deleted, history_size):
    yield from _wrong_rows([*rows, *deleted])
    known = {row.message_id: row for row in [*rows, *deleted]}
    senders = collections.defaultdict(set)  # (user, content) -> which connections sent it
    for log in logs:
        for content in log.contents():
            senders[log.user_id, content].add(id(log))
    for log in logs:
        yield from _wrong_acks(log, known)
    for log in logs:
        yield from _wrong_frames(log, known, senders)
        yield from _gaps(log, rows, history_size)


def _wrong_rows(rows):
    seen = {}
    for row in rows:
        for key in [
            ("content", row.user_id, row.content),
            ("nonce", row.user_id, row.nonce or row.message_id),
        ]:
            if seen.setdefault(key, row.message_id) != row.message_id:
                yield f"duplicate row: {seen[key]} and {row.message_id} are the same message, {row.content!r}"


def _wrong_acks(log, known):
    contents = collections.defaultdict(set)
    for what, frame in log.events:
        if what == "sent" and frame["type"] == "message":
            contents[frame.get("nonce")].add(frame["content"])
        if what == "sent" or frame["type"] != "ack":
            continue
        nonce, message_id = frame["nonce"], frame["message_id"]
        row = known.get(message_id)
        if row is None:
            yield f"lost message: {log.name} has the ack of {message_id}, which is not in the table"
        elif nonce is not None and (row.user_id != log.user_id or row.content not in contents[nonce]):
            yield f"wrong ack: {log.name} was told that {nonce!r} is {message_id}, which is {row.content!r}"


def _wrong_frames(log, known, senders):
    last, head, passed, seen, mine, acked = log.after or 0, 0, 0, set(), set(), set()
    for what, frame in log.events:
        if what == "sent":
            mine.add(frame.get("content"))
        elif frame["type"] == "ack":
            acked.add(frame["message_id"])
            passed = max(passed, frame["message_id"])
        elif frame["type"] == "ready":
            head = frame["last_message_id"]
            if seen and last > head:
                yield f"inversion: {log.name} was told the head {head} after it had received {last}"
        elif frame["type"] == "message":
            message_id, user_id, content = frame["message_id"], frame["user_id"], frame["content"]
            row = known.get(message_id)
            # What other connections sent too may come from one of them, until it is acked here.
            only_mine = content in mine and senders[user_id, content] == {id(log)}
            if row is None:
                yield f"phantom: {log.name} received {message_id}, which is not in the table"
            elif row != Row(message_id, user_id, content, row.nonce, row.created_at and frame["created_at"]):
                yield f"wrong frame: {log.name} received {frame}, but the row is {row}"
            if message_id in seen:
                yield f"duplicate frame: {log.name} received {message_id} twice"
            elif message_id <= (log.after or 0):
                yield f"duplicate frame: {log.name} resumed after {log.after} and received {message_id}"
            elif message_id < last or message_id <= head:
                yield f"inversion: {log.name} received {message_id} after {max(last, head)}"
            elif message_id < passed:
                yield f"inversion: {log.name} received {message_id} after the ack of {passed}"
            elif user_id == log.user_id and (message_id in acked or only_mine):
                yield f"own message: {log.name} received {message_id}, which it sent itself"
            seen.add(message_id)
            last = message_id


def _gaps(log, rows, history_size):
    received = [frame for what, frame in log.events if what == "received"]
    seen = {frame["message_id"] for frame in received if frame["type"] == "message"}
    kinds = [frame["type"] for frame in received]
    ready = received[kinds.index("ready")] if "ready" in kinds else None
    history = kinds[: kinds.index("ready")].count("message") if ready else None
    start, end = log.after or 0, max(seen, default=0)
    if ready or log.after is not None:
        end = max([end, *(frame["message_id"] for frame in log.acks())])
    if ready:
        end = max(end, ready["last_message_id"])
    in_full = ready and not ready["gap"] and (log.after is not None or history < history_size)
    if seen and not in_full and (log.after is None or ready):
        start = min(seen) - 1  # what is older was not asked for
    if log.complete:
        end = max([end, *(row.message_id for row in rows)])
    mine = log.contents()
    for row in rows:
        own = row.user_id == log.user_id and row.content in mine
        if start < row.message_id <= end and row.message_id not in seen and not own:
            yield f"gap: {log.name} never received {row.message_id}, though it has all from {start + 1} to {end}"
            return
