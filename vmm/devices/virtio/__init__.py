"""Virtio devices (virtio 1.2), one module each, and their transport.

A device is made from its configuration by :func:`build_device`; its module is imported only then.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from vmm.config import DeviceConfig
from vmm.devices.virtio.device import VirtioDevice

_BUILDERS: Final = {
    "blk": ("vmm.devices.virtio.blk", "BlockDevice"),
    "vsock": ("vmm.devices.virtio.vsock.device", "VsockDevice"),
    "fs": ("vmm.devices.virtio.fs.device", "FsDevice"),
    "vhost-fs": ("vmm.vhost.frontend", "VhostFsDevice"),
    "net": ("vmm.devices.virtio.net", "NetworkDevice"),
    "balloon": ("vmm.devices.virtio.balloon", "BalloonDevice"),
    "rng": ("vmm.devices.virtio.rng", "EntropyDevice"),
    "console": ("vmm.devices.virtio.console", "PortsDevice"),
}


def build_device(config: DeviceConfig) -> VirtioDevice:
    """The device that ``config`` describes; its owner closes it.

    Raises:
        VmmError: the host does not have what it needs.
    """
    module, name = _BUILDERS[config.KIND]
    device_class: Any = getattr(import_module(module), name)
    device: VirtioDevice = device_class(config)
    return device
