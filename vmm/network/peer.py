"""A port whose other end is a unix socket: another VM, a switch, a test.

Whoever comes first makes the socket and waits there: the link is down until a peer connects, and again after it has
left, until the next one comes. Whoever finds a listener connects to it; when that one leaves, the link stays down.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from vmm.config import NetworkConfig
from vmm.network.port import Inbox, NetworkError
from vmm.network.stream import LIKED_MTU, StreamPort


class PeerPort(StreamPort):
    """Frames to and from whoever is at a unix socket.

    Args:
        config: with a socket's path.

    Raises:
        NetworkError: neither can be connected to that path, nor a socket be made there.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(None, config.mtu or LIKED_MTU)
        assert config.socket is not None
        self._path = config.socket
        self._listener: socket.socket | None = None
        with contextlib.ExitStack() as opened:
            connection = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                connection.connect(os.fspath(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                self._listener = _listen(self._path)
                self._inbox.descriptor = self._listener.fileno()
            except OSError as error:
                raise NetworkError(f"the network socket {self._path} cannot be used: {error.strerror}") from error
            else:
                self.attach(connection)
                opened.pop_all()

    def receive(self, inbox: Inbox) -> bool:
        if self.up:
            return super().receive(inbox)
        if self._listener is not None:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self.attach(self._listener.accept()[0])
        return False

    def lose(self) -> None:
        super().lose()
        if self._listener is not None:
            self._inbox.descriptor = self._listener.fileno()

    def close(self) -> None:
        listener, self._listener = self._listener, None
        super().close()
        if listener is not None:
            listener.close()
            self._path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            if path.is_socket():
                path.unlink()  # of a process that is gone, since nobody answered
            listener.bind(os.fspath(path))
        except OSError as error:
            raise NetworkError(
                f"the network socket {path} cannot be made: {error.strerror or error}; choose a path in a directory"
                " that exists and can be written to"
            ) from error
        listener.listen(1)
        listener.setblocking(False)
        opened.pop_all()
        return listener
