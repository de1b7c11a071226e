"""An event loop that lives as long as a module's sandbox."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from kata_lab.runtime import Container, Process, RunResult, Sandbox

T = TypeVar("T")

SECONDS = 200.0  # that anything may take on a busy machine


class Loop:
    """An event loop on a thread of its own, and how a test waits for what runs there."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def __call__(self, work: Coroutine[Any, Any, T], seconds: float = SECONDS) -> T:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self._loop)
        try:
            return future.result()
        finally:
            # Of a test that was cut short.
            future.cancel()

    def close(self) -> None:
        # Which would wait for its threads however long they take.
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result(SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Guest:
    """A sandbox that runs, without asyncio."""

    def __init__(self, sandbox: Sandbox, loop: Loop) -> None:
        self.sandbox = sandbox
        self.wait = loop

    def run(self, *args: str, **wishes: Any) -> RunResult:
        return self.wait(self.sandbox.run(args, **wishes))

    def shell(self, script: str, **wishes: Any) -> str:
        """What a script says in a container of its own; it must succeed."""
        result = self.run("sh", "-c", script, **wishes)
        assert result.status == 0, result
        return result.output

    def container(self, *args: str, **wishes: Any) -> Container:
        return self.wait(self.sandbox.new_container(args, **wishes))

    def started(self, *args: str, **wishes: Any) -> tuple[Container, Process]:
        container = self.container(*args, **wishes)
        return container, self.wait(container.start())

    def remove(self, container: Container) -> None:
        self.wait(container.remove())


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


@pytest.fixture(scope="module")
def guest(loop: Loop) -> Iterator[Guest]:
    sandbox = Sandbox.create()
    try:
        loop(sandbox.start())
        yield Guest(sandbox, loop)
    finally:
        loop(sandbox.stop())
