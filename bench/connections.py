"""The figures about connections: what joining, waiting and being many costs."""

import functools
import itertools
import time
from collections.abc import Callable

from bench.client import Client
from bench.figures import Bench, Room
from bench.report import Figure
from bench.subjects import CHANNELS, FIRST_MESSAGE, USERS, Obvious, SendLoop, Server, Tollerchat

__all__ = ("HISTORY", "cost_of_joining", "growth", "idle", "join", "storm")

HISTORY = 50


def join(bench: Bench) -> Figure:
    """CPU per join with 50 messages of history, one client after the other, into a room that is in use."""
    figure = Figure("join", "join with 50 messages of history", "ms of CPU per join")
    with bench.servers(history=HISTORY) as servers:
        measures = {}
        for server in servers:
            server.join(CHANNELS[0], USERS[:1], history=HISTORY)  # stays, and keeps the room in use
            cost_of_joining(server)  # the users were here before
            measures[server.name] = lambda server=server: cost_of_joining(server) / 1e3
        samples = bench.interleave(figure.name, measures)
    figure.add_all(samples)
    figure.compare("tollerchat, ms of CPU", samples["tollerchat"], [1] * bench.runs, 0.22)
    figure.compare("tollerchat / obvious", samples["tollerchat"], samples["obvious"], 0.25)
    return figure


def cost_of_joining(server: Server) -> float:
    """Microseconds of CPU per join, one client after the other."""
    users = USERS[1:201]
    clients: list[Client] = []
    cpu = server.cpu_of(lambda: clients.extend(server.join(CHANNELS[0], users, history=HISTORY, at_once=1)))
    server.generator.drop(clients)
    server.settle()
    return cpu / len(users)


def storm(bench: Bench) -> Figure:
    """5,000 clients lose their connections and reconnect at once; all catch up."""
    count, rooms = min(5000, bench.max_connections), 50
    figure = Figure(
        "storm", f"{count:,} clients reconnect at once, {HISTORY} messages", "ms of CPU per client"
    )
    seconds: dict[str, list[float]] = {"tollerchat": [], "obvious": []}

    def load(server: Server) -> float:
        requests = [_resume(server, n % rooms, n) for n in range(count)]

        def work() -> None:
            # The frame that is not missing is made up for by the `ready` of those who can resume.
            server.generator.join(requests, HISTORY, at_once=count)

        start = time.perf_counter()
        cpu = server.cpu_of(work) / count / 1e3
        seconds[server.name].append(time.perf_counter() - start)
        server.generator.close()
        server.settle()
        return cpu

    with bench.servers(rooms=rooms, history=HISTORY) as servers:
        samples = bench.interleave(
            figure.name,
            {server.name: lambda server=server: load(server) for server in servers},
            runs=min(bench.runs, 3),
        )
        refused = {server.name: server.generator.refused for server in servers}
    if any(refused.values()):
        figure.note = "told to try again: " + ", ".join(
            f"{name} {count:,} times" for name, count in refused.items()
        )
    figure.add_all(samples)
    figure.add_all(seconds, ", s until all have caught up")
    figure.compare("tollerchat / obvious", samples["tollerchat"], samples["obvious"], 0.25)
    return figure


def _resume(server: Server, room: int, user: int) -> bytes:
    """After the first message of a room; a server that cannot resume sends that one too."""
    return server.request(CHANNELS[room], USERS[user], after=FIRST_MESSAGE + room)


def idle(bench: Bench) -> Figure:
    """Memory per idle connection, 10,000 connections in 100 rooms; a fresh process for each run."""
    count, rooms, seconds = min(10_000, bench.max_connections), 100, 2.0
    figure = Figure("idle", f"{count:,} idle connections in {rooms} rooms", "KiB per connection")
    if count < 10_000:
        figure.note = "fewer connections than meant: the limit of open files forbids more"
    cpu: dict[str, list[float]] = {"tollerchat": [], "obvious": []}

    def load(kind: type[Server]) -> float:
        with kind(bench.cluster) as server:
            requests = [server.request(CHANNELS[n % rooms], USERS[n]) for n in range(count)]
            frames = HISTORY + server.extra_frames
            # What the first connections cause to be loaded is not the price of a connection.
            server.generator.drop(server.generator.join(requests[:10], frames))
            server.settle()
            before = server.memory()
            server.generator.join(requests, frames)
            server.settle()
            memory = (server.memory() - before) / count
            cpu[server.name].append(server.cpu_of(lambda: time.sleep(seconds)) / seconds / 1e4)
        return memory

    bench.cluster.seed(rooms=rooms, messages=rooms * HISTORY, size=bench.size)
    samples = bench.interleave(
        figure.name,
        {kind.name: lambda kind=kind: load(kind) for kind in (Tollerchat, Obvious)},
        runs=min(bench.runs, 2),
    )
    figure.add_all(samples)
    figure.add_all(cpu, ", % of a core while idle")
    figure.compare("tollerchat, KiB", samples["tollerchat"], [1] * len(samples["tollerchat"]), 8)
    return figure


