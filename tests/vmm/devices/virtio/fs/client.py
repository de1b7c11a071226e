"""A FUSE client in Python for tests: it sends what Linux sends, and anything else a test wants to."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.devices.virtio.driver import Buffer, Driver, driven
from vmm.config import FsConfig
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.device import FsDevice
from vmm.devices.virtio.fs.directory import SharedDirectory
from vmm.devices.virtio.fs.protocol import Feature, Opcode

PRIORITY, REQUESTS = 0, 1
ALL_FEATURES = (1 << 38) - 1
ROOM = 4096


@dataclass
class Entry:
    """What a lookup answers."""

    node: int
    attributes: dict[str, Any]
    entry_valid: int
    attr_valid: int


class Client:
    """A session over a device's driver. Memory that requests used is used again."""

    def __init__(self, driver: Driver, init: bool = True) -> None:
        self.driver = driver
        assert isinstance(driver.device, SharedDirectory)
        self.device = driver.device
        self._unique = itertools.count(2, 2)
        self._mark = driver._next
        self.uid = self.gid = 0
        if init:
            self.init()

    def header(self, opcode: int, node: int, length: int, unique: int | None = None) -> bytes:
        unique = next(self._unique) if unique is None else unique
        return fuse.IN_HEADER.pack(length, opcode, unique, node, self.uid, self.gid, 1, 0)

    def send(self, opcode: int, node: int, *parts: bytes, room: int = ROOM, queue: int = REQUESTS) -> Buffer:
        """Make a request available and notify; the buffer is answered later or at once."""
        length = fuse.ARGUMENTS + sum(map(len, parts))
        body = [self.header(opcode, node, length), *(part for part in parts if part)]
        buffer = self.driver.add(queue, body, [16, room] if room else [])
        self.driver.notify(queue)
        return buffer

    def post(self, opcode: int, node: int, *parts: bytes) -> Buffer:
        """Send a request whose answer comes later; its memory is not used for others."""
        self.driver._next = self._mark
        buffer = self.send(opcode, node, *parts)
        self._mark = self.driver._next
        return buffer

    def receive(self, buffer: Buffer, queue: int = REQUESTS) -> bytes:
        """The results; OSError with the errno of the answer."""
        (done,) = self.driver.wait(queue)
        assert done is buffer
        return self.results(done)

    def results(self, buffer: Buffer) -> bytes:
        data = self.driver.contents(buffer)
        length, error, _ = fuse.OUT_HEADER.unpack(data)
        assert length == len(data)
        if error:
            raise OSError(-error, os.strerror(-error))
        return data[fuse.RESULTS :]

    def call(self, opcode: int, node: int, *parts: bytes, room: int = ROOM, queue: int = REQUESTS) -> bytes:
        self.driver._next = self._mark
        return self.receive(self.send(opcode, node, *parts, room=room, queue=queue), queue)

    def tell(self, opcode: int, node: int, *parts: bytes, queue: int = PRIORITY) -> None:
        """A request that is not answered."""
        self.driver._next = self._mark
        buffer = self.send(opcode, node, *parts, room=0, queue=queue)
        (done,) = self.driver.wait(queue)
        assert done is buffer
        assert done.written == 0

    def init(self, features: int = ALL_FEATURES, minor: int = 41, major: int = 7) -> dict[str, Any]:
        flags = features & 0xFFFF_FFFF
        data = self.call(
            Opcode.INIT, 0, fuse.INIT_IN.pack(major, minor, 131072, flags), struct.pack("<I44x", features >> 32)
        )
        answer = fuse.INIT_OUT.decode(data)
        answer["features"] = Feature(answer["flags"] | answer["flags2"] << 32)
        return answer

    # Names.

    def entry(self, data: bytes) -> Entry:
        fields = fuse.ENTRY_OUT.decode(data)
        return Entry(fields["nodeid"], fields, fields["entry_valid"], fields["attr_valid"])

    def lookup(self, name: bytes, parent: int = fuse.ROOT) -> Entry:
        return self.entry(self.call(Opcode.LOOKUP, parent, name + b"\0"))

    def walk(self, path: str) -> int:
        node = fuse.ROOT
        for name in path.split("/"):
            node = self.lookup(name.encode(), node).node
        return node

    def mkdir(self, name: bytes, mode: int = 0o755, parent: int = fuse.ROOT) -> Entry:
        return self.entry(self.call(Opcode.MKDIR, parent, fuse.MKDIR_IN.pack(mode, 0), name + b"\0"))

    def mknod(self, name: bytes, mode: int, device: int = 0, parent: int = fuse.ROOT) -> Entry:
        return self.entry(self.call(Opcode.MKNOD, parent, fuse.MKNOD_IN.pack(mode, device, 0), name + b"\0"))

    def symlink(self, name: bytes, target: bytes, parent: int = fuse.ROOT) -> Entry:
        return self.entry(self.call(Opcode.SYMLINK, parent, name + b"\0" + target + b"\0"))

    def readlink(self, node: int) -> bytes:
        return self.call(Opcode.READLINK, node)

    def link(self, node: int, name: bytes, parent: int = fuse.ROOT) -> Entry:
        return self.entry(self.call(Opcode.LINK, parent, fuse.LINK_IN.pack(node), name + b"\0"))

    def unlink(self, name: bytes, parent: int = fuse.ROOT) -> None:
        self.call(Opcode.UNLINK, parent, name + b"\0")

    def rmdir(self, name: bytes, parent: int = fuse.ROOT) -> None:
        self.call(Opcode.RMDIR, parent, name + b"\0")

    def rename(self, old: bytes, new: bytes, flags: int = 0, parent: int = fuse.ROOT, target: int = fuse.ROOT) -> None:
        self.call(Opcode.RENAME2, parent, fuse.RENAME2_IN.pack(target, flags), old + b"\0" + new + b"\0")

    def forget(self, node: int, count: int = 1) -> None:
        self.tell(Opcode.FORGET, node, fuse.FORGET_IN.pack(count))

    # Attributes.

    def getattr(self, node: int, handle: int | None = None) -> dict[str, Any]:
        flags = 0 if handle is None else fuse.GETATTR_FH
        return fuse.ATTR_OUT.decode(self.call(Opcode.GETATTR, node, fuse.GETATTR_IN.pack(flags, handle or 0)))

    def setattr(self, node: int, valid: fuse.SetAttr, **fields: int) -> dict[str, Any]:
        values = dict.fromkeys(fuse.SETATTR_IN.fields, 0) | {"valid": int(valid)} | fields
        return fuse.ATTR_OUT.decode(self.call(Opcode.SETATTR, node, fuse.SETATTR_IN.pack(*values.values())))

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self.call(Opcode.SETXATTR, node, fuse.SETXATTR_IN_EXT.pack(len(value), flags, 0), name + b"\0" + value)

    def getxattr(self, node: int, name: bytes, size: int = 0) -> bytes:
        return self.call(Opcode.GETXATTR, node, fuse.GETXATTR_IN.pack(size), name + b"\0", room=max(size, 64))

    def listxattr(self, node: int, size: int = 0) -> bytes:
        return self.call(Opcode.LISTXATTR, node, fuse.GETXATTR_IN.pack(size), room=max(size, 64))

    # Files.

    def open(self, node: int, flags: int = os.O_RDONLY, how: int = 0) -> int:
        return self.open_out(node, flags, how)["fh"]

    def open_out(self, node: int, flags: int = os.O_RDONLY, how: int = 0) -> dict[str, Any]:
        return fuse.OPEN_OUT.decode(self.call(Opcode.OPEN, node, fuse.OPEN_IN.pack(flags, how)))

    def create(
        self, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644, parent: int = fuse.ROOT
    ) -> tuple[Entry, int]:
        data = self.call(Opcode.CREATE, parent, fuse.CREATE_IN.pack(flags | os.O_CREAT, mode, 0, 0), name + b"\0")
        return self.entry(data), fuse.OPEN_OUT.decode(data, fuse.ENTRY_OUT.size)["fh"]

    def read(self, handle: int, offset: int, size: int, node: int = 0) -> bytes:
        return self.call(Opcode.READ, node, fuse.READ_IN.pack(handle, offset, size, 0, 0, 0), room=size)

    def write(self, handle: int, offset: int, data: bytes, how: int = 0, flags: int = 0) -> int:
        arguments = fuse.WRITE_IN.pack(handle, offset, len(data), how, 0, flags)
        (written,) = fuse.WRITE_OUT.unpack(self.call(Opcode.WRITE, 0, arguments, data))
        return written

    def release(self, handle: int, directory: bool = False) -> None:
        opcode = Opcode.RELEASEDIR if directory else Opcode.RELEASE
        self.call(opcode, 0, fuse.RELEASE_IN.pack(handle, 0, 0, 0))

    def flush(self, handle: int, owner: int = 0) -> None:
        self.call(Opcode.FLUSH, 0, fuse.FLUSH_IN.pack(handle, owner))

    def lock(
        self, opcode: int, handle: int, owner: int, kind: int, start: int = 0, end: int = (1 << 63) - 1, flags: int = 0
    ) -> bytes:
        return self.call(opcode, 0, fuse.LK_IN.pack(handle, owner, start, end, kind, 0, flags))

    # Directories.

    def opendir(self, node: int) -> int:
        return fuse.OPEN_OUT.decode(self.call(Opcode.OPENDIR, node, fuse.OPEN_IN.pack(0, 0)))["fh"]

    def readdir(self, handle: int, offset: int = 0, size: int = ROOM) -> list[tuple[dict[str, Any], bytes]]:
        data = self.call(Opcode.READDIR, 0, fuse.READ_IN.pack(handle, offset, size, 0, 0, 0), room=size)
        return [(fields, name) for _, fields, name in self._entries(data, plus=False)]

    def readdirplus(
        self, handle: int, offset: int = 0, size: int = ROOM, node: int = fuse.ROOT
    ) -> list[tuple[Entry, dict[str, Any], bytes]]:
        data = self.call(Opcode.READDIRPLUS, node, fuse.READ_IN.pack(handle, offset, size, 0, 0, 0), room=size)
        return [(entry, fields, name) for entry, fields, name in self._entries(data, plus=True) if entry is not None]

    def _entries(self, data: bytes, plus: bool) -> Iterator[tuple[Entry | None, dict[str, Any], bytes]]:
        at = 0
        while at < len(data):
            entry = None
            if plus:
                entry = self.entry(data[at:])
                at += fuse.ENTRY_OUT.size
            fields = fuse.DIRENT.decode(data, at)
            start = at + fuse.DIRENT.size
            yield entry, fields, data[start : start + fields["namelen"]]
            at = start + fields["namelen"] + -fields["namelen"] % 8

    def names(self, node: int = fuse.ROOT, size: int = ROOM) -> list[bytes]:
        """All names of a directory, in several requests where one does not do."""
        handle, offset, names = self.opendir(node), 0, []
        while found := self.readdir(handle, offset, size):
            names += [name for _, name in found]
            offset = found[-1][0]["off"]
        self.release(handle, directory=True)
        return names


def refused(code: int) -> Any:
    """A context that expects an OSError with this errno."""
    return pytest.raises(OSError, match=rf"\[Errno {code}\]")


@contextmanager
def mounted(path: Path, descriptors: int = 0, init: bool = True, **settings: Any) -> Iterator[Client]:
    """A share, with a client that did INIT."""
    device = FsDevice(FsConfig(path=path, tag="share", **settings), descriptors)
    with driven(device, size=512) as driver:
        yield Client(driver, init)
