"""QEMU's command line for a sandbox's VM (QEMU 7.2): a machine for the guest's architecture, with our devices.

A guest for riscv64 has the machine ``virt`` with every virtio device in one of its eight virtio-mmio slots, so that it
needs the same drivers as under our VMM. A guest for amd64 has ``q35`` with virtio on PCI: ``microvm``, which has
virtio-mmio, tells no time that Linux believes unless KVM does. What QEMU has no like of is replaced:

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
its backend ``socket``, devices that come and go, since virtio-mmio has no way to tell of one, and KVM, so that a guest
runs in the same way on every host.
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

UNPLUGGED: Final = "the arrangement 'qemu' has no hotplug of"
AGENT_PORTS: Final = (1024, 1025, 1026)  #: RPC, log, debug console
_MEMORY: Final = "ram"


@dataclass(frozen=True, slots=True)
class Machine:
    """A QEMU, and the machine that it shall be.

    Attributes:
        architecture: of its guests, as Debian names it.
        program: the QEMU.
        package: that has it.
        options: of QEMU, to have this machine.
        transport: how QEMU calls a virtio device there.
        slots: devices that there can be.
        magic: what its kernels have.
        magic_offset: where.
    """

    architecture: str
    program: str
    package: str
    options: tuple[str, ...]
    transport: str
    slots: int
    magic: bytes
    magic_offset: int

    def place(self, number: int) -> Place:
        """Where a device sits, by its number: the guest finds them in this order."""
        if self.transport == "pci":
            where = {"bus": "pcie.0", "addr": f"{number + _FIRST_PCI_SLOT:#x}", "romfile": ""}
        else:
            # The machine's device tree has the last slot first.
            where = {"bus": f"virtio-mmio-bus.{self.slots - 1 - number}"}
        return Place(f"device{number}", self.transport, where)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device sits.

    Attributes:
        id: what QEMU calls what is there.
        transport: as of the machine.
        where: its properties that say so.
    """

    id: str
    transport: str
    where: Mapping[str, str]

    def front(self, kind: str, properties: Mapping[str, Any]) -> list[str]:
        """The option for the device that the guest sees, such as ``virtio-blk``."""
        return _front({"driver": f"{kind}-{self.transport}", "id": self.id, **properties, **self.where})


_FIRST_PCI_SLOT: Final = 1  # after the host bridge; the last one is that of the south bridge
MACHINES: Final = {
    "riscv64": Machine(
        architecture="riscv64",
        program="qemu-system-riscv64",
        package="qemu-system-misc (Debian 12, Ubuntu 24.04) or qemu-system-riscv (Debian 13)",
        options=(
            *("-machine", f"virt,memory-backend={_MEMORY}", "-cpu", "rv64"),
            *("-global", "virtio-mmio.force-legacy=false"),
        ),
        transport="device",
        slots=8,
        magic=b"RSC\x05",  # Documentation/arch/riscv/boot-image-header.rst
        magic_offset=56,
    ),
    "amd64": Machine(
        architecture="amd64",
        program="qemu-system-x86_64",
        package="qemu-system-x86",
        options=("-machine", f"q35,sata=off,smbus=off,memory-backend={_MEMORY}", "-cpu", "max"),
        transport="pci",
        slots=30,
        magic=b"HdrS",  # Documentation/arch/x86/boot.rst
        magic_offset=0x202,
    ),
}  #: by architecture


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


def machine_of(config: HypervisorConfig) -> Machine:
    """The machine that a guest needs.

    Raises:
        HypervisorError: there is none, or the guest needs what it cannot have; in one sentence.
    """
    machine = MACHINES.get(config.architecture)
    if machine is None:
        known = " or ".join(MACHINES)
        raise HypervisorError(f"the guest's image is for {config.architecture}: it must be for {known}")
    with config.kernel.open("rb") as file:
        file.seek(machine.magic_offset)
        if file.read(len(machine.magic)) != machine.magic:
            raise HypervisorError(
                f"{config.kernel} is no kernel for {machine.program}: use an image for {machine.architecture}"
            )
    if config.max_vcpus is not None and config.max_vcpus > config.vcpus:
        raise HypervisorError(
            f"max_vcpus is {config.max_vcpus}, but {UNPLUGGED} vCPUs: it must be {config.vcpus}, as vcpus"
        )
    if len(config.devices) > machine.slots:
        raise HypervisorError(
            f"the sandbox needs {len(config.devices)} devices, {machine.program} gives {machine.slots}: take fewer"
            " images or another arrangement"
        )
    _check_devices(config)
    return machine


