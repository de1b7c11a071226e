"""A ttrpc client: many calls at once over one connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Final

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

_LAST_STREAM: Final = (1 << 31) - 1
_BUFFERED_MESSAGES: Final = 64  #: of a stream that nobody reads; then the connection waits for its reader


class Client:
    """The calling side of a connection. An asynchronous context manager.

    Args:
        reader: what the server sends.
        writer: what goes to the server; it is the client's own from now on.
        interface: the services that may be called.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, interface: Interface) -> None:
        self._reader = reader
        self._writer = writer
        self._interface = interface
        self._next_stream = 1
        self._calls: dict[int, asyncio.Queue[Frame | RpcError]] = {}
        self._lost: RpcError | None = None
        self._task = asyncio.create_task(self._receive(), name="ttrpc-client")

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], interface: Interface) -> Client:
        """Connect to the unix socket at ``path``.

        Raises:
            RpcError: nobody listens there (UNAVAILABLE).
        """
        try:
            reader, writer = await asyncio.open_unix_connection(os.fspath(path))
        except OSError as error:
            raise RpcError(
                StatusCode.UNAVAILABLE, f"nobody listens at {os.fspath(path)!r}: {error.strerror}"
            ) from error
        return cls(reader, writer, interface)

    @classmethod
    async def over(cls, connection: socket.socket, interface: Interface) -> Client:
        """Use a connected socket, which is the client's own from now on."""
        reader, writer = await asyncio.open_connection(sock=connection)
        return cls(reader, writer, interface)

    async def call(
        self, service: str, method: str, message: dict[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Make a unary call and return its answer.

        Args:
            service: the service's full name.
            method: the method's name.
            message: the request.
            timeout: seconds, also told to the server.

        Raises:
            RpcError: the call failed; DEADLINE_EXCEEDED after ``timeout``, UNAVAILABLE where the connection is lost.
        """
        found = self._method(service, method)
        async with self._opened(service, method, found, message, timeout, 0) as (_, answers):
            try:
                async with asyncio.timeout(timeout):
                    return self._answer(found, await answers.get(), f"{service}/{method}")
            except TimeoutError:
                text = f"{service}/{method} was not answered within {timeout:g} s"
                raise RpcError(StatusCode.DEADLINE_EXCEEDED, text) from None

    @contextlib.asynccontextmanager
    async def stream(
        self, service: str, method: str, message: dict[str, Any] | None = None, timeout: float | None = None
    ) -> AsyncIterator[ClientStream]:
        """Open a streaming call; see :class:`ClientStream`. ``message`` is what a method takes that streams only back.

        Raises:
            RpcError: as :meth:`call`.
        """
        found = self._method(service, method)
        flags = REMOTE_OPEN if found.client_streams else REMOTE_CLOSED
        async with self._opened(service, method, found, message, timeout, flags) as (number, answers):
            yield ClientStream(self, number, found, answers, f"{service}/{method}")

    async def close(self) -> None:
        """Close the connection; calls under way fail with UNAVAILABLE."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._lose(RpcError(StatusCode.UNAVAILABLE, "the connection was closed"))
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    @property
    def lost(self) -> RpcError | None:
        """Why the connection is of no more use; None while it is."""
        return self._lost

    async def wait_lost(self) -> RpcError:
        """Wait until the connection is of no more use, and say why."""
        await asyncio.wait((self._task,))
        return self._lost or RpcError(StatusCode.UNAVAILABLE, "the connection was closed")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _method(self, service: str, method: str) -> Method:
        found = self._interface.services.get(service, {}).get(method)
        if found is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"the interface has no method {service}/{method}")
        return found

    def _encode(self, kind: str, message: dict[str, Any] | None) -> bytes:
        try:
            return encode(self._interface.messages, kind, message or {})
        except WireError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, str(error)) from error

    @contextlib.asynccontextmanager
    async def _opened(
        self,
        service: str,
        name: str,
        method: Method,
        message: dict[str, Any] | None,
        timeout: float | None,
        flags: int,
    ) -> AsyncIterator[tuple[int, asyncio.Queue[Frame | RpcError]]]:
        if self._lost is not None:
            raise self._lost
        payload = b"" if flags & REMOTE_OPEN else self._encode(method.request, message)
        request: dict[str, Any] = {"service": service, "method": name, "payload": payload}
        if timeout is not None:
            request["timeout_nano"] = max(int(timeout * 1e9), 1)
        data = encode(_ENVELOPE, "ttrpc.Request", request)
        if len(data) > MAX_DATA:
            text = f"the request of {service}/{name} has {len(data)} bytes, at most {MAX_DATA} are allowed"
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, text)
        number = self._next_stream
        if number > _LAST_STREAM:
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, "the connection has used up its streams; open another one")
        self._next_stream += 2
        answers: asyncio.Queue[Frame | RpcError] = asyncio.Queue(_BUFFERED_MESSAGES)
        self._calls[number] = answers
        try:
            await self.send(pack_frame(number, FrameType.REQUEST, data, flags))
            yield number, answers
        finally:
            self._calls.pop(number, None)
            # Whoever waits to hand a message to this call goes on.
            while not answers.empty():
                answers.get_nowait()

    async def send(self, frame: bytes) -> None:
        """Write a frame; RpcError if the connection is lost."""
        try:
            self._writer.write(frame)
            await self._writer.drain()
        except OSError as error:
            raise self._lose(RpcError(StatusCode.UNAVAILABLE, f"the connection is lost: {error}")) from error

    def _answer(self, method: Method, received: Frame | RpcError, what: str) -> dict[str, Any]:
        if isinstance(received, RpcError):
            raise received
        if received.oversized:
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"the answer of {what} is longer than {MAX_DATA} bytes")
        try:
            if received.type == FrameType.DATA:
                return decode(self._interface.messages, method.response, received.data)
            response = decode(_ENVELOPE, "ttrpc.Response", received.data)
            status = response["status"]
            if status is not None and status["code"] != StatusCode.OK:
                known = status["code"] in StatusCode._value2member_map_
                raise RpcError(StatusCode(status["code"]) if known else StatusCode.UNKNOWN, status["message"])
            return decode(self._interface.messages, method.response, response["payload"])
        except WireError as error:
            raise RpcError(StatusCode.INTERNAL, f"the answer of {what} is not understood: {error}") from error

    async def _receive(self) -> None:
        lost = "the server closed the connection"
        try:
            while (frame := await read_frame(self._reader)) is not None:
                if frame.type not in (FrameType.RESPONSE, FrameType.DATA):
                    lost = f"the server sent a frame of type {frame.type}, which is none of a server's"
                    break
                # Answers to calls that were given up have nobody to go to.
                if (answers := self._calls.get(frame.stream)) is not None:
                    await answers.put(frame)
        except (OSError, asyncio.IncompleteReadError) as error:
            lost = f"the connection is lost: {error}"
        self._lose(RpcError(StatusCode.UNAVAILABLE, lost))
        self._writer.close()

    def _lose(self, error: RpcError) -> RpcError:
        if self._lost is None:
            self._lost = error
            for answers in self._calls.values():
                if answers.full():
                    answers.get_nowait()
                answers.put_nowait(error)
        return self._lost


