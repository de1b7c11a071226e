"""The runtime for scripts without asyncio.

::

    with Sandbox.create() as sandbox:
        print(sandbox.run(["uname", "-a"]).output)

One event loop on a thread of its own serves all sandboxes of the process; it ends with the last of them. Every method
waits; a :class:`SyncContainer` and a :class:`SyncProcess` have the methods of those that they stand for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from kata_lab.runtime import container as containers
from kata_lab.runtime import process as processes
from kata_lab.runtime import sandbox as sandboxes
from kata_lab.runtime.config import RunResult, SandboxConfig, SandboxState
from kata_lab.runtime.errors import RuntimeFault
from vmm.loop_thread import LoopThread

if TYPE_CHECKING:
    from kata_lab.oci import ImageHandle
    from kata_lab.resource.sizing import SandboxSize
    from vmm.config import DeviceConfig

T = TypeVar("T")

THREAD = "kata-lab-runtime"


class _Loop:
    """The thread with the event loop, and how many sandboxes use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: LoopThread | None = None

    def enter(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = LoopThread(THREAD)
                try:
                    self._loop, self._thread = thread.start(), thread
                except BaseException:
                    thread.stop()
                    raise
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or self._thread is None:
                return
            self._thread.stop()
            self._loop = self._thread = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """That of the thread."""
        if self._loop is None:
            raise RuntimeFault("no sandbox is open: use it within its with statement")
        return self._loop

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Carry it out on the loop's thread. Ctrl-C cancels it, and is passed on when it has undone what it did."""
        loop = self._loop
        if loop is None:
            coroutine.close()
            raise RuntimeFault("no sandbox is open: use it within its with statement")
        if self._thread is not None and threading.current_thread() is self._thread.thread:
            coroutine.close()
            raise RuntimeFault("this would wait for the thread that it is called on; use kata_lab.runtime there")
        over = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda _: over.set())

        loop.call_soon_threadsafe(begin)
        try:
            over.wait()
        except BaseException:
            loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            # A second Ctrl-C leaves at once.
            over.wait()
            _ = tasks[0].cancelled() or tasks[0].exception()
            raise
        return tasks[0].result()


_LOOP = _Loop()


def running_loop() -> asyncio.AbstractEventLoop:
    """The event loop to which the sandboxes belong.

    Raises:
        RuntimeFault: no sandbox is open.
    """
    return _LOOP.loop


