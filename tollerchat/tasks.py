"""Tasks: how they rest, and how they end."""

import asyncio
from typing import Any, Final

__all__ = ("end_tasks", "rest")

AGAIN: Final = 0.2  # seconds


async def rest(seconds: float) -> None:
    """Sleep; and after a standstill, until what came meanwhile was read and dealt with.

    For those who judge others by their silence: a loop that wakes up late may run its timers first.
    """
    for delay in (seconds, 0, 0):
        await asyncio.sleep(delay)


async def end_tasks(*tasks: "asyncio.Task[Any] | None") -> None:
    """Cancel tasks, and return when they have ended; what they raised is dropped.

    A cancellation can get lost: `asyncio.wait_for` drops it before Python 3.12 where
    what it waits for is done in the same moment. So it is repeated until it is heeded.
    """
    running = {task for task in tasks if task is not None}
    while running:
        for task in running:
            task.cancel()
        ended, running = await asyncio.wait(running, timeout=AGAIN)
        await asyncio.gather(*ended, return_exceptions=True)
