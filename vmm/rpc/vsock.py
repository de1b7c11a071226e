"""A guest's sockets from another process: the host's side of a vsock device in the hybrid way.

To reach port P of the guest, connect to the device's unix socket, write ``CONNECT P`` and a line feed, and read ``OK``
and a number; a refusal is the end of the connection. What the guest opens to port P of the host arrives at the unix
socket ``<path>_P``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from vmm.config import VmConfig, VsockConfig
from vmm.devices.virtio.vsock.endpoint import Listener, VsockError

_LONGEST_REPLY: Final = 32  # bytes
_REPLY: Final = re.compile(rb"OK \d{1,10}\n")
_BACKLOG_SECONDS: Final = 10.0  # for the VMM process to accept a connection

Accept = Callable[[socket.socket], object]


class VsockPorts:
    """Dials and listens for a VM with a vsock device; a context manager that ends all listening.

    Args:
        config: gives the VM's configuration as it stands.
    """

    def __init__(self, config: Callable[[], VmConfig]) -> None:
        self._config = config
        self._listeners: dict[int, tuple[Listener, threading.Thread]] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The unix socket of the VM's first vsock device that has one.

        Raises:
            VsockError: there is none.
        """
        for each in self._config().devices:
            if isinstance(each, VsockConfig) and each.socket is not None:
                return each.socket
        raise VsockError("the VM has no vsock device with a unix socket; add VsockConfig(socket=…) to its devices")

    def dial(self, port: int) -> concurrent.futures.Future[socket.socket]:
        """Connect to a port of the guest, as :meth:`vmm.rpc.client.RemoteVm.dial` says."""
        path = self.path
        future: concurrent.futures.Future[socket.socket] = concurrent.futures.Future()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

        def give_up(done: concurrent.futures.Future[socket.socket]) -> None:
            if done.cancelled():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        def work() -> None:
            try:
                _connect(connection, path, port)
                future.set_result(connection)
            except concurrent.futures.InvalidStateError:
                connection.close()
            except VsockError as error:
                connection.close()
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    future.set_exception(error)

        future.add_done_callback(give_up)
        threading.Thread(target=work, name=f"vsock-dial-{port}", daemon=True).start()
        return future

    def listen(self, port: int, accept: Accept) -> None:
        """Listen at a port of the host, as :meth:`vmm.rpc.client.RemoteVm.listen` says."""
        with self._lock:
            if port in self._listeners:
                raise VsockError(f"port {port} has a listener already; choose another port")
            listener = Listener(Path(f"{self.path}_{port}"))
            thread = threading.Thread(
                target=_accept_all, args=(listener.socket, accept), name=f"vsock-listen-{port}", daemon=True
            )
            self._listeners[port] = listener, thread
            thread.start()

    def unlisten(self, port: int) -> None:
        """Undo :meth:`listen`; of a port without a listener, nothing."""
        with self._lock:
            found = self._listeners.pop(port, None)
        if found is not None:
            listener, thread = found
            with contextlib.suppress(OSError):
                listener.socket.shutdown(socket.SHUT_RDWR)  # ends accept()
            if thread is not threading.current_thread():
                thread.join()
            listener.close()

    def __enter__(self) -> VsockPorts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for port in list(self._listeners):
            self.unlisten(port)


def _connect(connection: socket.socket, path: Path, port: int) -> None:
    try:
        connection.settimeout(_BACKLOG_SECONDS)
        connection.connect(os.fspath(path))
        connection.settimeout(None)
        connection.sendall(b"CONNECT %d\n" % port)
        reply = b""
        # Byte by byte at the end, since what follows the line is for whoever dialled.
        while not reply.endswith(b"\n") and len(reply) < _LONGEST_REPLY:
            byte = connection.recv(1)
            if not byte:
                raise VsockError(f"port {port} of the guest cannot be reached: nobody listens there yet")
            reply += byte
    except OSError as error:
        raise VsockError(f"port {port} of the guest cannot be reached at {str(path)!r}: {error.strerror}") from error
    if not _REPLY.fullmatch(reply):
        raise VsockError(f"port {port} of the guest cannot be reached: {str(path)!r} answered {reply!r}, not OK")


def _accept_all(listener: socket.socket, accept: Accept) -> None:
    listener.setblocking(True)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setblocking(True)
        accept(connection)
