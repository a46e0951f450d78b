"""One channel, driven through random interleavings of all that can happen to it, against the promises.

Room, Client, Hub and MessageWriter are the real ones. The log is a list whose queries run and answer when the
test says so, or fail; notifications come when the test says so, doubled or not at all; and so do the peers' reads.
"""

import asyncio
import contextlib
import json
import selectors
import socket
import types
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.checker import Log, Row, check
from tests.raw_client import client_frame, unframe
from tests.support import SECRET
from tollerchat import Config, audience, room, tail, websocket, writer
from tollerchat.auth import Identity
from tollerchat.client import Client
from tollerchat.errors import NonceConflict, Unavailable
from tollerchat.hub import Hub
from tollerchat.protocol import MAX_BIGINT, OutgoingMessage
from tollerchat.saving import Saved
from tollerchat.turns import Turns
from tollerchat.websocket import BUFFER_LIMIT, WebSocket
from tollerchat.writer import MessageWriter

HISTORY = 3
CONFIG = Config(
    db_url="postgresql://nowhere/none",
    jwt_secret=SECRET,
    history_size=HISTORY,
    max_in_flight=4,
    store_timeout=1.0,
)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when all wait for it: deterministic, and no test waits."""

    class Selector(selectors.SelectSelector):
        loop = None

        def select(self, timeout=None):
            assert timeout is not None, "everybody waits for ever"
            self.loop.now += timeout
            return super().select(0)

    def __init__(self):
        self.now = 0.0
        selector = self.Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self):
        return self.now


class Query:
    """What was asked of the log. First it is run, then it is answered; in between, or instead, it may fail."""

    def __init__(self, run):
        self.run = run
        self.result = None
        self.has_run = False
        self.answer = asyncio.get_running_loop().create_future()


class FakeRepository:
    """The log as a list, in place of PostgreSQL."""

    def __init__(self):
        self.rows = []
        self.deleted = []
        self.queries = []
        self.orphans = []  # given up by whoever asked, but they may run yet
        self.notifications = []  # ("grown", id) or ("changed", 0)
        self._last_id = 0
        self._restarted = False

    # What the test does

    def insert(self, user_id, content, nonce=None, *, skip=0):
        self._last_id += 1 + skip  # ids have holes
        created_at = f"t{self._last_id}"
        self.rows.append(Row(self._last_id, user_id, content, nonce, created_at))
        self.notifications.append(("grown", self._last_id))
        return self.rows[-1]

    def delete(self, position):
        self.deleted.append(self.rows.pop(position))
        self.notifications.append(("changed", 0))

    def truncate(self):
        for each in (self.rows, self.deleted, self.notifications):
            each.clear()
        self._last_id = 0
        self._restarted = True

    def advance(self, position, outcome):
        """Take one query a step further."""
        query = self.queries[position]
        if query.answer.done():
            self.queries.remove(query)
        elif outcome == "fail":  # it never got to the database, or its answer did not come back
            self.queries.remove(query)
            query.answer.set_exception(Unavailable("failed", sent=query.has_run))
        elif outcome == "time out" and not query.has_run:
            self.queries.remove(query)
            self.orphans.append(query)
            query.answer.set_exception(Unavailable("timed out", sent=True))
        elif not query.has_run:
            query.result, query.has_run = query.run(), True
        else:
            self.queries.remove(query)
            query.answer.set_result(query.result)

    # What the server asks

    async def _ask(self, run):
        query = Query(run)
        self.queries.append(query)
        return await query.answer

    async def load_last_messages(self, channel_id, until, limit):
        return await self._ask(lambda: self._messages(lambda row: row.message_id <= until)[-limit:])

    async def load_messages_after(self, channel_id, after, until, limit):
        return await self._ask(lambda: self._messages(lambda row: after < row.message_id <= until)[:limit])

    async def nth_newest_id(self, channel_id, after, until, n):
        return None  # MAX_REPLAY is more than this test has

    async def refusals(self, pairs):
        return dict.fromkeys(pairs)

    async def unlocked(self, channel_ids):
        return set(channel_ids)

    async def ids_restarted(self, stored, heads):
        restarted, self._restarted = self._restarted, False
        assert restarted or MAX_BIGINT not in heads.values()  # no room is in doubt without a reason
        return restarted

    async def newest_ids(self, channel_ids):
        return await self._ask(lambda: {1: self._newest()})

    async def nonces_of(self, channel_id, message_ids):
        return await self._ask(
            lambda: {
                row.message_id: row.nonce
                for row in self.rows
                if row.nonce is not None and row.message_id in message_ids
            }
        )

    async def save_messages(self, batch, heads):
        return await self._ask(lambda: self._save_all(batch, heads.get(1, 0)))

    def _messages(self, condition):
        return [_message(row) for row in self.rows if condition(row)]

    def _newest(self):
        return self.rows[-1].message_id if self.rows else 0

    def _save_all(self, batch, head):
        unknown = [row.message_id for row in self.rows if row.message_id > head]
        results = []
        for new in batch:
            results.append(self._save(new, max(unknown, default=head)))
            if not isinstance(results[-1], NonceConflict) and not results[-1].repeated:
                unknown.append(results[-1].message.message_id)
        return results

    def _save(self, new, previous):
        for row in self.rows:
            if new.nonce is not None and (row.user_id, row.nonce) == (new.user_id, new.nonce):
                if row.content != new.content:
                    return NonceConflict("other content")
                return Saved(_message(row), repeated=True, previous=0)
        return Saved(
            _message(self.insert(new.user_id, new.content, new.nonce)), repeated=False, previous=previous
        )


def _message(row):
    return OutgoingMessage(row.content, row.user_id, 1, row.message_id, row.created_at)


class Peer:
    """A client's end: descriptor and transport of one `Client`, and what came out of them.

    While it does not read, the system takes a part of what is written, once; the rest waits in the transport's
    buffer, and each byte behind that is one too many.
    """

    def __init__(self, loop, sock, descriptor, name, user_id, after):
        self.log = Log(name, user_id, after=after)
        self._loop = loop
        self._socket = types.SimpleNamespace(
            fileno=lambda: descriptor, setsockopt=sock.setsockopt, getsockopt=sock.getsockopt
        )
        self.reads = True
        self.closed = False
        self.lost = False  # and the server knows
        self.aborted = False  # by the server
        self.flooded = False  # it was sent messages while it read nothing
        self._protocol = None
        self._unsent = []  # before the connection was accepted
        self._buffer = bytearray()
        self._in_system = 0  # so many bytes of the buffer are with the system, the rest is with the transport

    # The descriptor

    def write_directly(self, data):
        assert not self.lost, "written to a descriptor that may be another's"
        assert self.get_write_buffer_size() == 0, "overtook what is in the transport's buffer"
        if self.closed or (not self.reads and self._in_system):
            raise BlockingIOError
        taken = len(data) if self.reads else len(data) // 2
        self._take(data[:taken])
        self._in_system = len(self._buffer)
        return taken

    # The transport

    def set_write_buffer_limits(self, high):
        assert high == BUFFER_LIMIT

    def get_extra_info(self, name, default=None):
        return self._socket if name == "socket" else default

    def is_closing(self):
        return self.closed

    def get_write_buffer_size(self):
        return len(self._buffer) - self._in_system

    def pause_reading(self):
        """What it sends is in no buffer that could be full."""

    def resume_reading(self):
        """See pause_reading()."""

    def write(self, data):
        assert not self.closed, "written to a closed transport"
        is_too_much = self.get_write_buffer_size() > 0
        self._take(data)
        if is_too_much and not self.reads and not self._protocol.full:
            self._protocol.pause_writing()

    def _take(self, data):
        if self._protocol.full and b'"type":"message"' in data:
            self.flooded = True
        self._buffer += data
        if self.reads:
            self.read()

    def abort(self):
        self.aborted = True
        self.hang_up()

    # The protocol

    def connect(self, client):
        self._protocol = WebSocket(self, client, Turns(), max_size=CONFIG.max_frame_size)
        client.start(self._protocol)
        for data in self._unsent:
            self._receive(data)

    def _receive(self, data):
        if not self.closed:
            self._protocol.data_received(data)

    # The peer

    def end_sending(self):
        if self._protocol is not None and not self.closed:
            self._protocol.eof_received()

    def hang_up(self):
        if not self.closed:
            self.closed = True
            if self._protocol is not None:
                self._loop.call_soon(self._lose)

    def _lose(self):
        self._protocol.connection_lost(None)
        self.lost = True

    def send(self, frame):
        self.log.sent(frame)
        data = client_frame(json.dumps(frame).encode())
        if self._protocol is None:
            self._unsent.append(data)
        else:
            self._loop.call_soon(self._receive, data)

    def read(self, frames=None):
        """Read some frames, or all, and from now on all."""
        self.reads = frames is None
        while (parsed := unframe(self._buffer)) is not None and frames != 0:
            opcode, payload, size = parsed
            del self._buffer[:size]
            self._in_system = min(self._in_system, len(self._buffer))
            if opcode == 1:
                self.log.received(json.loads(payload))
            frames = frames and frames - 1
        if self._protocol is not None and self._protocol.full and self.get_write_buffer_size() == 0:
            self._loop.call_soon(self._resume)

    def _resume(self):
        if self._protocol.full and not self.closed and self.get_write_buffer_size() == 0:
            self._protocol.resume_writing()


class Channel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.loop = Loop()
        self.patches = [
            mock.patch.object(room, "PAGE_SIZE", 2),
            mock.patch.object(tail, "MAX_FRAMES", 4),
            mock.patch.object(writer, "time", types.SimpleNamespace(monotonic=self.loop.time)),
            *(
                mock.patch.object(
                    module, "os", types.SimpleNamespace(name="posix", write=self.write_directly)
                )
                for module in (audience, websocket)
            ),
        ]
        for patch in self.patches:
            patch.start()
        self.socket = socket.socket()
        self.repository = FakeRepository()
        self.hub = Hub(CONFIG, self.repository)
        self.writer = MessageWriter(CONFIG, self.repository, self.hub)
        self.descriptors = []  # all peers
        self.peers = []  # those who are connected
        self.logs = []
        self.tasks = [self.loop.create_task(self.writer.run())]
        self.count = 0
        self.last_seen = {}

    def spin(self):
        async def spin():
            for _ in range(25):
                await asyncio.sleep(0)

        self.loop.run_until_complete(spin())

    def pick(self, items, data):
        return data.draw(st.sampled_from(range(len(items))))

    @initialize(rows=st.integers(0, 7))
    def fill(self, rows):
        for n in range(rows):
            self.repository.insert(9, f"old {n}")
        self.repository.notifications.clear()
        for user_id in (1, 1, 2):
            self.enter(user_id, None)
        self.advance_all(2)

    # -- peers ---------------------------------------------------------------------------------------

    @rule(user_id=st.integers(1, 2), after=st.sampled_from(["none", "zero", "last seen", "newest", "beyond"]))
    def join(self, user_id, after):
        newest = self.repository.rows[-1].message_id if self.repository.rows else 0
        ever = max([0, *(row.message_id for row in self.repository.rows + self.repository.deleted)])
        self.enter(user_id, {"none": None, "zero": 0, "newest": newest, "beyond": ever,
                             "last seen": self.last_seen.get(user_id)}[after])  # fmt: skip

    def enter(self, user_id, after):
        async def serve(peer):
            client = Client(CONFIG, self.hub, self.writer, Identity(user_id, float("inf")), 1, v1=True)
            try:
                await client.seek(await self.hub.register(client), after)
            except Unavailable:
                peer.closed = True
                await self.hub.unregister(client)
            else:
                peer.connect(client)

        peer = Peer(self.loop, self.socket, len(self.descriptors), f"peer {len(self.logs)}", user_id, after)
        self.descriptors.append(peer)
        self.tasks.append(self.loop.create_task(serve(peer)))
        self.peers.append(peer)
        self.logs.append(peer.log)
        self.spin()

    def write_directly(self, descriptor, data):
        return self.descriptors[descriptor].write_directly(data)

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), half=st.booleans())
    def leave(self, data, half):
        peer = self.peers.pop(self.pick(self.peers, data))
        seen = [
            frame["message_id"]
            for what, frame in peer.log.events
            if what == "received" and frame["type"] in ("message", "ack")
        ]
        if seen:
            self.last_seen[peer.log.user_id] = max(seen)
        if half:  # it says that it sends no more, and waits
            self.loop.call_soon(peer.end_sending)
            self.spin()
        peer.hang_up()
        self.spin()

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), burst=st.integers(1, 3), steps=st.integers(0, 2), named=st.sampled_from([1, 1, 0]))
    def send(self, data, burst, steps, named):
        """Its messages wait, or are committed without an answer, or have one."""
        peer = self.peers[self.pick(self.peers, data)]
        for _ in range(burst):
            self.count += 1
            nonce = {"nonce": f"n{self.count}"} if named else {}
            peer.send({"type": "message", "content": f"m{self.count}", **nonce})
        self.spin()
        for _ in range(steps):
            if self.repository.queries:
                self.repository.advance(-1, "go on")
                self.spin()

    @precondition(lambda self: self.peers and self.count)
    @rule(data=st.data(), other=st.sampled_from([False, False, True]))
    def send_again(self, data, other):
        """What somebody with the same user id has sent, over the same or another connection; or other content."""
        peer = self.peers[self.pick(self.peers, data)]
        frames = [frame for log in self.logs if log.user_id == peer.log.user_id
                  for what, frame in log.events if what == "sent" and "nonce" in frame]  # fmt: skip
        if frames:
            frame = frames[self.pick(frames, data)]
            # Of two that were never stored, either could be.
            if other and frame["nonce"] in {each.get("nonce") for log in self.logs for each in log.acks()}:
                self.count += 1
                frame = {**frame, "content": f"m{self.count}"}
            peer.send(frame)
        self.spin()

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def type(self, data):
        self.peers[self.pick(self.peers, data)].send({"type": "typing"})
        self.spin()

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def stop_reading(self, data):
        self.peers[self.pick(self.peers, data)].reads = False

    @precondition(lambda self: any(not peer.reads for peer in self.peers))
    @rule(data=st.data(), frames=st.sampled_from([1, 2, None]))
    def read(self, data, frames):
        stalled = [peer for peer in self.peers if not peer.reads]
        stalled[self.pick(stalled, data)].read(frames)
        self.spin()

    # -- the log -------------------------------------------------------------------------------------

    @rule(rows=st.integers(1, 4), skip=st.integers(0, 2))
    def insert(self, rows, skip):
        for _ in range(rows):
            self.count += 1
            self.repository.insert(9, f"foreign {self.count}", skip=skip)

    @precondition(lambda self: any(row.nonce is None for row in self.repository.rows))
    @rule(data=st.data())
    def delete(self, data):
        """A row without a nonce: one that is sent again after its deletion is a new message."""
        positions = [n for n, row in enumerate(self.repository.rows) if row.nonce is None]
        self.repository.delete(positions[self.pick(positions, data)])

    @precondition(lambda self: self.count > 10)
    @rule(heard=st.booleans())
    def truncate(self, heard):
        """Ids start again; what is on its way is of the old log. Only who comes from now on has promises."""
        self.repository.truncate()
        self.compare_with_log(self.hub.resync if heard else self.hub.compare_with_log)
        self.spin()
        for peer in self.peers:
            peer.hang_up()
        self.peers, self.logs, self.last_seen = [], [], {}
        self.spin()

    @precondition(lambda self: self.repository.queries)
    @rule(data=st.data(), outcome=st.sampled_from(["go on", "go on", "go on", "go on", "fail", "time out"]))
    def advance(self, data, outcome):
        self.repository.advance(self.pick(self.repository.queries, data), outcome)
        self.spin()

    @rule(steps=st.integers(1, 12))
    def advance_all(self, steps):
        for _ in range(steps):
            if self.repository.queries:
                self.repository.advance(0, "go on")
                self.spin()

    @precondition(lambda self: len(self.repository.queries) > 1)
    @rule(steps=st.integers(1, 4))
    def overtake(self, steps):
        """The newest query is answered before older ones."""
        for _ in range(steps):
            if self.repository.queries:
                self.repository.advance(-1, "go on")
                self.spin()

    @precondition(lambda self: self.repository.orphans)
    @rule(data=st.data())
    def orphan_runs(self, data):
        self.repository.orphans.pop(self.pick(self.repository.orphans, data)).run()

    # -- the bus -------------------------------------------------------------------------------------

    @precondition(lambda self: self.repository.notifications)
    @rule(data=st.data(), again=st.booleans())
    def notify(self, data, again):
        position = self.pick(self.repository.notifications, data)
        verb, message_id = self.repository.notifications[position]
        if not again:
            del self.repository.notifications[position]
        if verb == "grown":
            self.loop.call_soon(self.hub.hint, 1, message_id)
        else:
            self.loop.call_soon(self.hub.forget, 1)
        self.spin()

    @precondition(lambda self: self.repository.notifications)
    @rule()
    def notify_all(self):
        """The newest first, and older ones later than that."""
        for verb, message_id in reversed(self.repository.notifications):
            notify = self.hub.hint if verb == "grown" else lambda channel_id, _: self.hub.forget(channel_id)
            self.loop.call_soon(notify, 1, message_id)
        self.repository.notifications.clear()
        self.spin()

    @precondition(lambda self: self.repository.notifications)
    @rule()
    def lose_hints(self):
        self.repository.notifications = [
            each for each in self.repository.notifications if each[0] == "changed"
        ]

    @rule()
    def compare(self):
        self.compare_with_log()
        self.spin()

    def compare_with_log(self, compare=None):
        async def try_to():
            with contextlib.suppress(Unavailable):
                await (compare or self.hub.compare_with_log)()

        self.tasks.append(self.loop.create_task(try_to()))

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds):
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.spin()

    # -- the promises --------------------------------------------------------------------------------

    def teardown(self):
        try:
            self.wind_up()
            deleted = self.repository.deleted
            assert (
                wrong := check(self.logs, self.repository.rows, deleted=deleted, history_size=HISTORY)
            ) is None, wrong
        finally:
            for task in self.tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*self.tasks, return_exceptions=True))
            self.loop.close()
            self.socket.close()
            for patch in self.patches:
                patch.stop()

    def wind_up(self):
        """All heals: then each connection gets all there is, and each message its answer."""
        for query in self.repository.orphans:
            query.run()
        for peer in self.peers:
            peer.read()
        for turn in range(30):
            self.spin()
            if turn % 10 == 0:
                self.compare_with_log()
                self.spin()
            while self.repository.queries:
                self.repository.advance(0, "go on")
                self.spin()
            self.loop.run_until_complete(asyncio.sleep(1))
        for task in self.tasks[1:]:
            if task.done() and not task.cancelled():
                task.result()
        for peer in self.peers:
            assert not peer.aborted, f"{peer.log.name} was aborted"
            assert not peer.flooded, f"{peer.log.name} was sent messages while its buffer was full"
            if not peer.closed:
                peer.log.complete = True
                frames = [frame for _, frame in peer.log.events]
                sent = sum(frame["type"] == "message" for what, frame in peer.log.events if what == "sent")
                answers = sum(frame["type"] in ("ack", "error") for frame in frames)
                assert any(frame["type"] == "ready" for frame in frames), f"{peer.log.name} is not ready"
                assert sent == answers, f"{peer.log.name} sent {sent} messages and has {answers} answers"


Channel.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip
TestChannel = Channel.TestCase
