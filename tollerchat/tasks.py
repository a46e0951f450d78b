"""Ending tasks."""

import asyncio
from typing import Any, Final

__all__ = ("end_tasks",)

AGAIN: Final = 0.2  # seconds


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
