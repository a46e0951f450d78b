"""The long form of the fault-injection tests: `python -m tests.soak [--seconds 600] [--seed N]`.

Clients that never give up talk through a real server process to a real PostgreSQL, while both are killed,
restarted and frozen at random. In the end the checker reads what the clients saw, and the table.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil

from tests.checker import Log, check, rows_of
from tests.faults import Cluster, ServerProcess, in_thread
from tests.raw_client import RawClient
from tests.support import WAIT, psql, token, until
from tollerchat.embedded import run_postgres

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
            self._last = max(self._last or 0, frame["message_id"])
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
        again = time.monotonic() + 0.25
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
                again = time.monotonic() + 0.25
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


class Soak:
    """Everything at once: talkers, stalled readers, strangers who write, and one fault after the other."""

    def __init__(self, cluster, db_url, seed):
        self._cluster = cluster
        self._db_url = db_url
        self._random = random.Random(seed)
        self._server = ServerProcess(
            db_url, db_timeout=2, store_timeout=4, shutdown_timeout=5, write_timeout=3, max_replay=200_000
        )
        self._counts = collections.Counter()
        self._strange = 0
        self._stalled = []  # logs of those who stop reading

    async def run(self, seconds):
        """Returns the first broken promise, in words; None if all were kept."""
        await in_thread(self._server.start)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            talkers = [
                Talker(session, self._server, f"t{n}", 1 + n % 5, pause=0.02 + n / 200) for n in range(12)
            ]
            talkers += [
                Talker(session, self._server, f"g{n}", 6, pause=None, leave=0.2 + n / 3) for n in range(4)
            ]
            health = Health(session, self._server)
            try:
                await until(lambda: all(talker.acked for talker in talkers[:12]))
                if wrong := await self._long_replay(talkers):
                    return wrong
                end = time.monotonic() + seconds
                faults = [name for name in dir(self) if name.startswith("fault_")]
                while time.monotonic() < end:
                    name = self._random.choice(faults)
                    self._counts[name] += 1
                    print(f"{end - time.monotonic():6.1f} s left: {name[6:].replace('_', ' ')}", flush=True)
                    await getattr(self, name)()
                    if wrong := await self._heals(talkers, health):
                        return wrong
                wrong = await wind_up(talkers, self._server, session, self._db_url, seconds=60)
                return wrong or self._complaints() or await self._check_stalled()
            finally:
                await asyncio.gather(health.cancel(), *(talker.cancel() for talker in talkers))
                self._server.close()
                print(f"faults: {dict(self._counts)}; {sum(len(t.acked) for t in talkers)} messages acked, "
                      f"{sum(len(t.logs) for t in talkers)} connections", flush=True)  # fmt: skip

    async def _long_replay(self, talkers):
        """100,000 missing messages are sent, while neither the server's memory nor the others notice."""
        sql = """INSERT INTO messages (channel_id, user_id, content)
            SELECT 2, 9, 'missed ' || n FROM generate_series(1, 100000) AS n"""
        await in_thread(psql, self._db_url, sql)
        memory, delays = self._server.memory(), sum(len(talker.delays) for talker in talkers)
        log = Log("long replay", 8, after=0, complete=True)
        client = await RawClient.connect(self._server.port, 8, 2, after=0, buffer=1 << 16)
        while not log.events or log.events[-1][1]["type"] != "ready":
            log.received(await client.frame())
        client.close()
        grown = (self._server.memory() - memory) / (1 << 20)
        during = max(delay for talker in talkers for delay in talker.delays[-50:])
        delays = sum(len(talker.delays) for talker in talkers) - delays
        print(
            f"100,000 messages replayed: memory {grown:+.1f} MiB, the slowest of {delays} acks took {during:.3f} s"
        )
        if grown > 16 or during > 1:
            return "a long replay was noticed by others"
        assert not log.events[-1][1]["gap"]
        return check([log], await in_thread(rows_of, self._db_url, 2))

    async def _heals(self, talkers, health):
        """After each fault, the server serves again by itself within 2 s."""
        start = time.monotonic()
        talking = [talker for talker in talkers if talker.name.startswith("t")]
        acked = [len(talker.acked) for talker in talking]
        while time.monotonic() < start + 2:
            if (
                all(len(talker.acked) > before for talker, before in zip(talking, acked, strict=False))
                and health.answers[-1][1] == 200
            ):
                print(f"         healed within {time.monotonic() - start:.2f} s", flush=True)
                return None
            await asyncio.sleep(0.02)
        silent = [
            talker.name for talker, before in zip(talking, acked, strict=False) if len(talker.acked) == before
        ]
        return f"not healed after 2 s: no acks for {silent}, /health says {health.answers[-1][1]}"

    async def _check_stalled(self):
        return check(self._stalled, await in_thread(rows_of, self._db_url))

    def _complaints(self):
        complaints = self._server.complaints()
        return f"the server complained: {complaints[0]}" if complaints else None

    async def _stall(self, low, high):
        await asyncio.sleep(self._random.uniform(low, high))

    # -- the faults ----------------------------------------------------------------------------------

    async def fault_none(self):
        await self._stall(0.5, 2)

    async def fault_server_killed(self):
        self._server.kill()
        await self._stall(0, 1)
        await in_thread(self._server.start)

    async def fault_server_stopped(self):
        self._server.signal(signal.SIGTERM)
        assert await in_thread(self._server.wait, 6) == 0
        await in_thread(self._server.start)

    async def fault_database_restarted(self):
        await in_thread(self._cluster.restart)

    async def fault_database_killed(self):
        await in_thread(self._cluster.kill)
        await self._stall(0, 5)
        await in_thread(self._cluster.start)

    async def fault_database_frozen(self):
        self._cluster.freeze()
        await self._stall(0.5, 20)
        self._cluster.thaw()

    async def fault_backends_killed(self):
        for process in self._random.sample(backends := self._cluster.backends(), k=len(backends) // 2):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await in_thread(self._wait_for_database)

    def _wait_for_database(self):
        deadline = time.monotonic() + WAIT
        while not self._cluster.answers():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    async def fault_connections_terminated(self):
        for _ in range(self._random.randrange(1, 10)):
            sql = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tollerchat'"
            )
            await in_thread(psql, self._db_url, sql)
            await self._stall(0, 0.2)

    async def fault_strangers_write(self):
        sql = """INSERT INTO messages (channel_id, user_id, content)
            SELECT 1, 9, 'stranger ' || n FROM generate_series(%s, %s) AS n"""
        for _ in range(20):
            count = self._random.choice([1, 5, 300])
            await in_thread(psql, self._db_url, sql, self._strange, self._strange + count - 1)
            self._strange += count
            await self._stall(0, 0.05)

    async def fault_channel_locked(self):
        """A transaction that takes its time."""
        sql = "BEGIN; INSERT INTO messages (channel_id, user_id, content) VALUES (1, 9, 'slow ' || %s); SELECT pg_sleep(%s); COMMIT"
        self._strange += 1
        await in_thread(psql, self._db_url, sql, self._strange, self._random.uniform(0.1, 3))

    async def fault_readers_stall(self):
        """Some read nothing while there is a lot to read, and then all of it, or are closed."""
        rows = await in_thread(rows_of, self._db_url)
        after = rows[max(0, len(rows) - 3000)].message_id if rows else 0
        stalled = []
        for _n in range(5):
            log = Log(f"stalled {len(self._stalled)}", 7, after=after)
            self._stalled.append(log)
            stalled.append((await RawClient.connect(self._server.port, 7, after=after), log))
        for _n in range(200):
            sql = "INSERT INTO messages (channel_id, user_id, content) VALUES (1, 9, %s)"
            self._strange += 1
            await in_thread(psql, self._db_url, sql, f"large {self._strange} {'x' * 8000}")
        await self._stall(0, 6)
        for client, log in stalled:
            for _ in range(self._random.randrange(5000)):
                with contextlib.suppress(asyncio.TimeoutError):
                    if (frame := await client.frame(seconds=1)) is not None:
                        log.received(frame)
                        continue
                break
            client.close()


def main(argv=None):
    parser = argparse.ArgumentParser(description="The long form of the fault-injection tests.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}: repeat with --seed {arguments.seed}", flush=True)
    random.seed(arguments.seed)
    # Only its programs are of interest; a directory of its own, which PostgreSQL must be able to write to.
    directory = tempfile.mkdtemp(prefix="tollerchat-")
    with run_postgres(Path(directory)) as url:
        cluster = Cluster(url)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        cluster.start()
        soak = Soak(cluster, cluster.database(), arguments.seed)
        wrong = asyncio.run(asyncio.wait_for(soak.run(arguments.seconds), arguments.seconds + 180))
    finally:
        cluster.close()
    print(f"FAILED with seed {arguments.seed}: {wrong}" if wrong else "all promises were kept", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
