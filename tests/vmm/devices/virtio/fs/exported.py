"""A share that has only exports, two directories of the host of which one can only be read, and what is seen of it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.devices.virtio.driver import driven
from tests.vmm.devices.virtio.fs.client import Client
from vmm.config import FsConfig
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.device import FsDevice
from vmm.devices.virtio.fs.protocol import Opcode

STATX = struct.Struct("<28xH2xQ88x2I")  # struct statx: mode, inode number, a device's major and minor


@contextmanager
def exported(descriptors: int = 0, **settings: Any) -> Iterator[Client]:
    """A share that has only exports, with a client that did INIT."""
    device = FsDevice(FsConfig(tag="share", **settings), descriptors)
    with driven(device, size=512) as driver:
        yield Client(driver)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Two directories of the host."""
    found = {}
    for name in ("kept", "free"):
        path = found[name] = tmp_path / name
        (path / "inner").mkdir(parents=True)
        (path / "file").write_bytes(name.encode() * 100)
        (path / "inner" / "deep").write_bytes(b"deep")
        os.symlink("file", path / "link")
    return found


@pytest.fixture
def client(places: dict[str, Path]) -> Iterator[Client]:
    """``kept`` can only be read, ``free`` can be written."""
    with exported() as client:
        client.device.add("kept", places["kept"], read_only=True)
        client.device.add("free", places["free"])
        yield client


def statx(client: Client, node: int) -> tuple[int, ...]:
    arguments = fuse.STATX_IN.pack(0, 0, 0, 0x7FF)
    return STATX.unpack_from(client.call(Opcode.STATX, node, arguments), fuse.STATX_OUT.size)
