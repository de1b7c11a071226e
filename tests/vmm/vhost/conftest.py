"""A shared directory that another process serves, and a driver in Python that uses it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.vmm.devices.virtio.driver import Driver
from tests.vmm.devices.virtio.fs.client import Client
from vmm.config import VhostFsConfig
from vmm.vhost.frontend import VhostFsDevice
from vmm.vhost.process import FsProcess

Serve: TypeAlias = Callable[..., AbstractContextManager[FsProcess]]


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory for sockets."""
    made = tmp_path / "private"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A directory with a file."""
    made = tmp_path / "share"
    made.mkdir()
    (made / "hello").write_bytes(b"from the host\n")
    return made


@pytest.fixture
def process(private: Path, share: Path) -> Iterator[FsProcess]:
    """A process that serves that directory."""
    with FsProcess(private / "fs.sock", path=share) as made:
        yield made


@contextmanager
def using(config: VhostFsConfig) -> Iterator[Driver]:
    """A driver that has brought the device up."""
    with Driver(VhostFsDevice(config), shared=True) as driver:
        driver.start(size=512)
        yield driver


@pytest.fixture
def driver(process: FsProcess) -> Iterator[Driver]:
    """A driver that uses the share through that process."""
    with using(process.device("share")) as made:
        yield made


@pytest.fixture
def client(driver: Driver) -> Client:
    """A FUSE session over it."""
    return Client(driver)


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))
