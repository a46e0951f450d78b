"""`connect`: connections to PostgreSQL through aiopg, and what aiopg 1.4 leaves to be desired."""

import asyncio
import contextlib
import logging
import math
import select
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final

import aiopg
import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE, make_dsn, parse_dsn

from tollerchat.tasks import rest

__all__ = ("FAILURES", "Connection", "ConnectionWatch", "connect", "distrust")

logger = logging.getLogger("tollerchat.connection")

# AssertionError: aiopg, on a broken connection. RuntimeError: uvloop, on a descriptor reused too soon.
FAILURES = (psycopg2.Error, OSError, asyncio.TimeoutError, AssertionError, RuntimeError)

_OPTIONS: Any = {
    "client_encoding": "utf8",
    # psycopg2's extra types would cost a query on each connect.
    "enable_json": False,
    "enable_hstore": False,
    "enable_uuid": False,
    "application_name": "tollerchat",
}


# Bytes of a query that the system takes at once; of a longer one, we must ask whether there is more to send.
SENT_AT_ONCE: Final = 4096

_DEFAULTS: Final = {
    # Some are idle for hours, and what is between us and the database may forget them without a word.
    "keepalives_idle": "60",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    # Of several hosts, a standby may answer first: its log lags behind what the others commit.
    "target_session_attrs": "primary",
}


class Connection(aiopg.Connection):
    """A connection that knows when it is dead, whatever becomes of single queries.

    aiopg gives each query a timer, lets any failed one end the notifications, takes one that the server cancels
    for a cancelled task, and asks select(2), which takes no descriptor above 1023, about its socket. The timeouts
    here are kept by a `ConnectionWatch`.
    """

    _deadline = math.inf  # loop time, of the query
    _ended = False
    _fileno: int
    _cursor: Any = None  # psycopg2's: of aiopg's there would be one more for each query

    async def query(self, sql: str | bytes, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Run a query and return its rows, if it has any. Raises one of `FAILURES`."""
        waiter = self._create_waiter("query")
        try:
            if self._cursor is None:
                self._cursor = self._conn.cursor()
            self._cursor.execute(sql, parameters)
        except BaseException:
            self._waiter = None
            raise
        if len(self._cursor.query) > SENT_AT_ONCE:
            self._ready(self._weakref)
        await self._wait(waiter, self.timeout)
        return self._cursor.fetchall() if self._cursor.description else []

    @staticmethod
    def _ready(weak_self: "weakref.ref[Any]") -> None:
        """Its socket is ready: go on with what is under way."""
        if (self := weak_self()) is None:
            return
        conn, waiter = self._conn, self._waiter
        state, error = POLL_OK, None
        try:
            state = conn.poll()
        except (psycopg2.Warning, psycopg2.Error) as exc:  # of the query, or of the connection
            error = exc
        while conn.notifies:
            self._notifies.put_nowait(conn.notifies.pop(0))
        if state == POLL_OK and waiter is not None and not waiter.done():
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        if conn.closed or conn.fileno() != self._fileno:
            self.close()  # now: its descriptor may soon be another's, and must not be watched
        elif (state == POLL_WRITE) is not self._writing:
            self._watch_for_writing(state == POLL_WRITE)

    def _watch_for_writing(self, wanted: bool) -> None:
        self._writing = wanted
        if wanted:
            self._loop.add_writer(self._fileno, self._ready, self._weakref)
        else:
            self._loop.remove_writer(self._fileno)

    async def _poll(self, waiter: "asyncio.Future[None]", timeout: float) -> None:
        """Wait for what aiopg has begun: to connect."""
        self._ready(self._weakref)
        await self._wait(waiter, timeout)

    async def _wait(self, waiter: "asyncio.Future[None]", timeout: float) -> None:
        self._deadline = self._loop.time() + timeout
        try:
            await waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._deadline = math.inf
            self._waiter = None

    def _close(self) -> None:
        if self._ended:  # its descriptor may be another's by now
            return
        self._ended = True
        try:
            # libpq may have closed the descriptor: then asyncio's loop has nothing to forget, and says so.
            with contextlib.suppress(OSError):
                super()._close()
        finally:  # uvloop may refuse to forget the descriptor
            self._conn.close()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(psycopg2.OperationalError("the connection is closed"))
            self._notifies.put_nowait(None)

    def look(self) -> None:
        """Take the notifications that came in one packet with an answer: psycopg2 lets them lie until then."""
        self._ready(self._weakref)

    async def notified(self, most: int) -> list[str]:
        """The payloads of up to `most` notifications, as soon as there is one. Raises `psycopg2.Error` at the end.

        Not to be cancelled, which can lose a notification.
        """
        notifies = [await self._notifies.get()]
        while len(notifies) < most and not self._notifies.empty():
            notifies.append(self._notifies.get_nowait())
        if None in notifies:
            raise psycopg2.OperationalError("the connection is closed")
        return [notify.payload for notify in notifies]

    def check(self) -> None:
        """Close it if its socket is in error, or its query takes too long."""
        waiter = self._waiter
        if waiter is not None and not waiter.done() and self._loop.time() >= self._deadline:
            waiter.set_exception(asyncio.TimeoutError())
            self.close()
        elif not self.closed and _is_broken(self._conn.fileno()):
            self.close()  # whoever waits for it gets an OperationalError


_answered: dict[str, dict[str, Any]] = {}  # dsn -> the address that answered last: others may be dead


async def connect(dsn: str, *, timeout: float) -> Connection:
    """Connect to the first address of the database that answers, within `timeout` seconds.

    libpq would look names up while the event loop stands still, and go from one address to the next on
    another socket, which aiopg does not notice. Raises one of `FAILURES`.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    addresses = await asyncio.wait_for(_addresses(dsn), timeout)
    addresses.sort(key=lambda address: address != _answered.get(dsn))
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        try:
            if (share := (end - loop.time()) / left) <= 0:
                raise asyncio.TimeoutError
            connection = Connection(make_dsn(**address), timeout, **_OPTIONS)
            await asyncio.wait_for(connection, share)
        except FAILURES:
            if left == 1:
                raise
        else:
            _answered[dsn] = address
            return connection
    raise AssertionError("a name without an address")


async def _addresses(dsn: str) -> list[dict[str, Any]]:
    """The parameters of a connection for each address of the database. Raises `OSError` if there is none."""
    parameters = {**_DEFAULTS, **parse_dsn(dsn)}
    if "host" not in parameters or not parameters.keys().isdisjoint(("hostaddr", "service")):
        return [parameters]  # then it is libpq that knows
    addresses: list[dict[str, Any]] = []
    failure = ""
    for host, port in _hosts(parameters):
        place = {**parameters, "host": host, **({"port": port} if port else {})}
        if host[:1] in ("", "/", "@"):  # a Unix socket
            addresses.append(place)
            continue
        try:
            found = await _look_up(host)
        except (OSError, UnicodeError) as exc:
            failure = f"{host}: {exc}"
        else:
            addresses += ({**place, "hostaddr": address} for address in found)
    if not addresses:
        raise OSError(failure)
    return addresses


_lookups: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[list[str]]] = {}


