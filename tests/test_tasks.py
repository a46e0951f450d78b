"""Ending tasks."""

import asyncio

from tollerchat.tasks import end_tasks


async def test_task_that_loses_a_cancellation_ends_all_the_same():
    """As a wait_for does before Python 3.12 whose future is done in the same moment."""
    lost = []

    async def work():
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append("one")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await asyncio.wait_for(end_tasks(task, None), 5)
    assert task.cancelled()
    assert lost == ["one"]


async def test_task_that_failed_is_no_problem():
    async def fail():
        raise ValueError

    task = asyncio.create_task(fail())
    await asyncio.wait({task})
    await end_tasks(task)
