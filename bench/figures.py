"""The figures about messages: what a delivery, a commit and a moment cost."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping

from bench.client import Client
from bench.report import Figure, Progress
from bench.subjects import (
    CHANNELS,
    USERS,
    Cluster,
    InsertLoop,
    Obvious,
    SendLoop,
    Server,
    Tollerchat,
)

__all__ = ("Bench", "Room", "crowd", "fanout", "fill", "latency", "lone", "stored")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all figures are made with."""

    cluster: Cluster
    progress: Progress
    size: int  # of the messages, in characters of content
    runs: int
    full: bool
    max_connections: int
    beside: str  # the command of another server, if one is to be measured

    @contextlib.contextmanager
    def servers(self, *, rooms: int = 1, history: int = 1) -> Iterator[tuple[Server, Server]]:
        """Both servers, started afresh on rooms with some messages.

        There is at least one, so that a client knows when it has joined: when it has received it.
        """
        self.cluster.seed(rooms=rooms, messages=rooms * history, size=self.size)
        with Tollerchat(self.cluster) as tollerchat, Obvious(self.cluster) as obvious:
            yield tollerchat, obvious

    def interleave(
        self, name: str, measures: Mapping[str, Callable[[], float]], *, runs: int = 0
    ) -> dict[str, list[float]]:
        """Measure in turn, several times, so that what disturbs the machine disturbs all of them."""
        samples: dict[str, list[float]] = {label: [] for label in measures}
        runs = runs or self.runs
        for run in range(runs):
            for label, measure in measures.items():
                self.progress(f"{name}: {label}, run {run + 1} of {runs}")
                samples[label].append(measure())
        return samples


@dataclasses.dataclass(frozen=True)
class Room:
    """A channel of a server with clients in it."""

    server: Server
    clients: list[Client]
    message: int  # bytes to those who receive it
    answer: int  # bytes to its sender

    @property
    def deliveries(self) -> int:
        """By one message."""
        return len(self.clients) - 1 + self.server.extra_deliveries

    @property
    def bytes(self) -> int:
        """By one message, in all."""
        return (len(self.clients) - 1) * self.message + self.answer

    def one_at_a_time(self, count: int) -> float:
        """Microseconds of CPU per message of the first client."""
        return self.server.cpu_of(lambda: self._send(count)) / count

    def _send(self, count: int) -> None:
        self.server.generator.one_at_a_time([self.clients[0]] * count, self.bytes)


def fill(server: Server, count: int, bench: Bench) -> Room:
    """Have clients join the first channel."""
    bench.progress(f"{count} clients join {server.name}")
    clients = server.join(CHANNELS[0], USERS[:count], history=1, size=bench.size)
    return Room(server, clients, *server.sizes(clients[0], clients[-1]))


def fanout(bench: Bench) -> Figure:
    """CPU per delivery, one sender to 200 clients, the next message when all have the last."""
    count, messages = 200, 200
    figure = Figure("fanout", "one sender to 200 clients, one message at a time", "us of CPU per delivery")
    with bench.servers() as servers:
        rooms = [fill(server, count + 1, bench) for server in servers]
        with SendLoop(count, rooms[0].message) as loop:
            measures = {loop.name: lambda: loop.run(messages)}
            for room in rooms:
                measures[room.server.name] = lambda room=room: room.one_at_a_time(messages) / room.deliveries
            samples = bench.interleave(figure.name, measures)
    figure.add_all(samples)
    figure.compare("tollerchat / send(2) loop", samples["tollerchat"], samples["send(2) loop"], 1.25)
    return figure


def crowd(bench: Bench) -> Figure:
    """CPU per delivery, 64 closed-loop senders in a room of 500."""
    count, senders, seconds = 500, 64, 1.2
    figure = Figure("crowd", "64 senders in a room of 500", "us of CPU per delivery")

    def load(room: Room) -> float:
        _, cpu = room.server.closed_loop(room.clients[:senders], seconds, room.bytes)
        return cpu / room.deliveries

    with bench.servers() as servers:
        rooms = [fill(server, count, bench) for server in servers]
        with SendLoop(count, rooms[0].message) as loop:
            measures = {loop.name: lambda: loop.run(50)}
            for room in rooms:
                measures[room.server.name] = lambda room=room: load(room)
            samples = bench.interleave(figure.name, measures)
    figure.add_all(samples)
    figure.compare("tollerchat / send(2) loop", samples["tollerchat"], samples["send(2) loop"], 0.05)
    return figure


def stored(bench: Bench) -> Figure:
    """Messages a second, and CPU per message, of 100 closed-loop senders in 50 rooms."""
    rooms, seconds = 50, 1.5
    figure = Figure("stored", "100 closed-loop senders in 50 rooms", "stored messages a second")
    cpu: dict[str, list[float]] = {"tollerchat": [], "obvious": []}

    def load(server: Server, senders: list[Client], size: int) -> float:
        answers, each = server.closed_loop(senders, seconds, size)
        cpu[server.name].append(each)
        return answers / seconds

    with bench.servers(rooms=rooms) as servers:
        measures = {}
        for server in servers:
            senders = []
            for n in range(rooms):
                senders += server.join(CHANNELS[n], USERS[2 * n : 2 * n + 2], history=1, size=bench.size)
            size = sum(server.sizes(*senders[:2]))
            measures[server.name] = lambda args=(server, senders, size): load(*args)
        samples = bench.interleave(figure.name, measures)
    figure.add_all(samples)
    figure.add_all(cpu, ", us of CPU per message")
    figure.compare("tollerchat / obvious", samples["tollerchat"], samples["obvious"], 4, at_least=True)
    figure.compare("tollerchat, us of CPU per message", cpu["tollerchat"], [1] * bench.runs, 15)
    return figure


def latency(bench: Bench) -> Figure:
    """Delivery times at 50 messages a second to 200 clients."""
    count, rate, messages = 200, 50, 250
    figure = Figure("latency", "50 messages a second to 200 clients", "ms from send to delivery")
    p99: dict[str, list[float]] = {"tollerchat": [], "obvious": []}

    def load(room: Room) -> float:
        times = room.server.generator.paced(room.clients[0], rate, messages, room.message)
        percentiles = statistics.quantiles(times, n=100)
        p99[room.server.name].append(percentiles[98] * 1e3)
        return percentiles[49] * 1e3

    with bench.servers() as servers:
        rooms = [fill(server, count + 1, bench) for server in servers]
        p50 = bench.interleave(
            figure.name, {room.server.name: lambda room=room: load(room) for room in rooms}
        )
    for name, samples in (("p50", p50), ("p99", p99)):
        figure.add_all(samples, f", {name}")
        figure.compare(f"tollerchat / obvious, {name}", samples["tollerchat"], samples["obvious"], 1)
    return figure


def lone(bench: Bench) -> Figure:
    """One lone message from send to ack, beside a bare INSERT."""
    messages = 200
    figure = Figure("lone", "one lone message, from send to ack", "ms, median of 200")

    def load(room: Room) -> float:
        return (
            statistics.median(room.server.generator.round_trips(room.clients[0], messages, room.bytes)) * 1e3
        )

    with bench.servers() as servers, InsertLoop(bench.cluster, bench.size) as loop:
        measures = {loop.name: lambda: statistics.median(loop.run(messages)) * 1e3}
        for server in servers:
            room = fill(server, 1, bench)
            measures[server.name] = lambda room=room: load(room)
        samples = bench.interleave(figure.name, measures)
    figure.add_all(samples)
    figure.compare("tollerchat / bare INSERT", samples["tollerchat"], samples["bare INSERT"], 1.5)
    return figure
