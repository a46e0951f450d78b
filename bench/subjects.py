"""What is measured: servers as processes of their own, on one PostgreSQL."""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psycopg2

from bench import machine
from bench.client import Client, client_frame
from bench.generator import Generator
from tollerchat import Config
from tollerchat.auth import issue_token
from tollerchat.database import read_schema
from tollerchat.embedded import run_postgres

__all__ = (
    "CHANNELS",
    "FIRST_MESSAGE",
    "USERS",
    "Cluster",
    "InsertLoop",
    "Obvious",
    "Process",
    "SendLoop",
    "Server",
    "Tollerchat",
)

PYTHON = (sys.executable, "-m")
SECRET = "a secret for benchmarks that is long enough"
# Ids of equal length, so that all frames of a kind have one size.
USERS = range(10_001, 30_001)
CHANNELS = range(1_001, 3_001)
FIRST_MESSAGE = 1_000_000_001

TEST_DATA = f"""
    INSERT INTO users (id, username) SELECT n, 'user' || n FROM generate_series({USERS[0]}, {USERS[-1]}) AS n;
    INSERT INTO channels (id, name) SELECT n, 'room' || n FROM generate_series({CHANNELS[0]}, {CHANNELS[-1]}) AS n;
    ANALYZE"""

# Without triggers and checks (replica): a million rows are there in seconds.
SEED = f"""
    TRUNCATE messages;
    ALTER SEQUENCE messages_id_seq RESTART WITH {FIRST_MESSAGE};
    SET session_replication_role = replica;
    INSERT INTO messages (channel_id, user_id, content)
    SELECT {CHANNELS[0]} + n %% %s, {USERS[0]}, repeat('x', %s) FROM generate_series(0, %s - 1) AS n;
    ANALYZE messages"""


class Cluster:
    """A PostgreSQL with a database for each server, of the same tables and indexes."""

    def __init__(self, url: str, names: Sequence[str]) -> None:
        self.url = url
        self._names = names

    @classmethod
    @contextlib.contextmanager
    def run(cls, *names: str) -> Iterator["Cluster"]:
        directory = Path(tempfile.mkdtemp(prefix="bench-"))
        try:
            with run_postgres(directory) as url:
                cluster = cls(url, names)
                for name in names:
                    cluster.execute(f"CREATE DATABASE {name}")
                    cluster.execute(read_schema(), database=name)
                    cluster.execute(TEST_DATA, database=name)
                    if name != Tollerchat.name:  # the triggers serve it alone; others shall not pay for them
                        cluster.execute("ALTER TABLE messages DISABLE TRIGGER USER", database=name)
                yield cluster
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def database_url(self, name: str) -> str:
        return self.url.replace("/postgres?", f"/{name}?")

    def execute(self, sql: str, *parameters: object, database: str = "postgres") -> object:
        with contextlib.closing(psycopg2.connect(self.database_url(database))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters or None)
                return cursor.fetchone()[0] if cursor.description else None

    def version(self) -> str:
        return str(self.execute("SHOW server_version")).split()[0]

    def seed(self, *, rooms: int, messages: int, size: int, names: Iterable[str] = ()) -> None:
        """Leave exactly `messages` messages, spread over the first `rooms` channels; by default, in all databases."""
        for name in names or self._names:
            self.execute(SEED, rooms, size, messages, database=name)


