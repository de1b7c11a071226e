"""A process in a container: its standard streams, signals and end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Final

from kata_lab.agent.client import AgentClient
from kata_lab.runtime.errors import RuntimeFault, first_error
from kata_lab.ttrpc import RpcError, StatusCode

CHUNK: Final = 1 << 17  #: bytes asked for at once


class OutputStream:
    """What a process writes to one of its standard streams. Iterate over it for chunks of bytes as they come."""

    def __init__(self, agent: AgentClient, method: str, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._method = method
        self._ids = {"container_id": container_id, "exec_id": exec_id}

    async def read(self, limit: int = CHUNK) -> bytes:
        """What there is, at most ``limit`` bytes; waits for the first. Nothing means that the stream has ended."""
        return bytes((await self._agent.call(self._method, **self._ids, len=limit))["data"])

    async def read_all(self, limit: int | None = None) -> bytes:
        """Everything until the end.

        Raises:
            RuntimeFault: it is more than ``limit`` bytes.
        """
        data = bytearray()
        async for chunk in self:
            data += chunk
            if limit is not None and len(data) > limit:
                raise RuntimeFault(f"the output has more than {limit} bytes; read it as a stream, or allow more")
        return bytes(data)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.read():
            yield chunk


class InputStream:
    """The standard input of a process."""

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._ids = {"container_id": container_id, "exec_id": exec_id}

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``; returns when the agent has taken it.

        Raises:
            RpcError: the process reads no more.
        """
        view = memoryview(data)
        while view:
            answer = await self._agent.call("WriteStdin", **self._ids, data=bytes(view[:CHUNK]))
            view = view[answer["len"] :]

    async def close(self) -> None:
        """The process reads the end of its input."""
        await self._agent.call("CloseStdin", **self._ids)


class Process:
    """A process in a container.

    Args:
        agent: who knows it.
        container_id: its container.
        exec_id: its name there; that of the container's first process is the container's.
        terminal: whether it has a terminal, then without a standard error of its own.
    """

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str, terminal: bool = False) -> None:
        self._agent = agent
        self.container_id = container_id
        self.exec_id = exec_id
        self.terminal = terminal
        self.stdin = InputStream(agent, container_id, exec_id)
        self.stdout = OutputStream(agent, "ReadStdout", container_id, exec_id)
        self.stderr = OutputStream(agent, "ReadStderr", container_id, exec_id)
        self._status: asyncio.Task[int] | None = None

    @property
    def status(self) -> int | None:
        """The exit status, 128 + n after signal n; None while it is not known."""
        ended = self._status
        return ended.result() if ended is not None and ended.done() and ended.exception() is None else None

    async def wait(self) -> int:
        """Wait for its end; the exit status, 128 + n after signal n. Any number may wait, any number of times."""
        if self._status is None:
            self._status = asyncio.create_task(self._wait(), name=f"wait-{self.exec_id}")
        return await asyncio.shield(self._status)

    async def _wait(self) -> int:
        answer = await self._agent.call("WaitProcess", container_id=self.container_id, exec_id=self.exec_id)
        return int(answer["status"])

    async def kill(self, number: int = signal.SIGTERM) -> None:
        """Send a signal. One that has ended gets none, which is no error."""
        try:
            await self._agent.call(
                "SignalProcess", container_id=self.container_id, exec_id=self.exec_id, signal=int(number)
            )
        except RpcError as error:
            if error.code is not StatusCode.NOT_FOUND or self.status is None:
                raise

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal the size of the window."""
        await self._agent.call(
            "TtyWinResize", container_id=self.container_id, exec_id=self.exec_id, row=rows, column=columns
        )

    async def communicate(self, data: bytes = b"", limit: int | None = None) -> tuple[int, bytes, bytes]:
        """Write ``data`` and close the input, read both outputs to their ends, and wait: status, output, errors.

        Raises:
            RuntimeFault: an output has more than ``limit`` bytes.
            RpcError: the guest is gone.
        """

        async def feed() -> None:
            # A process that does not want its input is not wrong.
            with contextlib.suppress(RpcError):
                if data:
                    await self.stdin.write(data)
                await self.stdin.close()

        async def errors() -> bytes:
            return b"" if self.terminal else await self.stderr.read_all(limit)

        try:
            async with asyncio.TaskGroup() as group:
                feeding = group.create_task(feed())
                output = group.create_task(self.stdout.read_all(limit))
                complaints = group.create_task(errors())
                status = await self.wait()
                # It reads no more; what it left unread may never be taken.
                feeding.cancel()
        except BaseExceptionGroup as group_of_errors:
            raise first_error(group_of_errors) from None
        return status, output.result(), complaints.result()
