"""Faults to inject, with the real thing: a PostgreSQL and a server that die, answers that get lost."""

import asyncio
import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import psycopg2

from tests.support import SECRET, WAIT, Template, psql

__all__ = ("Cluster", "Proxy", "ServerProcess", "Stranger", "in_thread", "running")


async def in_thread(function, *arguments):
    """Run something that blocks, so that the clients of the test live on meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


class Stranger:
    """Another program that inserts one message after the other, as long as the context is open."""

    def __init__(self, database, *, channel_id=1):
        self._insert = lambda content: database.insert(content, channel_id=channel_id)
        self._stop = threading.Event()
        self.ids = []

    async def __aenter__(self):
        self._writing = asyncio.ensure_future(in_thread(self._write))
        return self

    async def __aexit__(self, *_):
        self._stop.set()
        await self._writing

    def _write(self):
        while not self._stop.is_set():
            self.ids += self._insert(f"stranger {len(self.ids)}")


def _until(condition, explain):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.01)


class Cluster:
    """A PostgreSQL of one's own, to be stopped, killed and frozen; made by the programs of the one at `url`."""

    def __init__(self, url, **settings):
        ((bin_dir, data_dir),) = psql(
            url, "SELECT setting, current_setting('data_directory') FROM pg_config WHERE name = 'BINDIR'"
        )
        owner = os.stat(data_dir)  # PostgreSQL refuses to run as root
        self._as = {}
        if os.geteuid() == 0:
            self._as = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        self._directory = Path(tempfile.mkdtemp(prefix="tollerchat-"))  # short: it has the socket too
        os.chown(self._directory, owner.st_uid, owner.st_gid)
        self._bin = Path(bin_dir)
        self._process = None
        # Of the kind that a killed server leaves behind nowhere else.
        memory = {"dynamic_shared_memory_type": "mmap"}
        self._settings = {
            "listen_addresses": "",
            "fsync": "off",
            "max_connections": "20",
            **memory,
            **settings,
        }
        self.url = f"postgresql://postgres@/postgres?host={self._directory}"
        subprocess.run(
            [self._bin / "initdb", "-D", self._directory / "data", "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._directory, **self._as,
        )  # fmt: skip

    def start(self):
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._directory / "data", "-k", self._directory, *options],
                stdout=log, stderr=log, cwd=self._directory, **self._as,
            )  # fmt: skip
        _until(self.answers, lambda: f"PostgreSQL did not start:\n{(self._directory / 'log').read_text()}")

    def answers(self):
        try:
            psql(self.url, "SELECT 1")
        except psycopg2.OperationalError:
            return False
        return True

    def database(self):
        """A fresh database with our schema and the test data; returns its URL."""
        Template.FRESH.create(self.url)
        return self.url.replace("/postgres?", f"/{Template.FRESH.database}?")

    def backends(self):
        return psutil.Process(self._process.pid).children()

    def restart(self):
        self.stop()
        self.start()

    def stop(self):
        """Stop as an operator does: connections are cut, nothing is lost."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(WAIT)

    def kill(self):
        """Kill -9, the postmaster first, so that it restarts nothing."""
        backends = self.backends()
        self._process.kill()
        self._process.wait(WAIT)
        for backend in backends:
            with contextlib.suppress(psutil.NoSuchProcess):
                backend.kill()
        psutil.wait_procs(backends, timeout=WAIT)

    def freeze(self):
        self._process.send_signal(signal.SIGSTOP)
        for backend in self.backends():
            with contextlib.suppress(psutil.NoSuchProcess):
                backend.suspend()

    def thaw(self):
        for backend in self.backends():
            with contextlib.suppress(psutil.NoSuchProcess):
                backend.resume()
        self._process.send_signal(signal.SIGCONT)

    def close(self):
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


def _unix_sockets(proc):
    return {f"socket:[{line.split()[6]}]" for line in (proc / "net/unix").read_text().splitlines()[1:]}


class ServerProcess:
    """`python -m tollerchat` as a process of its own. It keeps its port over restarts.

    It begins with `taken` descriptors already in use, as if by so many connections.
    """

    def __init__(self, db_url, *, taken=0, **settings):
        self._taken = taken
        self._reserved = _reserve_port()
        self.port = self._reserved.getsockname()[1]
        if sys.platform != "linux":
            self._reserved.close()  # it would keep the server out, too
        self._environ = {**os.environ, "DB_URL": db_url, "JWT_SECRET": SECRET, "PORT": str(self.port)}
        self._environ.update({name.upper(): str(value) for name, value in settings.items()})
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._process = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        earlier = len(self.log())
        # Appended to, over a descriptor of its own: it would write to wherever log() is reading.
        with open(self._log.name, "ab") as log, contextlib.ExitStack() as stack:
            taken = [os.dup(log.fileno()) for _ in range(self._taken)]
            for descriptor in taken:
                stack.callback(os.close, descriptor)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tollerchat"],
                env=self._environ, stdout=log, stderr=log, pass_fds=taken,
            )  # fmt: skip

        def listens():
            assert self._process.poll() is None, f"the server did not start:\n{self.log()[earlier:]}"
            return f"listening on {self.url}\n" in self.log()[earlier:]

        _until(listens, lambda: f"the server does not listen:\n{self.log()[earlier:]}")

    def log(self):
        return Path(self._log.name).read_text("utf-8", "replace")

    def complaints(self):
        """What a server never says, whatever happens to it: exceptions nobody caught."""
        return [
            line for line in self.log().splitlines() if re.search(r"Traceback|CRITICAL|never retrieved", line)
        ]

    def signal(self, number):
        self._process.send_signal(number)

    def kill(self):
        self._process.kill()
        self._process.wait(WAIT)

    def wait(self, seconds=WAIT):
        """Wait for the end; returns the exit status."""
        return self._process.wait(seconds)

    def descriptors(self):
        """How many it has open, but for Unix sockets: those are the pool of the database."""
        proc = Path(f"/proc/{self._process.pid}")
        before, links = _unix_sockets(proc), []
        for descriptor in (proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(descriptor))
        unix = before | _unix_sockets(proc)  # some came or went meanwhile
        return sum(link not in unix for link in links)

    def queued(self, clients):
        """For each client: bytes on their way to it, in the kernel's buffers on both sides."""
        queues = {}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, sizes, *_ = line.split()
            ports = int(local.partition(":")[2], 16), int(remote.partition(":")[2], 16)
            queues[ports] = [int(size, 16) for size in sizes.split(":")]
        ports = [client.socket.getsockname()[1] for client in clients]
        return [queues[self.port, port][0] + queues[port, self.port][1] for port in ports]

    def memory(self):
        """Resident bytes."""
        return psutil.Process(self._process.pid).memory_info().rss

    def cpu(self):
        """Seconds of CPU used so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self):
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._log.close()
        self._reserved.close()


def _reserve_port():
    """A socket that is bound and does not listen: a server may listen there, but nobody else is given the port."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