def growth(bench: Bench) -> Figure:
    """What a delivery costs in larger rooms and in more of them, and a join into a longer history."""
    figure = Figure("growth", "cost growth", "us of CPU per delivery, one message at a time")
    _larger_rooms(bench, figure)
    _more_rooms(bench, figure)
    _longer_history(bench, figure)
    return figure


def _larger_rooms(bench: Bench, figure: Figure) -> None:
    """One room for each size, all on one server. What a message costs is shared by those it goes to."""
    sizes = [size for size in (10, 100, 1_000, 10_000) if size < bench.max_connections - 2000]
    bench.cluster.seed(rooms=len(sizes), messages=len(sizes), size=bench.size)
    with Tollerchat(bench.cluster) as server:
        rooms = {}
        for n, size in enumerate(sizes):
            bench.progress(f"growth: {size} clients join a room")
            clients = server.join(CHANNELS[n], USERS[: size + 1], history=1, size=bench.size)
            rooms[size] = room = Room(server, clients, *server.sizes(clients[0], clients[-1]))

        def load(size: int) -> float:
            return rooms[size].one_at_a_time(_messages(size)) / size

        samples = bench.interleave(
            figure.name, {f"room of {size:,}": lambda size=size: load(size) for size in rooms}
        )
    loops = {
        size: _bare_loop(bench, size, room.message, messages=_messages(size))
        for size in (sizes[0], sizes[-1])
    }
    figure.add_all(samples)
    for size, values in loops.items():
        figure.add(f"send(2) loop to {size:,}", values)
    first, *_, last = samples
    figure.compare(f"{last} / {first}", samples[last], samples[first], 1.2)


def _messages(size: int) -> int:
    """How many are sent in a room of this size in each run."""
    return max(5, 40_000 // (size + 100))


def _bare_loop(bench: Bench, size: int, message: int, *, messages: int, groups: int = 1) -> list[float]:
    """What the system alone makes of so many sockets, whose state does not fit the caches any more."""
    with SendLoop(size, message, groups=groups) as loop:
        loop.run(messages)
        return [loop.run(messages) for _ in range(bench.runs)]


def _more_rooms(bench: Bench, figure: Figure) -> None:
    """Rooms of 10 clients, each in turn sent a message."""
    members, messages = 10, 500
    most = min(1000, bench.max_connections // members)
    bench.cluster.seed(rooms=most, messages=most, size=bench.size)
    samples: dict[int, list[float]] = {}
    with Tollerchat(bench.cluster) as server:
        senders: list[Client] = []
        for rooms in (1, most):
            bench.progress(f"growth: {rooms} rooms are filled")
            for n in range(len(senders), rooms):
                clients = server.join(CHANNELS[n], USERS[:members], history=1, size=bench.size)
                senders.append(clients[0])
                if n == 0:
                    room = Room(server, clients, *server.sizes(clients[0], clients[-1]))
            turns = list(itertools.islice(itertools.cycle(senders), messages))

            work = functools.partial(server.generator.one_at_a_time, turns, room.bytes)

            def load(work: Callable[[], None] = work, deliveries: int = messages * room.deliveries) -> float:
                return server.cpu_of(work) / deliveries

            load()
            label = f"{rooms:,} rooms of {members}"
            samples |= bench.interleave(figure.name, {label: load})
    for groups in (1, most):
        label = f"send(2) loop, {groups:,} groups of {members}"
        loop = _bare_loop(bench, members, room.message, messages=2 * most, groups=groups)
        figure.add(label, loop)
    figure.add_all(samples)
    one, many = samples
    figure.compare(f"{many} / {one}", samples[many], samples[one], 1.2)


def _longer_history(bench: Bench, figure: Figure) -> None:
    """Joins into a room that is not in use, so that its history is read from the database."""
    joins = 50
    samples: dict[str, list[float]] = {}
    for messages in (100, 1_000_000, *((10_000_000,) if bench.full else ())):
        bench.progress(f"growth: {messages:,} messages are stored")
        bench.cluster.seed(rooms=1, messages=messages, size=bench.size, names=["tollerchat"])
        with Tollerchat(bench.cluster) as server:

            def load(server: Server = server) -> float:
                total = 0.0
                for _ in range(joins):
                    work = functools.partial(server.join, CHANNELS[0], USERS[:1], history=HISTORY)
                    total += server.cpu_of(work)
                    server.generator.close()
                    time.sleep(0.005)  # the server drops the room
                return total / joins / 1e3

            load()
            samples |= bench.interleave(figure.name, {f"{messages:,} messages stored": load})
    figure.add_all(samples, ", ms of CPU per first join")
    first, *_, last = samples
    figure.compare(f"{last} / {first}", samples[last], samples[first], 1.2)