class ClientStream:
    """A streaming call: messages go both ways until both sides have said their last. Iterate to receive."""

    def __init__(
        self, client: Client, number: int, method: Method, answers: asyncio.Queue[Frame | RpcError], what: str
    ) -> None:
        self._client = client
        self._number = number
        self._method = method
        self._answers = answers
        self._what = what
        self._over = False

    async def send(self, message: dict[str, Any]) -> None:
        """Send one message; RpcError if the connection is lost or the message is not the method's."""
        await self._send(self._client._encode(self._method.request, message), 0)

    async def send_end(self) -> None:
        """Say that nothing more is sent."""
        await self._send(b"", REMOTE_CLOSED | NO_DATA)

    async def _send(self, data: bytes, flags: int) -> None:
        if len(data) > MAX_DATA:
            text = f"a message of {self._what} has {len(data)} bytes, at most {MAX_DATA} are allowed"
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, text)
        await self._client.send(pack_frame(self._number, FrameType.DATA, data, flags))

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the server has sent its last. RpcError if the call failed."""
        if self._over:
            return None
        received = await self._answers.get()
        if isinstance(received, Frame):
            last = received.type == FrameType.RESPONSE or received.flags & REMOTE_CLOSED
            self._over = bool(last)
            empty = received.type == FrameType.DATA and received.flags & NO_DATA
            if empty or (received.type == FrameType.RESPONSE and self._method.server_streams):
                self._client._answer(self._method, received, self._what)
                return None
        else:
            self._over = True
        return self._client._answer(self._method, received, self._what)

    def __aiter__(self) -> ClientStream:
        return self

    async def __anext__(self) -> dict[str, Any]:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message


_ENVELOPE: Final = load("ttrpc.proto").messages
