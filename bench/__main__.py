"""The command line."""

import argparse
import gc
import os
import shlex
import shutil
import signal
import sys
import time

if not hasattr(os, "sched_setaffinity"):
    sys.exit("bench: needs Linux: it reads /proc and binds processes to cores")

from bench import chart, connections, figures, machine
from bench.beside import beside
from bench.report import Progress
from bench.subjects import Cluster

FIGURES = {
    figure.__name__: figure
    for figure in (
        figures.fanout,
        figures.crowd,
        figures.stored,
        figures.latency,
        figures.lone,
        connections.join,
        connections.storm,
        connections.idle,
        connections.growth,
    )
}

MAX_SIZE = 8000  # the server takes frames of up to 8,192 bytes


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the contexts, which stop all processes
    progress = Progress()
    progress("PostgreSQL starts")
    max_connections = machine.raise_file_limit() - 500
    # Inherited by the database, which stays on these cores.
    os.sched_setaffinity(0, machine.OTHER_CORES)
    started = time.monotonic()
    with Cluster.run("tollerchat", "other" if arguments.beside else "obvious") as cluster:
        os.sched_setaffinity(0, machine.GENERATOR_CORE)
        gc.freeze()
        gc.disable()
        bench = figures.Bench(
            cluster=cluster,
            progress=progress,
            size=arguments.size,
            runs=arguments.runs,
            full=arguments.full,
            max_connections=max_connections,
            beside=arguments.beside,
        )
        description = {"size": arguments.size, "machine": machine.describe(cluster.version())}
        made = beside(bench) if arguments.beside else (FIGURES[name](bench) for name in arguments.names)
        for figure in made:
            progress.clear()
            print(figure.table(), end="\n\n", flush=True)
            if arguments.write:
                figure.write(description)
    if arguments.write:
        chart.write()
    print(f"{time.monotonic() - started:.0f} s, messages of {arguments.size} characters", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks of tollerchat. The server runs on one core, the load and the database on the rest.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)} (default: all)")
    parser.add_argument("--size", type=int, default=100, help="characters per message (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each figure (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="growth also with 10 million messages")
    parser.add_argument("--no-write", dest="write", action="store_false", help="leave bench/results/ alone")
    parser.add_argument(
        "--beside",
        default="",
        metavar="COMMAND",
        help="instead of all this, compare with another server of the same protocol, which takes PORT, DB_URL and "
        "JWT_SECRET from its environment",
    )
    arguments = parser.parse_args()
    if arguments.beside:
        arguments.write = False
        if arguments.names:
            parser.error("--beside has figures of its own: name none")
        if not shutil.which(program := shlex.split(arguments.beside)[0]):
            parser.error(f"--beside: no program {program}")
    arguments.names = arguments.names or list(FIGURES)
    for name in arguments.names:
        if name not in FIGURES:
            parser.error(f"no figure {name}: choose from {', '.join(FIGURES)}")
    if not 1 <= arguments.size <= MAX_SIZE:
        parser.error(f"--size must be 1 to {MAX_SIZE}")
    return arguments


if __name__ == "__main__":
    main()