@contextlib.asynccontextmanager
async def running(db_url, **settings):
    """A server process that must not have complained by the time it is left."""
    server = ServerProcess(db_url, **settings)
    try:
        await in_thread(server.start)
        yield server
    finally:
        complaints = server.complaints()
        server.close()
    assert not complaints, complaints


class Proxy:
    """Another socket in front of PostgreSQL's own, that can lose the answer to a commit.

    While `lose` is a text: the next query that contains it is passed on, its answer is awaited, so that
    it is committed, and then the connection is cut instead, and `at_loss` is called. While `down` is true,
    no connection is let in.
    """

    def __init__(self, url, *, tcp=False):
        self._tcp = tcp
        self._path = re.search(r"host=([^&]+)", url)[1].replace("%2F", "/") + "/.s.PGSQL.5432"
        self._database = re.search(r"/(\w+)\?", url)[1]
        self._tasks = set()
        self._reading = {}  # socket of the server under test -> task that reads its queries
        self._said = {}  # the same sockets -> all that came over them
        self._mute = set()
        self.lose = None
        self.lost = 0
        self.at_loss = lambda: None
        self.down = False

    async def __aenter__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="tollerchat-")
        if self._tcp:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self._listener.setblocking(False)
            port = self._listener.getsockname()[1]
            self.url = f"postgresql://postgres@127.0.0.1:{port}/{self._database}"
        else:
            self._listener = _unix_socket()
            self._listener.bind(f"{self._directory.name}/.s.PGSQL.5432")
            self._listener.listen()
            self.url = f"postgresql://postgres@/{self._database}?host={self._directory.name}"
        self._let_in()
        return self

    async def __aexit__(self, *_):
        self._let_nobody_in()
        await self.cut()
        self._directory.cleanup()

    def mute(self, said=""):
        """Pass nothing over the connections that have said this, from now on, and keep them open."""
        self._mute |= {server for server, data in self._said.items() if said.encode() in data}

    async def die_with_query_unread(self):
        """Do as a backend that is terminated while a query waits in its socket: say so, and be gone."""
        reading, self._reading = self._reading, {}
        for task in reading.values():
            task.cancel()
        deadline = time.monotonic() + WAIT
        while not (unread := select.select(list(reading), [], [], 0)[0]):
            assert time.monotonic() < deadline, "no query came"
            await asyncio.sleep(0.001)
        for server in reading:
            if server in unread:
                fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"
                server.send(b"E" + (4 + len(fields)).to_bytes(4, "big") + fields)
            server.close()

    async def cut(self):
        """End all connections, and let new ones in."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refuse(self):
        """End all connections, and refuse new ones, until `listen()`. With TCP only."""
        self._port = self._listener.getsockname()[1]
        self._let_nobody_in()
        await self.cut()

    def listen(self):
        """Let connections in again. With TCP only."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._listener.setblocking(False)
        self._let_in()

    def _start(self, work):
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        return task

    def _let_in(self):
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _let_nobody_in(self):
        if self._listener.fileno() >= 0:  # not yet
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    def _accept(self):
        # Not by a task: one that is cancelled in the same moment would lose the connection.
        with contextlib.suppress(BlockingIOError):
            server, _ = self._listener.accept()
            server.setblocking(False)
            self._start(self._serve(server)).add_done_callback(lambda _: server.close())

    async def _serve(self, server):
        losing = asyncio.Event()
        with _unix_socket() as database, contextlib.suppress(OSError):
            if self.down:
                return
            await asyncio.get_running_loop().sock_connect(database, self._path)
            queries = self._start(self._pass_queries(server, database, losing))
            answers = self._start(self._pass_answers(database, server, losing))
            self._reading[server] = queries
            self._said[server] = b""
            await asyncio.wait([queries, answers], return_when=asyncio.FIRST_COMPLETED)
            if self._reading.pop(server, None) is None:  # it is about to die
                await asyncio.wait([answers])
            del self._said[server]
            for task in (queries, answers):
                task.cancel()
            await asyncio.gather(queries, answers, return_exceptions=True)

    async def _pass_queries(self, server, database, losing):
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(server, 65536):
            self._said[server] += data
            if self.lose and self.lose.encode() in data:
                self.lose = None
                losing.set()
            if server not in self._mute:
                await loop.sock_sendall(database, data)

    async def _pass_answers(self, database, server, losing):
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(database, 65536):
            if losing.is_set():
                self.lost += 1
                self.at_loss()
                return
            if server not in self._mute:
                await loop.sock_sendall(server, data)


def _unix_socket():
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    return sock