class Process(contextlib.AbstractContextManager):
    """A process on the server's core, with its accounts, and a generator of its own to load it."""

    name: str

    def __init__(self, *command: str, db_url: str = "") -> None:
        self.port = _free_port()
        environ = {**os.environ, "PORT": str(self.port), "JWT_SECRET": SECRET, "DB_URL": db_url}
        # No pings: they would disturb the count of bytes.
        environ |= {"PING_INTERVAL": "3600", "PONG_TIMEOUT": "7200"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        os.sched_setaffinity(self.process.pid, machine.SERVER_CORE)
        self.generator = Generator(self.port)

    def cpu(self) -> float:
        return machine.cpu_time(self.process.pid)

    def cpu_of(self, work: Callable[[], object]) -> float:
        """Microseconds of CPU that it needs for some work that it is given."""
        before = self.cpu()
        work()
        return (self.cpu() - before) * 1e6

    def closed_loop(self, senders: Sequence[Client], seconds: float, size: int) -> tuple[int, float]:
        """As the generator has it; returns how many messages were answered, and microseconds of CPU for each."""
        before = self.cpu()
        answers = self.generator.closed_loop(senders, seconds, size)
        return answers, (self.cpu() - before) * 1e6 / answers

    def memory(self) -> float:
        return machine.memory(self.process.pid)

    def settle(self) -> None:
        """Wait until it has nothing left to do."""
        for _ in range(200):
            before = self.cpu()
            time.sleep(0.05)
            if self.cpu() - before < 0.002:
                return

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.terminate()
        self.generator.close()
        try:
            self.process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        if kind is not None:
            self.log.seek(0)
            sys.stderr.write(self.log.read().decode(errors="replace")[-4000:])
        self.log.close()

    def wait_until_listening(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as sock:
                if not sock.connect_ex(("127.0.0.1", self.port)):
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(RuntimeError)
                raise RuntimeError("a server did not start")
            time.sleep(0.02)


class Server(Process):
    """A chat server."""

    command: Sequence[str]
    extra_headers = ""
    extra_frames = 0  # beside the history, on joining
    extra_deliveries = 0  # beside all others in the room

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(*self.command, db_url=cluster.database_url(self.name))
        self.wait_until_listening()

    def request(self, channel_id: int, user_id: int, *, after: int | None = None) -> bytes:
        query = "" if after is None else f"?after={after}"
        return (
            f"GET /ws/channel/{channel_id}{query} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{self.extra_headers}"
            f"Authorization: Bearer {_token(user_id)}\r\n\r\n"
        ).encode()

    def marker(self, user_id: int) -> bytes:
        """What the answer to a message of this user has, and nothing else that is sent to this user."""
        raise NotImplementedError

    def join(
        self, channel_id: int, users: Iterable[int], *, history: int, size: int = 1, at_once: int = 32
    ) -> list[Client]:
        """Have users join a channel with `history` messages; they can send messages of `size` bytes."""
        users = list(users)
        requests = [self.request(channel_id, user_id) for user_id in users]
        frame = message_frame(size)
        clients = self.generator.join(requests, history + self.extra_frames, at_once=at_once)
        for client, user_id in zip(clients, users, strict=True):
            client.will_send(frame, self.marker(user_id))
        return clients

    def sizes(self, sender: Client, receiver: Client) -> tuple[int, int]:
        """How many bytes a message is to those who receive it, and to its sender."""
        sender.send()
        sizes = self.generator.wait_for_quiet()
        return sizes[receiver.fd], sizes.get(sender.fd, 0)


class Tollerchat(Server):
    name = "tollerchat"
    command = (*PYTHON, "tollerchat")
    extra_headers = "Sec-WebSocket-Protocol: tollerchat.v1\r\n"
    extra_frames = 1  # ready

    def marker(self, user_id: int) -> bytes:
        return b'{"type":"ack"'


class Obvious(Server):
    name = "obvious"
    command = (*PYTHON, "bench.obvious")
    extra_deliveries = 1  # no acks: senders get their own messages

    def marker(self, user_id: int) -> bytes:
        return b'"user_id": %d,' % user_id


class SendLoop(Process):
    """A bare loop of send(2) to `count` connections, for each byte from its first client; or to groups, in turn."""

    name = "send(2) loop"

    def __init__(self, count: int, size: int, *, groups: int = 1) -> None:
        super().__init__(*PYTHON, "bench.floors", "send", str(count), str(size), str(groups))
        self.process.stdout.readline()  # it listens
        sender = self.generator.connect(1 + groups * count)[0].will_send(b"!")
        self._work = functools.partial(self.generator.one_at_a_time, [sender], count * size)
        self._count = count

    def run(self, messages: int) -> float:
        """Send so many messages to all, one at a time; returns microseconds of CPU per delivery."""
        return self.cpu_of(lambda: [self._work() for _ in range(messages)]) / messages / self._count


class InsertLoop(Process):
    """A bare INSERT ... RETURNING through aiopg, without triggers."""

    name = "bare INSERT"

    def __init__(self, cluster: Cluster, size: int) -> None:
        arguments = map(str, (CHANNELS[0], USERS[0], size))
        super().__init__(
            *PYTHON, "bench.floors", "insert", *arguments, db_url=cluster.database_url("obvious")
        )

    def run(self, count: int) -> list[float]:
        """Insert so many, one after the other; returns the seconds that each took."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))


def message_frame(size: int) -> bytes:
    return client_frame(json.dumps({"type": "message", "content": "x" * size}).encode())


@functools.cache
def _token(user_id: int) -> str:
    return issue_token(user_id, Config(jwt_secret=SECRET), ttl=24 * 3600)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
