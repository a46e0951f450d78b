"""What tests speak with: a database, a server, and a chat client."""

import asyncio
import contextlib
import enum
import json
import time

import aiohttp
import jwt
import psycopg2
from aiohttp import web

from tollerchat import create_app
from tollerchat.app import RUNNER_OPTIONS
from tollerchat.database import read_schema

SECRET = "a secret that is long enough for HS256"
WAIT = 10  # seconds, the bound on everything a test waits for

# The tables of the original, word for word.
SEED_DDL = """
    CREATE TABLE users (id SERIAL PRIMARY KEY, username TEXT NOT NULL);
    CREATE TABLE channels (id SERIAL PRIMARY KEY, name TEXT NOT NULL);
    CREATE TABLE messages (
        id SERIAL PRIMARY KEY,
        channel_id INT REFERENCES channels(id) ON DELETE CASCADE,
        user_id INT REFERENCES users(id) ON DELETE CASCADE,
        content TEXT NOT NULL,
        created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
    );
    CREATE TABLE channel_users (
        user_id INT NOT NULL REFERENCES users(id) ON DELETE CASCADE,
        channel_id INT NOT NULL REFERENCES channels(id) ON DELETE CASCADE,
        role TEXT NOT NULL DEFAULT 'member'
    )"""

# Users 1 to 9; channels 1 and 2 for everybody, 3 for users 1 and 2 alone.
TEST_DATA = """
    INSERT INTO users (username) SELECT 'user' || n FROM generate_series(1, 9) AS n;
    INSERT INTO channels (name) VALUES ('general'), ('other'), ('private');
    INSERT INTO channel_users (user_id, channel_id) VALUES (1, 3), (2, 3);
    UPDATE channels SET is_private = true WHERE id = 3"""


def psql(url, sql, *parameters):
    """Run SQL on a connection of its own, as another program would; returns the rows, if any."""
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(sql, parameters or None)
        return cursor.fetchall() if cursor.description else None


class Template(enum.Enum):
    FRESH = "fresh"
    SEED = "seed"

    @property
    def database(self):
        return f"template_{self.value}"

    def create(self, url):
        psql(url, f"CREATE DATABASE {self.database}")
        url = url.replace("/postgres?", f"/{self.database}?")
        if self is Template.SEED:
            psql(url, SEED_DDL)
        psql(url, read_schema())
        psql(url, TEST_DATA)


class Database:
    def __init__(self, connection, url):
        self._connection = connection
        self.url = url

    def execute(self, sql, *parameters):
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else None

    def insert(self, *contents, channel_id=1, user_id=9):
        """Insert messages the way another service would; returns their ids."""
        sql = "INSERT INTO messages (channel_id, user_id, content) VALUES (%s, %s, %s) RETURNING id"
        return [self.execute(sql, channel_id, user_id, content)[0][0] for content in contents]

    def contents(self, channel_id=1):
        rows = self.execute("SELECT content FROM messages WHERE channel_id = %s ORDER BY id", channel_id)
        return [content for (content,) in rows]


def token(user_id=1, *, secret=SECRET, algorithm="HS256", **claims):
    """A token; claims that are None are left out."""
    claims = {"user_id": user_id, "exp": int(time.time()) + 3600, **claims}
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, secret, algorithm=algorithm)


async def until(condition):
    """Wait until `condition()` is true, and fail if that takes too long."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


class Chatter:
    """A chat client of a test."""

    def __init__(self, socket):
        self.socket = socket
        self.ready = None

    async def send(self, content, **fields):
        await self.send_frame({"type": "message", "content": content, **fields})

    async def send_frame(self, frame):
        await self.socket.send_str(frame if isinstance(frame, str) else json.dumps(frame))

    async def receive(self):
        """The next frame, decoded; fails on anything else than a text frame."""
        message = await self.socket.receive(timeout=WAIT)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        return json.loads(message.data)

    async def receive_many(self, count):
        return [await self.receive() for _ in range(count)]

    async def receive_contents(self, count):
        """The contents of the next frames, which must all be messages."""
        frames = await self.receive_many(count)
        assert {frame["type"] for frame in frames} <= {"message"}, frames
        return [frame["content"] for frame in frames]

    async def closed(self):
        """Skip to the end of the connection; returns the close code."""
        while (await self.socket.receive(timeout=WAIT)).type in (
            aiohttp.WSMsgType.TEXT,
            aiohttp.WSMsgType.PING,
        ):
            pass
        return self.socket.close_code

    async def settled(self):
        """All that the server had to say before this call, as decoded frames.

        A frame that is answered with an error marks the end: answers come in order.
        """
        mark = f"unknown-{id(self)}-{time.monotonic_ns()}"
        await self.send_frame({"type": mark})
        frames = []
        while True:
            frame = await self.receive()
            if frame["type"] == "error" and frame["code"] == "unknown_type":
                return frames
            frames.append(frame)


class Server:
    """A running server."""

    def __init__(self, app, url, session, port):
        self.app = app
        self.url = url
        self.session = session
        self.port = port
        self._sockets = []  # of all clients: they live as long as the server, unless they are closed

    @classmethod
    @contextlib.asynccontextmanager
    async def run(cls, config, *, app=None, prefix="", port=0, tls=None):
        runner = web.AppRunner(app or create_app(config), shutdown_timeout=1, **RUNNER_OPTIONS)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
            host, port = runner.addresses[0]
            async with aiohttp.ClientSession() as session:
                server = cls(runner.app, f"http{'s' if tls else ''}://{host}:{port}{prefix}", session, port)
                try:
                    yield server
                finally:
                    for socket in server._sockets:
                        socket._response.close()  # not with a handshake: some are stuck
        finally:
            await runner.cleanup()

    async def connect(self, user_id=1, channel_id=1, *, v1=False, after=None, **options):
        """Open a channel as a user; returns after the upgrade, with history still to be read."""
        query = "" if after is None else f"?after={after}"
        self._sockets.append(
            await self.session.ws_connect(
                f"{self.url}/ws/channel/{channel_id}{query}",
                headers={"Authorization": f"Bearer {token(user_id)}"},
                protocols=("tollerchat.v1",) if v1 else (),
                autoping=options.pop("autoping", True),
                **options,
            )
        )
        return Chatter(self._sockets[-1])

    async def join(self, user_id=1, channel_id=1, *, after=None):
        """Open a channel at level tollerchat.v1, read up to `ready`; returns the client and its history."""
        chatter = await self.connect(user_id, channel_id, v1=True, after=after)
        history = []
        while (frame := await chatter.receive())["type"] != "ready":
            history.append(frame)
        chatter.ready = frame
        return chatter, history

    async def get(self, path, **options):
        """Status, headers and JSON of a GET request."""
        async with self.session.get(self.url + path, **options) as response:
            return response.status, response.headers, await response.json()