class SyncProcess:
    """A process in a container; see :class:`kata_lab.runtime.process.Process`."""

    def __init__(self, process: processes.Process) -> None:
        self._process = process

    @property
    def status(self) -> int | None:
        """The exit status; None while it is not known."""
        return self._process.status

    def write(self, data: bytes) -> None:
        """Write to its standard input."""
        _LOOP.wait(self._process.stdin.write(data))

    def close_stdin(self) -> None:
        """End its standard input."""
        _LOOP.wait(self._process.stdin.close())

    def output(self) -> Iterator[bytes]:
        """Its standard output, in chunks as they come."""
        while chunk := _LOOP.wait(self._process.stdout.read()):
            yield chunk

    def errors(self) -> Iterator[bytes]:
        """Its standard error, in chunks as they come."""
        while chunk := _LOOP.wait(self._process.stderr.read()):
            yield chunk

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        return _LOOP.wait(self._process.wait())

    def kill(self, number: int = 15) -> None:
        """Send a signal."""
        _LOOP.wait(self._process.kill(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal the size of the window."""
        _LOOP.wait(self._process.resize(rows, columns))

    def communicate(self, data: bytes = b"", limit: int | None = None) -> tuple[int, bytes, bytes]:
        """Write ``data``, read both outputs to their ends, and wait: status, output, errors."""
        return _LOOP.wait(self._process.communicate(data, limit))


class SyncContainer:
    """A container; see :class:`kata_lab.runtime.container.Container`."""

    def __init__(self, container: containers.Container) -> None:
        self._container = container
        self.id = container.id

    @property
    def asynchronous(self) -> containers.Container:
        """The container that this one stands for; its coroutines belong to another thread's loop."""
        return self._container

    @property
    def state(self) -> containers.ContainerState:
        """Where it is in its life."""
        return self._container.state

    def start(self) -> SyncProcess:
        """Let its first process run."""
        return SyncProcess(_LOOP.wait(self._container.start()))

    def exec(self, process: Mapping[str, Any], exec_id: str | None = None) -> SyncProcess:
        """Start one more process in it."""
        return SyncProcess(_LOOP.wait(self._container.exec(process, exec_id)))

    def kill(self, number: int = 15, everyone: bool = False) -> None:
        """Send a signal to its first process, or to all."""
        _LOOP.wait(self._container.kill(number, everyone))

    def wait(self) -> int:
        """Wait for the end of its first process."""
        return _LOOP.wait(self._container.wait())

    def pause(self) -> None:
        """Freeze all its processes."""
        _LOOP.wait(self._container.pause())

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        _LOOP.wait(self._container.resume())

    def update(self, resources: Mapping[str, Any]) -> None:
        """Change its limits."""
        _LOOP.wait(self._container.update(resources))

    def stats(self) -> dict[str, Any]:
        """What it uses."""
        return _LOOP.wait(self._container.stats())

    def remove(self) -> None:
        """Kill what is left of it and take it away."""
        _LOOP.wait(self._container.remove())


class Sandbox:
    """A sandbox; a context manager that starts and stops it. See :class:`kata_lab.runtime.sandbox.Sandbox`."""

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self._config = config if config is not None else SandboxConfig()
        self._sandbox: sandboxes.Sandbox | None = None

    @classmethod
    def create(cls, **config: Any) -> Sandbox:
        """A sandbox with these fields of :class:`~kata_lab.runtime.config.SandboxConfig`."""
        return cls(sandboxes.Sandbox.create(**config).config)

    @property
    def asynchronous(self) -> sandboxes.Sandbox:
        """The sandbox that this one stands for; its coroutines belong to another thread's loop.

        Raises:
            RuntimeFault: it was never started.
        """
        if self._sandbox is None:
            raise RuntimeFault("the sandbox is not started: use it within its with statement")
        return self._sandbox

    @property
    def id(self) -> str:
        """Its name."""
        return self.asynchronous.id

    @property
    def state(self) -> SandboxState:
        """Where it is in its life."""
        return SandboxState.INIT if self._sandbox is None else self._sandbox.state

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """What happened when, in seconds since its start."""
        return self.asynchronous.timeline

    def run(
        self,
        args: Sequence[str] = (),
        image: str | ImageHandle = "busybox",
        *,
        stdin: bytes = b"",
        limit: int | None = None,
        **wishes: Any,
    ) -> RunResult:
        """Run a container to its end and remove it."""
        return _LOOP.wait(self.asynchronous.run(args, image, stdin=stdin, limit=limit, **wishes))

    def new_container(
        self, args: Sequence[str] = (), image: str | ImageHandle = "busybox", **wishes: Any
    ) -> SyncContainer:
        """Create a container of an OCI image."""
        return SyncContainer(_LOOP.wait(self.asynchronous.new_container(args, image, **wishes)))

    @property
    def size(self) -> SandboxSize:
        """What it has now."""
        return self.asynchronous.size

    def resize(self, vcpus: int | None = None, memory_mib: int | None = None) -> SandboxSize:
        """Have so many vCPUs and so much memory; see :meth:`kata_lab.runtime.sandbox.Sandbox.resize`."""
        return _LOOP.wait(self.asynchronous.resize(vcpus, memory_mib))

    def add_device(self, device: DeviceConfig) -> str:
        """Plug in a disk, a network interface or a shared directory; its name."""
        return _LOOP.wait(self.asynchronous.add_device(device))

    def remove_device(self, name: str) -> None:
        """Undo :meth:`add_device`."""
        _LOOP.wait(self.asynchronous.remove_device(name))

    def pause(self) -> None:
        """Stop the whole guest until :meth:`resume`."""
        _LOOP.wait(self.asynchronous.pause())

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        _LOOP.wait(self.asynchronous.resume())

    def __enter__(self) -> Sandbox:
        _LOOP.enter()
        try:
            _LOOP.wait(self._begin())
        except BaseException:
            # Ctrl-C may have come when it had just started.
            self.__exit__(None, None, None)
            raise
        return self

    async def _begin(self) -> None:
        # Made on the loop's own thread, to which its locks and events belong.
        self._sandbox = sandboxes.Sandbox(self._config)
        await self._sandbox.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._sandbox is not None:
                _LOOP.wait(self._sandbox.stop())
        finally:
            _LOOP.leave()
