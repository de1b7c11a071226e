"""What a running file system device lets its owner do, whichever process serves its requests."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from vmm.actions import ManipulateFsBackend
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError


class SharedDirectory(VirtioDevice, ABC):
    """A file system device, to whose top directory other directories and files of the host can be added."""

    @abstractmethod
    def add(self, name: str, path: os.PathLike[str], *, read_only: bool = False, override_stat: bool = False) -> None:
        """See :meth:`vmm.devices.virtio.fs.device.FsDevice.add`."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """See :meth:`vmm.devices.virtio.fs.device.FsDevice.remove`."""


def manipulate(share: SharedDirectory, action: ManipulateFsBackend) -> None:
    """Carry the action out.

    Raises:
        ConfigError: as :meth:`SharedDirectory.add` and :meth:`SharedDirectory.remove`, or an operation that there is
            not.
    """
    match action.operation:
        case "add" if action.path is not None:
            path = Path(action.path)
            share.add(action.entry, path, read_only=action.read_only, override_stat=action.override_stat)
        case "add":
            raise ConfigError(f"{action.entry!r} cannot be added to {action.device}: give the path of what it is")
        case "remove":
            share.remove(action.entry)
        case _:
            raise ConfigError(f"the operation is {action.operation!r}, it must be 'add' or 'remove'")
