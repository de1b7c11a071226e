"""QEMU's command line for a sandbox's VM: the machine ``virt`` of qemu-system-riscv64 with our devices (QEMU 7.2).

Every virtio device sits in one of the machine's eight virtio-mmio slots, so that the guest needs the same drivers as
under our VMM. What QEMU has no like of is replaced:

===================  ================================================================================
under our VMM        here
===================  ================================================================================
vsock                ports of a virtio console, ``kata.agent.<port>``, each a unix socket on the host
shared directory     vhost-user-fs, served by ``python -m vmm.vhost.fs``
network (passt)      passt on a stream netdev, whose wire format QEMU and passt have in common
===================  ================================================================================

QEMU translates guest code and keeps the result until it sees a write to it. It does not see what the process of the
shared directory writes, and ``fence.i`` does nothing in it: so the guest's kernel clears every page that it allots
(``init_on_alloc=1``), a write that QEMU sees before another program can come to lie there.

Left out: overlays of ours as disks (the runtime makes raw ones), more than one pair of queues of a network interface,
its backend ``socket``, devices that come and go, since virtio-mmio has no way to tell of one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kata_lab.hypervisor.base import HypervisorConfig, HypervisorError
from vmm.config import (
    BalloonConfig,
    BlockConfig,
    DeviceConfig,
    EntropyConfig,
    NetworkConfig,
    VhostFsConfig,
    VsockConfig,
)

PROGRAM: Final = "qemu-system-riscv64"
PACKAGE: Final = "qemu-system-misc (Debian 12, Ubuntu 24.04) or qemu-system-riscv (Debian 13)"
SLOTS: Final = 8
AGENT_PORTS: Final = (1024, 1025, 1026)  #: RPC, log, debug console
_IMAGE_MAGIC: Final = b"RSC\x05"
_IMAGE_MAGIC_OFFSET: Final = 56  # Documentation/arch/riscv/boot-image-header.rst
_MEMORY: Final = "ram"


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the command line refers to.

    Attributes:
        control: descriptor of the QMP connection.
        console: of the serial line.
        directory: of sockets.
        networks: device → descriptor of the connection to its passt.
    """

    control: int
    console: int
    directory: Path
    networks: Mapping[str, int]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What QEMU inherits."""
        return (self.control, self.console, *self.networks.values())


def check(config: HypervisorConfig) -> None:
    """Refuse what QEMU's machine cannot have.

    Raises:
        HypervisorError: in one sentence.
    """
    with config.kernel.open("rb") as file:
        file.seek(_IMAGE_MAGIC_OFFSET)
        if file.read(len(_IMAGE_MAGIC)) != _IMAGE_MAGIC:
            raise HypervisorError(f"{config.kernel} is no kernel for {PROGRAM}: use an image for riscv64")
    if config.max_vcpus is not None and config.max_vcpus > config.vcpus:
        raise HypervisorError(
            f"max_vcpus is {config.max_vcpus}, but QEMU's machine 'virt' for riscv64 has no hotplug of vCPUs: it must"
            f" be {config.vcpus}, as vcpus"
        )
    if len(config.devices) > SLOTS:
        raise HypervisorError(
            f"the sandbox needs {len(config.devices)} devices, QEMU's machine 'virt' has {SLOTS} virtio-mmio slots:"
            " take fewer images or another arrangement"
        )
    for device in config.devices:
        if isinstance(device, NetworkConfig) and (device.backend == "socket" or device.queues != 1):
            raise HypervisorError(
                f"network interface {device.name!r} has the backend {device.backend!r} and {device.queues} queues; in"
                " the arrangement 'qemu' it must have 'passt' or 'tap', and 1"
            )
        if isinstance(device, BlockConfig) and device.format != "raw":
            raise HypervisorError(
                f"disk {device.name!r} has the format {device.format!r}, which QEMU does not know: it must be 'raw'"
            )


def command(program: str, config: HypervisorConfig, wiring: Wiring) -> list[str]:
    """QEMU's command line.

    Raises:
        HypervisorError: a device is of a kind that the machine cannot have.
    """
    memory_mib = config.max_memory_mib or config.memory_mib
    line = [program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"]
    line += ["-machine", f"virt,memory-backend={_MEMORY}", "-cpu", "rv64", "-accel", "tcg,thread=multi"]
    line += ["-smp", str(config.vcpus), "-m", f"{memory_mib}M", "-global", "virtio-mmio.force-legacy=false"]
    # A file that the process of the shared directory can be given.
    memory = {"qom-type": "memory-backend-memfd", "id": _MEMORY, "size": memory_mib << 20, "share": True}
    line += ["-object", json.dumps(memory)]
    line += ["-chardev", f"socket,id=control,fd={wiring.control}", "-mon", "chardev=control,mode=control"]
    line += ["-chardev", f"socket,id=console,fd={wiring.console}", "-serial", "chardev:console"]
    line += ["-kernel", os.fspath(config.kernel), "-append", f"{config.cmdline} init_on_alloc=1"]
    line += ["-initrd", os.fspath(config.initrd)] if config.initrd is not None else []
    for number, device in enumerate(config.devices):
        line += _device(device, number, wiring)
    return line


def back_end(number: int) -> str:
    """What QEMU calls the host's side of a device, by its number; our names are not all names to it."""
    return f"back{number}"


