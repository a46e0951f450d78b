"""What cannot be done for less: a bare loop of send(2), and a bare INSERT through aiopg.

`python -m bench.floors send COUNT SIZE GROUPS`: takes 1 + GROUPS * COUNT connections on PORT; then each byte
from the first one has SIZE bytes sent to one group of COUNT others, each in turn.
`python -m bench.floors insert CHANNEL USER SIZE`: each line of standard input, a number, is answered with
a JSON list of so many durations in seconds.
"""

import asyncio
import itertools
import json
import os
import socket
import sys
import time

import aiopg
import uvloop

INSERT = "INSERT INTO messages (channel_id, user_id, content) VALUES (%s, %s, %s) RETURNING id, created_at"


def send(count: int, size: int, groups: int) -> None:
    data = bytes(size)
    with socket.create_server(("127.0.0.1", int(os.environ["PORT"])), backlog=1024) as listener:
        print("listening", flush=True)
        control = listener.accept()[0]
        others = [[listener.accept()[0] for _ in range(count)] for _ in range(groups)]
    for group in itertools.cycle(others):
        if not control.recv(1):
            break
        for each in group:
            each.send(data)


async def insert(channel_id: int, user_id: int, size: int) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    content = "x" * size
    async with aiopg.connect(os.environ["DB_URL"]) as connection, connection.cursor() as cursor:
        while line := await lines.readline():
            durations = []
            for _ in range(int(line)):
                start = time.perf_counter()
                await cursor.execute(INSERT, (channel_id, user_id, content))
                await cursor.fetchone()
                durations.append(time.perf_counter() - start)
            print(json.dumps(durations), flush=True)


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    if name == "send":
        send(*map(int, numbers))
    else:
        uvloop.run(insert(*map(int, numbers)))