def _check_devices(config: HypervisorConfig) -> None:
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


def command(program: str, machine: Machine, config: HypervisorConfig, wiring: Wiring) -> list[str]:
    """QEMU's command line.

    Raises:
        HypervisorError: a device is of a kind that the machine cannot have.
    """
    memory_mib = config.max_memory_mib or config.memory_mib
    line = [program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"]
    line += [*machine.options, "-accel", "tcg,thread=multi", "-smp", str(config.vcpus), "-m", f"{memory_mib}M"]
    # A file that the process of the shared directory can be given.
    memory = {"qom-type": "memory-backend-memfd", "id": _MEMORY, "size": memory_mib << 20, "share": True}
    line += ["-object", json.dumps(memory)]
    line += ["-chardev", f"socket,id=control,fd={wiring.control}", "-mon", "chardev=control,mode=control"]
    line += ["-chardev", f"socket,id=console,fd={wiring.console}", "-serial", "chardev:console"]
    line += ["-kernel", os.fspath(config.kernel), "-append", f"{config.cmdline} init_on_alloc=1"]
    line += ["-initrd", os.fspath(config.initrd)] if config.initrd is not None else []
    for number, device in enumerate(config.devices):
        line += _device(device, number, machine, wiring)
    return line


def back_end(number: int) -> str:
    """What QEMU calls the host's side of a device, by its number; our names are not all names to it."""
    return f"back{number}"


def _device(device: DeviceConfig, number: int, machine: Machine, wiring: Wiring) -> list[str]:
    place, back = machine.place(number), back_end(number)
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
            return ["-object", json.dumps(source), *place.front("virtio-rng", {"rng": back, **limit})]
        case BalloonConfig():
            wishes = {"deflate-on-oom": device.deflate_on_oom, "free-page-reporting": device.free_page_reporting}
            return place.front("virtio-balloon", wishes)
    raise HypervisorError(f"a device of kind {device.KIND!r} is none that the arrangement 'qemu' has; leave it out")


def _front(device: Mapping[str, Any]) -> list[str]:
    return ["-device", json.dumps(device)]


def _ports(place: Place, wiring: Wiring) -> list[str]:
    line = place.front("virtio-serial", {"max_ports": len(AGENT_PORTS) + 1})
    for number in AGENT_PORTS:
        path = _escaped(port_socket(wiring.directory, number))
        line += ["-chardev", f"socket,id=port{number},path={path},server=on,wait=off"]
        port = {"driver": "virtserialport", "chardev": f"port{number}", "name": f"kata.agent.{number}"}
        line += _front({**port, "bus": f"{place.id}.0", "id": port_name(number)})
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


def _share(device: VhostFsConfig, back: str, place: Place) -> list[str]:
    path = _escaped(device.socket or Path())
    front = {"chardev": back, "tag": device.tag, "num-request-queues": device.queues}
    return ["-chardev", f"socket,id={back},path={path}", *place.front("vhost-user-fs", front)]


def _disk(device: BlockConfig, back: str, place: Place) -> list[str]:
    node = {
        "driver": "raw",
        "node-name": back,
        "read-only": device.read_only,
        "discard": "unmap",
        "file": {"driver": "file", "filename": os.path.abspath(os.fspath(device.path or ""))},
    }
    serial = {"serial": device.serial} if device.serial else {}
    front = {"drive": back, "num-queues": device.queues, **serial}
    return ["-blockdev", json.dumps(node), *place.front("virtio-blk", front)]


def _network(device: NetworkConfig, back: str, place: Place, wiring: Wiring) -> list[str]:
    link: dict[str, Any] = {"id": back}
    if device.backend == "tap":
        link |= {"type": "tap", "ifname": device.tap, "script": "no", "downscript": "no"}
    else:
        address = {"type": "fd", "str": str(wiring.networks[device.name])}
        link |= {"type": "stream", "server": False, "addr": address}
    # Locally administered, and another one for each sandbox.
    mac = device.mac or ":".join(f"{each:02x}" for each in (2, *secrets.token_bytes(5)))
    mtu = {"host_mtu": device.mtu} if device.mtu else {}
    return ["-netdev", json.dumps(link), *place.front("virtio-net", {"netdev": back, "mac": mac, **mtu})]


def number_of(devices: Sequence[DeviceConfig], name: str) -> int:
    """The number of one of them.

    Raises:
        HypervisorError: there is none of that name.
    """
    names = [each.name for each in devices]
    if name not in names:
        raise HypervisorError(f"the sandbox has no device {name!r}; it has {', '.join(names)}")
    return names.index(name)