def _device(device: DeviceConfig, number: int, wiring: Wiring) -> list[str]:
    # The machine's device tree has the last slot first.
    place = {"id": f"device{number}", "bus": f"virtio-mmio-bus.{SLOTS - 1 - number}"}
    back = back_end(number)
    match device:
        case VsockConfig():
            return _ports(place, wiring)
        case VhostFsConfig():
            return _share(device, back, place)
        case BlockConfig():
            return _disk(device, back, place)
        case NetworkConfig():
            return _network(device, back, place, wiring)
        case EntropyConfig():
            source = {"qom-type": "rng-builtin", "id": back}
            limit = {"max-bytes": device.bytes_per_second, "period": 1000} if device.bytes_per_second else {}
            front = {"driver": "virtio-rng-device", "rng": back, **limit, **place}
            return ["-object", json.dumps(source), *_front(front)]
        case BalloonConfig():
            return _front(
                {
                    "driver": "virtio-balloon-device",
                    "deflate-on-oom": device.deflate_on_oom,
                    "free-page-reporting": device.free_page_reporting,
                    **place,
                }
            )
    raise HypervisorError(f"a device of kind {device.KIND!r} is none that the arrangement 'qemu' has; leave it out")


def _front(device: Mapping[str, Any]) -> list[str]:
    return ["-device", json.dumps(device)]


def _ports(place: Mapping[str, str], wiring: Wiring) -> list[str]:
    line = _front({"driver": "virtio-serial-device", "max_ports": len(AGENT_PORTS) + 1, **place})
    for number in AGENT_PORTS:
        path = _escaped(port_socket(wiring.directory, number))
        line += ["-chardev", f"socket,id=port{number},path={path},server=on,wait=off"]
        port = {"driver": "virtserialport", "chardev": f"port{number}", "name": f"kata.agent.{number}"}
        line += _front({**port, "bus": f"{place['id']}.0", "id": port_name(number)})
    return line


def port_name(number: int) -> str:
    """What QEMU's events call a port of the guest's console."""
    return f"agent{number}"


def port_socket(directory: Path, number: int) -> Path:
    """The host's end of a port."""
    return directory / f"port{number}"


def _escaped(path: Path) -> str:
    """As a value in an option that is no JSON."""
    return os.fspath(path).replace(",", ",,")


def _share(device: VhostFsConfig, back: str, place: Mapping[str, str]) -> list[str]:
    path = _escaped(device.socket or Path())
    front = {"driver": "vhost-user-fs-device", "chardev": back, "tag": device.tag, **place}
    return ["-chardev", f"socket,id={back},path={path}", *_front({**front, "num-request-queues": device.queues})]


def _disk(device: BlockConfig, back: str, place: Mapping[str, str]) -> list[str]:
    node = {
        "driver": "raw",
        "node-name": back,
        "read-only": device.read_only,
        "discard": "unmap",
        "file": {"driver": "file", "filename": os.path.abspath(os.fspath(device.path or ""))},
    }
    front = {"driver": "virtio-blk-device", "drive": back, "num-queues": device.queues, **place}
    return ["-blockdev", json.dumps(node), *_front({**front, "serial": device.serial} if device.serial else front)]


def _network(device: NetworkConfig, back: str, place: Mapping[str, str], wiring: Wiring) -> list[str]:
    link: dict[str, Any] = {"id": back}
    if device.backend == "tap":
        link |= {"type": "tap", "ifname": device.tap, "script": "no", "downscript": "no"}
    else:
        address = {"type": "fd", "str": str(wiring.networks[device.name])}
        link |= {"type": "stream", "server": False, "addr": address}
    # Locally administered, and another one for each sandbox.
    mac = device.mac or ":".join(f"{each:02x}" for each in (2, *secrets.token_bytes(5)))
    front = {"driver": "virtio-net-device", "netdev": back, "mac": mac, **place}
    return ["-netdev", json.dumps(link), *_front({**front, "host_mtu": device.mtu} if device.mtu else front)]


def number_of(devices: Sequence[DeviceConfig], name: str) -> int:
    """The number of one of them.

    Raises:
        HypervisorError: there is none of that name.
    """
    names = [each.name for each in devices]
    if name not in names:
        raise HypervisorError(f"the sandbox has no device {name!r}; it has {', '.join(names)}")
    return names.index(name)