async def _look_up(host: str) -> list[str]:
    """The addresses of a host, asked for once for all who ask meanwhile. Raises `OSError`, `UnicodeError`.

    Not in the loop's own threads: it would wait for them at its end, as long as a name server may take.
    """
    loop = asyncio.get_running_loop()
    if (answer := _lookups.get((loop, host))) is None:
        answer = _lookups[loop, host] = loop.create_future()
        try:
            threading.Thread(target=_ask_resolver, args=(loop, host, answer), daemon=True).start()
        except RuntimeError:
            del _lookups[loop, host]
            raise
    return await asyncio.shield(answer)


def _ask_resolver(loop: asyncio.AbstractEventLoop, host: str, answer: "asyncio.Future[list[str]]") -> None:
    error: Exception | None = None
    addresses: list[str] = []
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    except Exception as exc:  # whatever it is, somebody waits for it
        error = exc

    def tell() -> None:
        if error is None:
            answer.set_result(addresses)
        else:
            answer.set_exception(error)
            answer.exception()  # whoever asked may have given up

    del _lookups[loop, host]
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(tell)


def distrust(dsn: str) -> None:
    """The database that was reached does not serve us: try its other addresses, too."""
    _answered.pop(dsn, None)


def _hosts(parameters: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Hosts and ports, of which there may be one for all (PostgreSQL's manual, "Specifying Multiple Hosts")."""
    hosts, ports = parameters["host"].split(","), parameters.get("port", "").split(",")
    if len(ports) not in (1, len(hosts)):
        raise OSError(f"DB_URL has {len(hosts)} hosts and {len(ports)} ports")
    return zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True)


WATCH_INTERVAL: Final = 0.2  # seconds


class ConnectionWatch:
    """Closes connections whose socket is in error, so that nothing waits for them, or whose query takes too long.

    A server process that dies with our query unread resets the connection. libuv, below uvloop, reports
    that once and then stops to watch the socket; aiopg needs to be called again to see the end.
    """

    def __init__(self) -> None:
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()

    def add(self, connection: Connection) -> None:
        """Watch a connection for as long as it lives."""
        self._connections.add(connection)

    async def run(self) -> None:
        """Look at all connections again and again, until cancelled."""
        while True:
            await rest(WATCH_INTERVAL)
            for connection in list(self._connections):
                try:
                    connection.check()
                except Exception:  # one bad connection must not end this for all
                    logger.exception("a connection to the database could not be closed")


def _is_broken(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows, which has no uvloop either
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are told unasked
    return bool(poll.poll(0))
