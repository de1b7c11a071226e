"""Keeps a sandbox's record on disk true without keeping anybody waiting for the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from kata_lab.runtime.completion import ended
from kata_lab.runtime.errors import RuntimeFault

if TYPE_CHECKING:
    from kata_lab.runtime.logs import SandboxLogger
    from kata_lab.runtime.state import SandboxRecord, StateDirectory


class RecordWriter:
    """Writes the record whenever it has changed; of several changes at once the last one is written.

    Args:
        directory: of the sandbox.
        make: what the record says now.
        log: told where it cannot be written, which the next change tries again.
    """

    def __init__(self, directory: StateDirectory, make: Callable[[], SandboxRecord], log: SandboxLogger) -> None:
        self._directory = directory
        self._make = make
        self._log = log
        self._changed = False
        self._writing: asyncio.Task[None] | None = None

    def change(self) -> None:
        """The record is not true any more."""
        self._changed = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name=f"record-{self._directory.id}")

    async def _write(self) -> None:
        while self._changed:
            self._changed = False
            try:
                await asyncio.to_thread(self._directory.write, self._make())
            except RuntimeFault as error:
                self._log.warning("%s", error)

    async def settle(self) -> None:
        """Wait until what has changed is on the disk."""
        if self._writing is not None:
            await ended(self._writing)
