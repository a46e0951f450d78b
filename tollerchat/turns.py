"""`Turns`: connections take turns at having parsed what they sent."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ("Turns",)

BUDGET: Final = 0.001  # seconds of each turn of the loop


class Turns:
    """Calls back in the order of asking, for a bounded time in each turn of the event loop.

    Those who send as much as they can, however many, would else keep the loop from everybody.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False

    def ask(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, soon."""
        self._waiting.append(callback)
        if not self._scheduled:
            if self._loop is None:  # to ask for it each time is a call of the system, before Python 3.12
                self._loop = asyncio.get_running_loop()
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        end = time.perf_counter() + BUDGET
        try:
            while self._waiting:
                self._waiting.popleft()()
                if time.perf_counter() >= end:
                    break
        finally:
            self._scheduled = bool(self._waiting)
            if self._scheduled and self._loop is not None:
                self._loop.call_soon(self._run)
