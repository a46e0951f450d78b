"""The load generator: raw sockets, one epoll, one large buffer.

It must cost less than what it measures. So client frames are made and masked ahead, and what the server
sends is counted in bytes: ids are seeded to have the same number of digits throughout, so all frames of
a kind are of one size. Only while joining are frames counted, by their headers.
"""

import contextlib
import errno
import itertools
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence

from bench.client import Client, Refused

__all__ = ("Generator",)

TIMEOUT = 20.0  # seconds of silence after which a measurement has failed
PATIENCE = (0.3, 1.0)  # seconds after which a client tries again to connect
JOIN_TIMEOUT = 120.0  # seconds
QUIET = 0.15  # seconds of silence that end an answer of unknown size
BUFFER_SIZE = 1 << 20
IP_BIND_ADDRESS_NO_PORT = 24  # <linux/in.h>; the socket module does not have it everywhere
MAX_MARKER = 64


class Generator:
    """All connections of one subject."""

    def __init__(self, port: int) -> None:
        self.clients: set[Client] = set()
        self.refused = 0  # attempts to join that had to be repeated because the server said so
        self._address = ("127.0.0.1", port)
        self._epoll = select.epoll()
        self._receive: dict[int, Callable[[bytearray | memoryview], int]] = {}  # recv_into by descriptor
        self._buffer = bytearray(MAX_MARKER + BUFFER_SIZE)
        self._opened = 0

    def close(self) -> None:
        """Drop all connections."""
        self.drop(list(self.clients))

    def drop(self, clients: Iterable[Client]) -> None:
        """Drop connections."""
        for client in clients:
            self.clients.remove(client)
            client.sock.close()

    # -- joining -----------------------------------------------------------------------------------

    def join(self, requests: Iterable[bytes], frames: int, *, at_once: int = 32) -> list[Client]:
        """Open a connection per request; returns when each has its upgrade and `frames` frames."""
        clients = [Client(request, frames) for request in requests]
        waiting = iter(clients)
        joining: dict[int, Client] = {}
        connecting: dict[int, float] = {}  # deadlines by descriptor

        def start(client: Client) -> None:
            self._open(client)
            self.clients.add(client)
            joining[client.fd] = client
            connecting[client.fd] = time.perf_counter() + random.uniform(*PATIENCE)

        def restart(fd: int) -> None:
            connecting.pop(fd, None)
            client = joining.pop(fd)
            client.sock.close()
            start(client)

        end = time.perf_counter() + JOIN_TIMEOUT
        for client in itertools.islice(waiting, at_once):
            start(client)
        while joining:
            for fd, event in self._epoll.poll(0.1) if connecting else self._events():
                if (client := joining.get(fd)) is None:
                    raise AssertionError("a client got more frames than its history has")
                if event & select.EPOLLOUT:
                    del connecting[fd]
                    client.sock.send(client.request)
                    self._epoll.modify(fd, select.EPOLLIN)
                    continue
                try:
                    joined = client.joined(self._read(fd))
                except (Refused, ConnectionResetError):  # which is how a kernel refuses whose backlog is full
                    self.refused += 1
                    restart(fd)
                    continue
                if joined:
                    del joining[fd]
                    for successor in itertools.islice(waiting, 1):
                        start(successor)
            # Where a server's backlog is full, the kernel would wait for 1, 3, 7, 15 s. People do not.
            if (now := time.perf_counter()) > end:
                raise TimeoutError(f"{len(joining)} clients could not join within {JOIN_TIMEOUT} s")
            for fd in [fd for fd, deadline in connecting.items() if deadline < now]:
                restart(fd)
        return clients

    def connect(self, count: int) -> list[Client]:
        """Open connections that say nothing."""
        clients = [Client() for _ in range(count)]
        for client in clients:
            self._open(client)
            self._epoll.modify(client.fd, select.EPOLLIN)
        self.clients.update(clients)
        return clients

    def _open(self, client: Client) -> None:
        client.sock = sock = socket.socket()
        client.fd = sock.fileno()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # One source address has 28,000 ports, and a closed one rests for a minute.
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((f"127.0.0.{2 + self._opened // 5000 % 200}", 0))
        self._opened += 1
        error = sock.connect_ex(self._address)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        self._receive[client.fd] = sock.recv_into
        self._epoll.register(client.fd, select.EPOLLOUT)

    # -- reading -----------------------------------------------------------------------------------

    def _events(self) -> list[tuple[int, int]]:
        if events := self._epoll.poll(TIMEOUT):
            return events
        raise TimeoutError(f"the server was silent for {TIMEOUT} s")

    def _read(self, fd: int) -> bytes:
        size = self._receive[fd](self._buffer)
        if not size:
            raise ConnectionError("the server closed a connection")
        return bytes(self._buffer[:size])

    def wait_for(self, size: int) -> None:
        """Read until all connections together have got `size` bytes, and not one more."""
        buffer, receive = self._buffer, self._receive
        while size > 0:
            for fd, _ in self._events():
                got = receive[fd](buffer)
                if not got:
                    raise ConnectionError("the server closed a connection")
                size -= got
        if size:
            raise AssertionError(f"{-size} bytes too many came")

    def wait_for_quiet(self) -> dict[int, int]:
        """Read until nothing comes any more; returns the bytes by descriptor."""
        sizes: dict[int, int] = {}
        while events := self._epoll.poll(QUIET if sizes else TIMEOUT):
            for fd, _ in events:
                sizes[fd] = sizes.get(fd, 0) + len(self._read(fd))
        return sizes

    # -- sending -----------------------------------------------------------------------------------

    def one_at_a_time(self, senders: Iterable[Client], size: int) -> None:
        """Each sender in turn sends one message, when the last one has caused `size` bytes in all."""
        for sender in senders:
            sender.send()
            self.wait_for(size)

    def closed_loop(self, senders: Sequence[Client], seconds: float, size: int) -> int:
        """Each sender sends its next message when one is answered; returns how many were.

        Ends when each of these has caused its `size` bytes in all.
        """
        by_fd = {sender.fd: sender for sender in senders}
        buffer, receive = self._buffer, self._receive
        tail_size = len(senders[0].tail)
        view = memoryview(buffer)[tail_size:]
        received = answers = 0
        under_way = len(senders)
        deadline = time.perf_counter() + seconds
        for sender in senders:
            sender.send()
        while under_way:
            events = self._events()
            over = time.perf_counter() > deadline
            for fd, _ in events:
                got = receive[fd](view)
                received += got
                if (sender := by_fd.get(fd)) is None:
                    continue
                # The tail of the last read goes in front: it may hold the beginning of a marker.
                buffer[:tail_size] = sender.tail
                answered = buffer.count(sender.marker, 0, tail_size + got)
                sender.tail = buffer[got : got + tail_size]
                answers += answered
                if over:
                    under_way -= answered
                else:
                    for _ in range(answered):
                        sender.sock.send(sender.frame)
        self.wait_for(answers * size - received)
        return answers

    def paced(self, sender: Client, rate: float, count: int, size: int) -> list[float]:
        """`count` messages at `rate` a second, of `size` bytes to each; returns all delivery times."""
        got = {client.fd: 0 for client in self.clients if client is not sender}
        times: list[float] = []
        sent: list[float] = []
        clock = time.perf_counter
        next_at = clock()
        while len(times) < count * len(got):
            if len(sent) < count and clock() >= next_at:
                next_at += 1 / rate
                sent.append(clock())
                sender.send()
            for fd, _ in self._epoll.poll(max(0.0, next_at - clock()) if len(sent) < count else TIMEOUT):
                read = len(self._read(fd))
                now = clock()
                if fd != sender.fd:
                    first = got[fd] // size
                    got[fd] += read
                    times.extend(now - moment for moment in sent[first : got[fd] // size])
        with contextlib.suppress(BlockingIOError):  # the answer to the last one
            sender.sock.recv_into(self._buffer)
        return times

    def round_trips(self, sender: Client, count: int, size: int) -> list[float]:
        """Seconds from each message to its answer of `size` bytes, one message at a time."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            sender.send()
            self.wait_for(size)
            times.append(time.perf_counter() - start)
        return times
