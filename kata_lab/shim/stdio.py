"""Standard streams of the Task API: paths of named pipes and files that containerd made (containerd, cio).

A named pipe is opened for reading and writing, so that neither side's absence ends it or blocks the other: containerd
may start anew, and ends an input with CloseIO. A plain file is appended to, and read to its end. ``file://`` before a
path means the same; other schemes, which are programs of the host, are refused.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from kata_lab.shim.hub import Stream, Viewer
from kata_lab.ttrpc import RpcError, StatusCode

CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class StdioPaths:
    """Where a process's streams go; empty for nowhere."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""

    def check(self) -> None:
        """RpcError for what is no path (INVALID_ARGUMENT)."""
        for name in ("stdin", "stdout", "stderr"):
            plain_path(name, getattr(self, name))


def plain_path(name: str, value: str) -> str:
    """The path that a stream's name means; empty stays empty.

    Raises:
        RpcError: it means something else.
    """
    if not value or value.startswith("/"):
        return value
    parts = urlsplit(value)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return unquote(parts.path)
    text = f"{name} is {value!r}: it must be an absolute path of a named pipe or a file, or file:// with one"
    raise RpcError(StatusCode.INVALID_ARGUMENT, text)


class OutputFile:
    """Where one stream is written to; owns its descriptor."""

    def __init__(self, name: str, path: str) -> None:
        try:
            fifo = stat.S_ISFIFO(os.stat(path).st_mode) if os.path.exists(path) else False
            flags = os.O_RDWR if fifo else os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RpcError(StatusCode.NOT_FOUND, f"{name} {path!r} cannot be opened: {error.strerror}") from error

    async def write(self, data: bytes) -> None:
        """Write all of it; waits for a reader that has no room. OSError where the file cannot take it."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:
                await _ready(self._descriptor, writing=True)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


class InputFile:
    """Where standard input is read from; owns its descriptor."""

    def __init__(self, path: str) -> None:
        try:
            self._fifo = stat.S_ISFIFO(os.stat(path).st_mode)
            flags = os.O_RDWR if self._fifo else os.O_RDONLY
            self._descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise RpcError(StatusCode.NOT_FOUND, f"stdin {path!r} cannot be opened: {error.strerror}") from error
        self._ending = asyncio.Event()

    def end(self) -> None:
        """What is in the pipe now is the last."""
        self._ending.set()

    async def read(self) -> bytes:
        """Some bytes; none at the end."""
        while True:
            try:
                return os.read(self._descriptor, CHUNK)
            except BlockingIOError:
                if self._ending.is_set():
                    return b""
            ready = asyncio.ensure_future(_ready(self._descriptor, writing=False))
            ending = asyncio.ensure_future(self._ending.wait())
            try:
                await asyncio.wait((ready, ending), return_when=asyncio.FIRST_COMPLETED)
            finally:
                ready.cancel()
                ending.cancel()
                await asyncio.gather(ready, ending, return_exceptions=True)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


async def copy_outputs(viewer: Viewer, files: dict[Stream, OutputFile]) -> None:
    """Write what a viewer sees until its end; a file that takes no more gets no more."""
    try:
        async for stream, data in viewer:
            file = files.get(stream)
            if file is None:
                continue
            try:
                await file.write(data)
            except OSError:
                files.pop(stream).close()
    finally:
        viewer.close()
        for file in files.values():
            file.close()


async def _ready(descriptor: int, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def happened() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(descriptor, happened)
    try:
        await ready
    finally:
        remove(descriptor)
