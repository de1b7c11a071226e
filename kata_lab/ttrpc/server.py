"""A ttrpc server: every call runs as a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.protocol.proto import Interface, Method, load
from kata_lab.protocol.wire import WireError, decode, encode
from kata_lab.ttrpc.errors import RpcError, StatusCode
from kata_lab.ttrpc.frames import (
    MAX_DATA,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    Frame,
    FrameType,
    pack_frame,
    read_frame,
)

MAX_CALLS: Final = 1024  #: under way at once on one connection; more are refused

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """What a handler knows of its call, beside the request.

    Attributes:
        service: the service's full name.
        method: the method's name.
        timeout: seconds that the caller waits, or None.
        metadata: pairs that the caller sent along.
    """

    service: str
    method: str
    timeout: float | None
    metadata: dict[str, str]
    _send: Callable[[dict[str, Any]], Awaitable[None]]
    _received: asyncio.Queue[dict[str, Any] | None] = field(default_factory=lambda: asyncio.Queue(64))

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message of a method that streams back."""
        await self._send(message)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """The messages of a method that the caller streams to."""
        while (message := await self._received.get()) is not None:
            yield message


Handler = Callable[[dict[str, Any], Call], Awaitable[dict[str, Any] | None]]


class Server:
    """The answering side.

    Args:
        interface: the services that may be served.
    """

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._handlers: dict[tuple[str, str], tuple[Method, Handler]] = {}

    def add(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Serve methods of ``service``: ``async def handler(request, call)`` returns the answer, None for an empty one,
        or raises RpcError. Another KataLabError is told to the caller as UNKNOWN, a bug as INTERNAL.

        Raises:
            RpcError: the interface has no such method (UNIMPLEMENTED).
        """
        for name, handler in handlers.items():
            method = self._interface.services.get(service, {}).get(name)
            if method is None:
                raise RpcError(StatusCode.UNIMPLEMENTED, f"the interface has no method {service}/{name}")
            self._handlers[service, name] = method, handler

    @contextlib.asynccontextmanager
    async def listen(self, path: str | os.PathLike[str], mode: int = 0o600) -> AsyncIterator[None]:
        """Serve the unix socket at ``path`` until the context is left; the file is made, and removed.

        Raises:
            OSError: the socket cannot be made there.
        """
        connections: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self.serve(reader, writer), name="ttrpc-connection")
            connections.add(task)
            task.add_done_callback(connections.discard)

        before = os.umask(0o777 & ~mode)
        try:
            server = await asyncio.start_unix_server(connected, os.fspath(path))
        finally:
            os.umask(before)
        try:
            yield
        finally:
            server.close()
            for task in tuple(connections):
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            Path(path).unlink(missing_ok=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until its end; calls under way are then cancelled."""
        await _Connection(self._interface, self._handlers, reader, writer).serve()


class _Connection:
    def __init__(
        self,
        interface: Interface,
        handlers: Mapping[tuple[str, str], tuple[Method, Handler]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._interface = interface
        self._handlers = handlers
        self._reader = reader
        self._writer = writer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._open: dict[int, tuple[Method, Call]] = {}
        self._last_stream = 0

    async def serve(self) -> None:
        try:
            while (frame := await read_frame(self._reader)) is not None:
                if not await self._received(frame):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client is gone, and whom would it be told to
        finally:
            self._writer.close()
            tasks = tuple(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _received(self, frame: Frame) -> bool:
        """Act upon a frame; False where the client breaks the protocol and the connection must end."""
        if frame.type == FrameType.DATA:
            return await self._stream_data(frame)
        # Streams of a client are odd and only go up.
        if frame.type != FrameType.REQUEST or not frame.stream & 1 or frame.stream <= self._last_stream:
            return False
        self._last_stream = frame.stream
        if frame.oversized:
            text = f"a request has more than {MAX_DATA} bytes of data"
            await self._refuse(frame.stream, RpcError(StatusCode.RESOURCE_EXHAUSTED, text))
        elif len(self._tasks) >= MAX_CALLS:
            text = f"{MAX_CALLS} calls are under way on this connection, wait for some of them"
            await self._refuse(frame.stream, RpcError(StatusCode.RESOURCE_EXHAUSTED, text))
        else:
            try:
                method, handler, request, call = self._opened(frame)
            except RpcError as error:
                await self._refuse(frame.stream, error)
                return True
            task = asyncio.create_task(self._run(frame.stream, method, handler, request, call), name=call.method)
            self._tasks[frame.stream] = task
            task.add_done_callback(lambda _: self._forget(frame.stream))
        return True

    def _forget(self, stream: int) -> None:
        self._tasks.pop(stream, None)
        self._open.pop(stream, None)

    def _opened(self, frame: Frame) -> tuple[Method, Handler, dict[str, Any], Call]:
        try:
            envelope = decode(_ENVELOPE, "ttrpc.Request", frame.data)
        except WireError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"the request is not understood: {error}") from error
        service, name = envelope["service"], envelope["method"]
        if (service, name) not in self._handlers:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"there is no method {service}/{name}")
        method, handler = self._handlers[service, name]
        request: dict[str, Any] = {}
        if not frame.flags & REMOTE_OPEN:
            request = self._decoded(method, envelope["payload"])
        timeout = envelope["timeout_nano"] / 1e9 if envelope["timeout_nano"] > 0 else None
        metadata = {each["key"]: each["value"] for each in envelope["metadata"]}

        async def send(message: dict[str, Any]) -> None:
            data = encode(self._interface.messages, method.response, message)
            if len(data) > MAX_DATA:
                text = f"a message of {service}/{name} has {len(data)} bytes, at most {MAX_DATA} are allowed"
                raise RpcError(StatusCode.RESOURCE_EXHAUSTED, text)
            await self._write(pack_frame(frame.stream, FrameType.DATA, data))

        call = Call(service, name, timeout, metadata, send)
        if frame.flags & REMOTE_OPEN:
            self._open[frame.stream] = method, call
        return method, handler, request, call

    def _decoded(self, method: Method, data: bytes) -> dict[str, Any]:
        try:
            return decode(self._interface.messages, method.request, data)
        except WireError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, str(error)) from error

    async def _stream_data(self, frame: Frame) -> bool:
        if frame.stream > self._last_stream:
            return False
        found = self._open.get(frame.stream)
        if found is None:
            return True  # of a call that is over
        method, call = found
        if not frame.flags & NO_DATA:
            try:
                await call._received.put(self._decoded(method, frame.data))
            except RpcError as error:
                self._tasks[frame.stream].cancel()
                await self._refuse(frame.stream, error)
                return True
        if frame.flags & REMOTE_CLOSED:
            await call._received.put(None)
            self._open.pop(frame.stream, None)
        return True

    async def _run(self, stream: int, method: Method, handler: Handler, request: dict[str, Any], call: Call) -> None:
        try:
            async with asyncio.timeout(call.timeout):
                answer = await handler(request, call)
            payload = encode(self._interface.messages, method.response, answer or {})
            data = encode(_ENVELOPE, "ttrpc.Response", {"payload": payload})
            if len(data) > MAX_DATA:
                text = f"the answer of {call.service}/{call.method} has {len(data)} bytes, more than {MAX_DATA}"
                raise RpcError(StatusCode.RESOURCE_EXHAUSTED, text)
            if method.server_streams:
                await self._write(pack_frame(stream, FrameType.DATA, b"", REMOTE_CLOSED | NO_DATA))
            else:
                await self._write(pack_frame(stream, FrameType.RESPONSE, data))
        except RpcError as error:
            await self._refuse(stream, error)
        except TimeoutError:
            text = f"{call.service}/{call.method} did not end within the caller's {call.timeout} s"
            await self._refuse(stream, RpcError(StatusCode.DEADLINE_EXCEEDED, text))
        except KataLabError as error:
            await self._refuse(stream, RpcError(StatusCode.UNKNOWN, str(error)))
        except OSError:
            pass  # the client is gone
        except Exception as error:
            _log.exception("%s/%s failed", call.service, call.method)
            text = f"{call.service}/{call.method} raised {type(error).__name__}: {error}"
            await self._refuse(stream, RpcError(StatusCode.INTERNAL, text))

    async def _refuse(self, stream: int, error: RpcError) -> None:
        status = {"code": int(error.code), "message": str(error)[:4096]}
        data = encode(_ENVELOPE, "ttrpc.Response", {"status": status})
        with contextlib.suppress(OSError):
            await self._write(pack_frame(stream, FrameType.RESPONSE, data))

    async def _write(self, frame: bytes) -> None:
        self._writer.write(frame)
        await self._writer.drain()


_ENVELOPE: Final = load("ttrpc.proto").messages
