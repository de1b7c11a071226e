"""What must come to its end even if whoever waits for it is cancelled: taking back, ending, and calls half way."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def completed(work: Coroutine[Any, Any, T], name: str | None = None) -> T:
    """Carry ``work`` out as a task of its own; a cancellation is passed on when it has ended, whatever its outcome."""
    task = asyncio.create_task(work, name=name)
    await ended(task)
    return task.result()


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait for the end of a task; a cancellation is passed on afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        # What it came to is nobody's any more, and no reason for a complaint.
        _ = task.cancelled() or task.exception()
        raise cancelled
