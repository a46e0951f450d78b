"""Any other server, beside tollerchat: `--beside COMMAND`, for one that speaks the protocol of the original.

It takes connections on PORT of 127.0.0.1, tokens signed with JWT_SECRET, and messages into the tables of DB_URL;
it passes each message on to the others in the room. So nobody asks for acks here.
"""

import itertools
import shlex
import statistics
from collections.abc import Callable, Iterator

from bench.connections import HISTORY, cost_of_joining
from bench.figures import Bench, fill
from bench.report import Figure
from bench.subjects import CHANNELS, USERS, Cluster, Server, Tollerchat

__all__ = ("beside",)

SIZES = (2, 10, 50, 200)  # of rooms
PAIRS = 32  # rooms of two: fewer at once than PostgreSQL takes connections, if each message has one
CROWD, SENDERS = 500, 64

Load = Callable[[], dict[str, float]]  # what it found, by quantity

CPU = "us of CPU"
A_SECOND = "messages a second"


class Plain(Tollerchat):
    """tollerchat without the subprotocol, for clients of the original."""

    extra_headers = ""
    extra_frames = 0

    def marker(self, user_id: int) -> bytes:
        return b'{"type":"message"'  # each answers what the others send


class Other(Plain):
    name = "other"

    def __init__(self, cluster: Cluster, command: str) -> None:
        self.command = shlex.split(command)
        super().__init__(cluster)


def beside(bench: Bench) -> Iterator[Figure]:
    """All figures that need no acks, of both."""
    for size in SIZES:
        title = f"one sender in a room of {size}, one message at a time"
        yield _compare(bench, title, lambda server, size=size: _room(server, size, bench))
    yield _compare(bench, f"{SENDERS} at once in a room of {CROWD}", lambda server: _crowd(server, bench))
    yield _compare(
        bench,
        f"{PAIRS} rooms of two, who answer each other",
        lambda server: _pairs(server, bench),
        rooms=PAIRS,
    )
    yield _compare(bench, f"join with {HISTORY} messages of history", _join, history=HISTORY)


def _compare(
    bench: Bench, title: str, prepare: Callable[[Server], Load], *, rooms: int = 1, history: int = 1
) -> Figure:
    bench.cluster.seed(rooms=rooms, messages=rooms * history, size=bench.size)
    found: dict[str, dict[str, list[float]]] = {}  # by quantity and server
    with Plain(bench.cluster) as ours, Other(bench.cluster, bench.beside) as other:
        loads = {server.name: prepare(server) for server in (ours, other)}
        for run, (name, load) in itertools.product(range(bench.runs), loads.items()):
            bench.progress(f"{title}: {name}, run {run + 1} of {bench.runs}")
            for quantity, value in load().items():
                found.setdefault(quantity, {}).setdefault(name, []).append(value)
    figure = Figure("beside", title, "tollerchat and the other server")
    for quantity, by_name in found.items():
        for name, samples in by_name.items():
            figure.add(f"{name}, {quantity}", samples)
    for quantity, by_name in found.items():
        samples, reference = by_name[ours.name], by_name[other.name]
        label = f"tollerchat / other, {quantity}"
        figure.compare(label, samples, reference, 1, at_least=quantity == A_SECOND)
    return figure


def _room(server: Server, size: int, bench: Bench) -> Load:
    """One sender, the next message when all have the last."""
    room = fill(server, size, bench)
    count = 200 if size < 50 else 100

    def load() -> dict[str, float]:
        times: list[float] = []
        cpu = server.cpu_of(
            lambda: times.extend(server.generator.round_trips(room.clients[0], count, room.bytes))
        )
        return {CPU: cpu / count, "us until all have it": statistics.median(times) * 1e6}

    return load


def _crowd(server: Server, bench: Bench) -> Load:
    room = fill(server, CROWD, bench)
    bursts = 5

    def burst() -> None:
        for client in room.clients[:SENDERS]:
            client.send()
        server.generator.wait_for(SENDERS * room.bytes)

    def load() -> dict[str, float]:
        cpu = server.cpu_of(lambda: [burst() for _ in range(bursts)])
        return {f"{CPU} per delivery": cpu / bursts / SENDERS / room.deliveries}

    return load


def _pairs(server: Server, bench: Bench) -> Load:
    """Rooms of two, who answer each other."""
    seconds = 1.0
    senders = []
    for n in range(PAIRS):
        senders += server.join(CHANNELS[n], USERS[2 * n : 2 * n + 2], history=1, size=bench.size)
    size = sum(server.sizes(*senders[:2]))

    def load() -> dict[str, float]:
        answers, cpu = server.closed_loop(senders, seconds, size)
        return {CPU: cpu, A_SECOND: answers / seconds}

    return load


def _join(server: Server) -> Load:
    server.join(CHANNELS[0], USERS[:1], history=HISTORY)  # stays, and keeps the room in use
    cost_of_joining(server)  # the users were here before
    return lambda: {CPU: cost_of_joining(server)}
