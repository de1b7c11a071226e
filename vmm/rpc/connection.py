"""The client's side of a connection: after Hello and Welcome, messages in both directions, on blocking calls."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar, cast

from vmm.actions import VmmAction
from vmm.rpc import wire
from vmm.rpc.endpoint import connect, peer_of

AnswerT = TypeVar("AnswerT")

_SEND_SECONDS: Final = 10  # for the other side to read what it is sent
_BUFFER: Final = 64 << 10


class Connection:
    """A connection to a process of ours; a context manager.

    Args:
        path: of its socket.
        what: what errors call the process, such as ``the VMM process``.
        timeout: seconds until it must have answered Hello.
        pid: which process must answer, None for any of this user.

    Raises:
        RpcError: nobody answers in time, or another process, or one of another version.
    """

    def __init__(self, path: Path, what: str, timeout: float, pid: int | None = None) -> None:
        self._what = what
        with contextlib.ExitStack() as made:
            self.socket = made.enter_context(connect(path, timeout))
            self._reader = made.enter_context(self.socket.makefile("rb", _BUFFER))
            if pid is not None and (found := peer_of(self.socket).pid) != pid:
                raise wire.RpcError(f"process {found} answers at the socket of {what} (process {pid})")
            self._greet(timeout)
            made.callback(self.hang_up)
            self._made = made.pop_all()

    def _greet(self, timeout: float) -> None:
        self.socket.settimeout(timeout)
        try:
            self.socket.sendall(wire.pack(wire.Hello(wire.PROTOCOL, wire.version())))
            message = self.receive()
        except OSError as error:
            raise wire.RpcError(f"{self._what} does not answer: {error}") from error
        self.socket.settimeout(None)
        # A process that does not read, as one that is stopped, must not stop its user.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        match message:
            case None:
                raise wire.RpcError(f"{self._what} hung up without a word")
            case wire.Refused(sentence):
                raise wire.RpcError(sentence)
            case wire.Welcome(wire.PROTOCOL, version) if version == wire.version():
                return
            case _:
                raise wire.RpcError(f"{self._what} answers {message}, which no client of this version knows")

    def send(self, message: bytes) -> None:
        """Send a frame; OSError if the other side has gone or does not read, after which the connection is useless."""
        self.socket.sendall(message)

    def receive(self) -> wire.Message | None:
        """The next message; None at the end of the connection.

        Raises:
            OSError: the connection broke.
            VmmError: what came is no message.
        """
        head: bytes = self._reader.read(wire.LENGTH.size)
        if len(head) < wire.LENGTH.size:
            return None
        (length,) = wire.LENGTH.unpack(head)
        if length > wire.MAX_FRAME:
            raise wire.RpcError(f"{self._what} sends a message of {length} bytes, it may have {wire.MAX_FRAME}")
        data: bytes = self._reader.read(length)
        return wire.unpack(data) if len(data) == length else None

    def ask(self, action: VmmAction[AnswerT], timeout: float) -> AnswerT:
        """Send an action and wait for its answer, where there is never another one under way.

        Raises:
            RpcError: the other side has gone, or has not answered within ``timeout`` seconds; the connection is useless
                from then on.
            VmmError: what it answered.
        """
        try:
            self.socket.settimeout(timeout)
            self.send(wire.pack(wire.Request(0, action)))
            message = self.receive()
        except OSError as error:
            self.hang_up()
            raise wire.RpcError(f"{self._what} has not answered {action.name}: {error}") from error
        match message:
            case wire.Answer(0, value):
                return cast(AnswerT, value)
            case wire.Failure():
                raise wire.rebuilt(message)
            case _:
                self.hang_up()
                raise wire.RpcError(f"{self._what} has gone before it answered {action.name}")

    def hang_up(self) -> None:
        """End the connection, also for a thread that waits in :meth:`receive`."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and give everything back. A second call does nothing."""
        self._made.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
