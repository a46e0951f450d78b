"""The long form of the fault-injection tests: `python -m tests.soak [--seconds 600] [--seed N]`.

Clients that never give up talk through a real server process to a real PostgreSQL, while both are killed,
restarted and frozen at random. In the end the checker reads what the clients saw, and the table.
"""

import asyncio
import collections
import contextlib
import json
import random
import time

import aiohttp

from tests.faults import Log, check, in_thread, rows_of
from tests.support import WAIT, token

END = "the end"


class Talker:
    """A client that comes again with `after`, and sends again what has no ack, until it is told to stop.

    `logs` has one entry per connection; `delays` are the seconds from first sending to the ack.
    """

    def __init__(self, session, server, name, user_id=1, *, channel_id=1, pause=0.02, leave=None, window=8):
        self.name = name
        self.logs = []
        self.delays = []
        self.acked = {}  # nonce -> message_id
        self._session = session
        self._server = server
        self._user_id = user_id
        self._channel_id = channel_id
        self._pause = pause  # seconds between messages; None: it only listens
        self._leave = leave  # seconds after which it leaves, to come again
        self._window = window  # messages without ack at a time
        self._open = {}  # nonce -> frame, time of first sending
        self._last = None
        self._talking = True
        self._over = False  # it has seen END
        self._settled = asyncio.Event()
        self._settled.set()
        self._task = asyncio.ensure_future(self._run())

    async def hush(self, seconds=WAIT):
        """Say nothing new; returns when all that was said has its ack."""
        self._talking = False
        await asyncio.wait_for(self._settled.wait(), seconds)

    async def finish(self, seconds=WAIT):
        """Wait for END, which somebody else says last; from then on the last log is complete."""
        done, _ = await asyncio.wait([self._task], timeout=seconds)
        self.logs[-1].complete = True
        if not done:
            await self.cancel()
        else:
            self._task.result()

    async def cancel(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self):
        while not self._over:
            query = "" if self._last is None else f"?after={self._last}"
            url = f"{self._server.url}/ws/channel/{self._channel_id}{query}"
            headers = {"Authorization": f"Bearer {token(self._user_id)}"}
            try:
                async with self._session.ws_connect(
                    url, headers=headers, protocols=["tollerchat.v1"]
                ) as socket:
                    log = Log(f"{self.name}/{len(self.logs)}", self._user_id, after=self._last)
                    self.logs.append(log)
                    await self._converse(socket, log)
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                await asyncio.sleep(0.05)

    async def _converse(self, socket, log):
        talking = None
        leaving = time.monotonic() + self._leave if self._leave else float("inf")
        try:
            while not self._over and time.monotonic() < leaving:
                message = await socket.receive(timeout=self._leave or 4 * WAIT)
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return
                frame = json.loads(message.data)
                log.received(frame)
                self._take(frame)
                if frame["type"] == "ready" and self._pause is not None:
                    talking = asyncio.ensure_future(self._talk(socket, log))
        finally:
            if talking:
                talking.cancel()
                await asyncio.gather(talking, return_exceptions=True)

    def _take(self, frame):
        if frame["type"] == "message":
            self._last = frame["message_id"]
            self._over = frame["content"] == END
        elif frame["type"] == "ack" and frame["nonce"] in self._open:
            self.acked[frame["nonce"]] = frame["message_id"]
            self.delays.append(time.monotonic() - self._open.pop(frame["nonce"])[1])
            if not self._open:
                self._settled.set()
        elif frame["type"] == "error":
            assert frame["code"] == "unavailable", frame

    async def _talk(self, socket, log):
        async def say(frame):
            log.sent(frame)
            await socket.send_str(json.dumps(frame))

        for frame, _ in list(self._open.values()):
            await say(frame)
        again = time.monotonic() + 1
        while True:
            if self._talking and len(self._open) < self._window:
                nonce = f"{self.name}-{len(self.acked) + len(self._open)}"
                frame = {
                    "type": "message",
                    "content": f"{nonce} {'x' * random.randrange(200)}",
                    "nonce": nonce,
                }
                self._open[nonce] = frame, time.monotonic()
                self._settled.clear()
                await say(frame)
            if time.monotonic() > again:  # whatever has no answer yet, and now and then what is under way
                again = time.monotonic() + 1
                for frame, _ in list(self._open.values()):
                    await say(frame)
            await asyncio.sleep(self._pause)


async def say_end(server, session, user_id=8, channel_id=1):
    """Say END, and wait for its ack."""
    talker = Talker(session, server, "end", user_id, channel_id=channel_id, pause=None)
    try:
        headers = {"Authorization": f"Bearer {token(user_id)}"}
        url = f"{server.url}/ws/channel/{channel_id}?after=0"
        async with session.ws_connect(url, headers=headers, protocols=["tollerchat.v1"]) as socket:
            await socket.send_str(json.dumps({"type": "message", "content": END, "nonce": END}))
            while json.loads((await socket.receive(timeout=WAIT)).data)["type"] != "ack":
                pass
        await talker.finish()
        return talker.logs
    finally:
        await talker.cancel()


async def wind_up(talkers, server, session, db_url, *, seconds=WAIT):
    """Let all talkers end, and return the first broken promise, in words."""
    await asyncio.gather(*(talker.hush(seconds) for talker in talkers))
    logs = await say_end(server, session)
    await asyncio.gather(*(talker.finish(seconds) for talker in talkers))
    logs += [log for talker in talkers for log in talker.logs]
    return check(logs, await in_thread(rows_of, db_url))


class Health:
    """Asks `/health` over and over."""

    def __init__(self, session, server):
        self.answers = collections.deque(maxlen=10_000)  # (time asked, status or None)
        self._session = session
        self._server = server
        self._task = asyncio.ensure_future(self._run())

    async def _run(self):
        while True:
            asked, status = time.monotonic(), None
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                async with self._session.get(
                    self._server.url + "/health", timeout=aiohttp.ClientTimeout(4)
                ) as answer:
                    status = answer.status
            self.answers.append((asked, status))
            await asyncio.sleep(0.05)

    def said(self, since, until):
        """All that was answered to what was asked in that time."""
        return {status for asked, status in self.answers if since <= asked <= until}

    async def becomes(self, status, seconds):
        """Wait until it says so; returns how long that took."""
        start = time.monotonic()
        while not (self.answers and self.answers[-1][0] > start and self.answers[-1][1] == status):
            assert time.monotonic() < start + seconds, f"/health did not say {status} within {seconds} s"
            await asyncio.sleep(0.02)
        return time.monotonic() - start

    async def cancel(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
