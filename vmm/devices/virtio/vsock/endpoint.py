"""The host's end of a guest's sockets in the hybrid way: unix sockets.

Who connects to the socket at the configured path writes ``CONNECT <port>`` and a line feed to reach that port of the
guest, and reads ``OK <host port>`` once the guest has accepted; on a refusal the connection is closed. What the guest
opens to port P of the host is connected to the unix socket ``<path>_P``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmm.devices.virtio.vsock.connection import SOCKET_BUFFER
from vmm.errors import VmmError

LONGEST_GREETING: Final = 32  #: bytes; the longest right one has 19
BACKLOG: Final = 4096

_GREETING: Final = re.compile(rb"CONNECT (\d{1,10})\r?\n")


class VsockError(VmmError):
    """A socket of the host that cannot be made, or a port of the guest that cannot be reached."""


class GreetingError(VsockError):
    """Who connected to the unix socket did not say ``CONNECT <port>``."""


class Listener:
    """The unix socket at ``path``, mode 0600, which :meth:`close` removes. A stale one is replaced.

    Raises:
        VsockError: the path is in use by a living process or by something else, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # On Linux the file gets the mode of the socket, less the umask.
            os.fchmod(self.socket.fileno(), 0o600)
            with _locked(path.parent):
                _remove_stale(path)
                self.socket.bind(os.fspath(path))
                made = os.lstat(path)
            self._identity = made.st_dev, made.st_ino
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise VsockError(
                f"no unix socket can be made at {str(path)!r} ({error.strerror}), its directory must be writable"
            ) from error
        except VsockError:
            self.socket.close()
            raise

    def accept(self) -> socket.socket | None:
        """The next connection, non-blocking; None when nobody waits.

        Raises:
            OSError: the host has no more file descriptors.
        """
        try:
            accepted, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        accepted.setblocking(False)
        return accepted

    def close(self) -> None:
        """Remove the file, unless somebody has put another one there."""
        if self.socket.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._identity:
                self.path.unlink()
        self.socket.close()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Two processes must not take each other's new socket for a stale one."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise VsockError(f"{str(path)!r} is no socket and is left alone; name a path that is free")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # so many wait for it that it must be alive
            pass
    raise VsockError(f"the socket {str(path)!r} belongs to a running process; name another path, or end that process")


def read_greeting(client: socket.socket) -> int | None:
    """The port that a client asks for; None while its line is not complete. What follows the line stays unread.

    Raises:
        GreetingError: the line is wrong or too long, or the client has gone.
    """
    try:
        line = client.recv(LONGEST_GREETING, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError as error:
        raise GreetingError(f"the client went away: {error.strerror}") from error
    end = line.find(b"\n") + 1
    if not end and line and len(line) < LONGEST_GREETING:
        return None
    match = _GREETING.fullmatch(line[:end])
    if match is None or int(match[1]) > 0xFFFF_FFFF:
        raise GreetingError(f"the client said {line!r}, it must say 'CONNECT <port>' and a line feed")
    client.recv(end)
    return int(match[1])


def dial_host(path: Path, port: int) -> socket.socket:
    """A non-blocking connection to ``<path>_<port>``.

    Raises:
        BlockingIOError: too many others wait for the one who listens there.
        OSError: nobody listens there, or the host has no more file descriptors.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        client.connect(f"{path}_{port}")
    except BaseException:
        client.close()
        raise
    enlarge(client)
    return client


def enlarge(*sockets: socket.socket) -> None:
    """Ask the host's kernel for buffers that make few and large transfers."""
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A non-blocking end for the device and a blocking one for who uses it in Python.

    Raises:
        OSError: the host has no more file descriptors.
    """
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    own.setblocking(False)
    enlarge(own, other)
    return own, other


async def dialled(future: concurrent.futures.Future[socket.socket]) -> socket.socket:
    """The socket of a connection that is being made. Who is cancelled meanwhile gives the connection up, also one that
    is made at that moment."""
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(_hang_up)
        raise


def _hang_up(future: concurrent.futures.Future[socket.socket]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
