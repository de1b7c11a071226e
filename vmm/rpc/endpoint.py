"""A unix socket that only its owner can use, as unix(7) has it.

Whoever can write to the socket's file can connect, and whoever can write to its directory can put another one in its
place: the directory must belong to this user and be closed to all others, the file has mode 0600, and each side asks
the kernel who the other one is (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmm.rpc.wire import RpcError

MAX_PATH_BYTES: Final = 107
_BACKLOG: Final = 16
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a connection, as it was when it connected or listened."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return Peer(pid, uid)


def require_owner(connection: socket.socket) -> Peer:
    """Who is at the other end, which must be a process of this user.

    Raises:
        RpcError: it belongs to another user.
    """
    peer = peer_of(connection)
    if peer.uid != os.geteuid():
        raise RpcError(f"process {peer.pid} belongs to user {peer.uid}, the socket is for user {os.geteuid()} only")
    return peer


class PrivateListener:
    """A listening unix socket at ``path``, removed by :meth:`close`; a stale one is replaced.

    Raises:
        RpcError: the directory is not private to this user, the path is too long, in use, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_private(path.parent)
        if (length := len(os.fsencode(path))) > MAX_PATH_BYTES:
            raise RpcError(f"the socket {str(path)!r} has a path of {length} bytes, it may have {MAX_PATH_BYTES}")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # On Linux the file gets the mode of the socket, less the umask.
            os.fchmod(self.socket.fileno(), 0o600)
            _remove_stale(path)
            self.socket.bind(os.fspath(path))
            made = os.lstat(path)
            self._identity: tuple[int, int] | None = (made.st_dev, made.st_ino)
            self.socket.listen(_BACKLOG)
        except OSError as error:
            self.socket.close()
            raise RpcError(f"no socket can be made at {str(path)!r}: {error.strerror or error}") from error
        except RpcError:
            self.socket.close()
            raise

    def close(self) -> None:
        """Remove the file, unless somebody has put another one there. A second call does nothing."""
        identity, self._identity = self._identity, None
        if identity is not None:
            with contextlib.suppress(OSError):
                found = os.lstat(self.path)
                if (found.st_dev, found.st_ino) == identity:
                    self.path.unlink()
        self.socket.close()


def connect(path: Path, timeout: float) -> socket.socket:
    """A blocking connection to the socket at ``path``, which belongs to this user.

    Raises:
        RpcError: nobody listens there within ``timeout`` seconds, or a process of another user does.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout)
        made.connect(os.fspath(path))
        require_owner(made)
        made.settimeout(None)
    except OSError as error:
        made.close()
        raise RpcError(f"nobody answers at the socket {str(path)!r}: {error.strerror or error}") from error
    except BaseException:
        made.close()
        raise
    return made


def _require_private(directory: Path) -> None:
    try:
        found = os.stat(directory)
    except OSError as error:
        raise RpcError(f"the socket's directory {str(directory)!r} cannot be used: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or mode & 0o077:
        raise RpcError(
            f"the socket's directory {str(directory)!r} has mode {mode:o} and belongs to user {found.st_uid}; it must"
            f" be closed to all but user {os.geteuid()}: chmod 700"
        )


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise RpcError(f"{str(path)!r} is no socket and is left alone; name a path that is free")
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
    raise RpcError(f"the socket {str(path)!r} belongs to a running process; name another path, or end that process")
