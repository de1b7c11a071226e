"""Configuration of a virtual machine: frozen, checked when it is made, and strict about names.

A mistyped field is refused with the field that was probably meant, since a setting that is silently ignored is the most
expensive kind of mistake. Only what certainly cannot work is refused here: whether a kernel needs more memory than it
got shows when it is loaded (the image does not fit) or when it boots (its panic is reported).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from vmm.errors import ConfigError

MIB = 1 << 20
MAX_VCPUS = 32
MAX_MEMORY_MIB = 1 << 20
MAX_CMDLINE_BYTES = 1023
"""Linux on riscv64 has COMMAND_LINE_SIZE = 1024 bytes for a command line with its final zero; it cuts off the rest."""

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_FORWARD = re.compile(r"(tcp|udp) (\d{1,5})(?::(\d{1,5}))?")

DEFAULT_CMDLINE = "console=ttyS0 panic=-1"
CLOCKS = ("real", "deterministic")

MAX_DEVICES = 32
MAX_HOTPLUG_SLOTS = 32
MIN_SLOTS = 8  #: virtio-mmio slots that are declared at least
MAX_VSOCK_PATH_BYTES = 107 - len("_4294967295")
"""What the path of a vsock device's socket leaves of the 107 bytes of a unix socket's, for the port of the host."""

_C = TypeVar("_C")


def _from_dict(cls: type[_C], what: str, values: Mapping[str, Any]) -> _C:
    names = [each.name for each in dataclasses.fields(cast(Any, cls))]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(names)}"
            raise ConfigError(f"{what} has no field {name!r}: {hint}")
    return cls(**values)


def _require_int(name: str, value: object, low: int, high: int, unit: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}, it must be a whole number from {low} to {high}{unit}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}, it must be from {low} to {high}{unit}")


def _require_path(name: str, value: object) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return Path(os.fspath(value))
    raise ConfigError(f"{name} is {value!r}, it must be the path of a file, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleConfig:
    """The guest's console.

    Attributes:
        limit_bytes: how much of its output is kept; what is older is forgotten.
        report_lines: how many of its last lines a crash report quotes.
        milestones: name → regular expression; the first console line that matches is recorded in the VM's trace,
            with the host time and the instructions retired until then.
    """

    limit_bytes: int = 4 * MIB
    report_lines: int = 40
    milestones: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_int("console limit_bytes", self.limit_bytes, 4096, 1 << 30, " bytes")
        _require_int("console report_lines", self.report_lines, 0, 10_000)
        if not isinstance(self.milestones, Mapping) or not all(
            isinstance(part, str) for pair in self.milestones.items() for part in pair
        ):
            raise ConfigError(f"console milestones is {self.milestones!r}, it must map names to regular expressions")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConsoleConfig:
        """Build from plain data; :class:`~vmm.errors.ConfigError` on an unknown field or a bad value."""
        return _from_dict(cls, "a console configuration", values)


def _require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, it must be True or False")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, it must be one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """A virtio device of a VM; see its kinds below.

    Attributes:
        name: what errors, traces and actions call the device; empty for one made of kind and number, as ``blk0``.
    """

    KIND: ClassVar[str] = ""
    SHARES_MEMORY: ClassVar[bool] = False  #: another process works on the VM's memory

    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > 64:
            raise ConfigError(f"a device's name is {self.name!r}, it must be text of at most 64 characters")

    def _path(self, field_name: str) -> Path:
        path = _require_path(f"{self.KIND} {field_name}", getattr(self, field_name))
        if path is None:
            raise ConfigError(f"{self.KIND} {field_name} is missing, it must be a path")
        object.__setattr__(self, field_name, path)
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig(DeviceConfig):
    """A disk (virtio-blk).

    Attributes:
        path: a raw file, a block device, or an overlay file.
        format: ``"raw"``, or ``"overlay"`` for a copy-on-write file over another one. It is never guessed from what the
            file holds, since a guest writes what a raw file holds.
        read_only: the guest can only read.
        serial: what the guest sees as the disk's serial number, up to 20 bytes of ASCII.
        queues: request queues, 1 to 8.
    """

    KIND: ClassVar[str] = "blk"

    path: Path | None = None
    format: str = "raw"
    read_only: bool = False
    serial: str = ""
    queues: int = 1

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        self._path("path")
        _require_choice("blk format", self.format, ("raw", "overlay"))
        _require_flag("blk read_only", self.read_only)
        if not isinstance(self.serial, str) or not self.serial.isascii() or len(self.serial) > 20:
            raise ConfigError(f"blk serial is {self.serial!r}, it must be at most 20 characters of ASCII")
        _require_int("blk queues", self.queues, 1, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockConfig(DeviceConfig):
    """Sockets between host and guest (virtio-vsock).

    Attributes:
        socket: path of the unix socket that the VMM makes: who connects to it writes ``CONNECT <port>`` to reach the
            guest. A connection that the guest opens to host port P goes to the unix socket ``<socket>_P``, whose path
            must have room in a socket address too. None for a device that is used from Python only.
        cid: the guest's context identifier, 3 or more.
    """

    KIND: ClassVar[str] = "vsock"

    socket: Path | None = None
    cid: int = 3

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        if self.socket is not None and (length := len(os.fsencode(self._path("socket")))) > MAX_VSOCK_PATH_BYTES:
            raise ConfigError(
                f"vsock socket {str(self.socket)!r} is a path of {length} bytes, it may have {MAX_VSOCK_PATH_BYTES}, so"
                f" that it and a port fit into a socket address"
            )
        _require_int("vsock cid", self.cid, 3, 0xFFFF_FFFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FsConfig(DeviceConfig):
    """A host directory that the guest mounts (virtio-fs): ``mount -t virtiofs <tag> <where>``.

    A VMM that is root makes files in the name of the guest's users, set-user-id programs and device nodes too: a share
    that it may write belongs into a directory that only root can enter. Any other VMM makes all files its own, and the
    guest sees what belongs to the VMM's user as root's.

    Attributes:
        path: the directory; None for one in which there is only what is added to the running device.
        tag: what the guest calls it, 1 to 36 bytes of UTF-8.
        read_only: the guest can only read.
        cache: ``"none"`` (the guest asks for everything every time), ``"auto"`` (names and attributes are trusted for a
            second, pages until a file is opened again), ``"always"`` (nobody else changes the directory).
        queues: request queues, 1 to 8.
    """

    KIND: ClassVar[str] = "fs"

    path: Path | None = None
    tag: str = ""
    read_only: bool = False
    cache: str = "auto"
    queues: int = 1

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        if self.path is not None:
            self._path("path")
        if not isinstance(self.tag, str) or not 1 <= len(self.tag.encode()) <= 36 or "\0" in self.tag:
            raise ConfigError(f"fs tag is {self.tag!r}, it must have 1 to 36 bytes")
        _require_flag("fs read_only", self.read_only)
        _require_choice("fs cache", self.cache, ("none", "auto", "always"))
        _require_int("fs queues", self.queues, 1, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig(DeviceConfig):
    """A network interface (virtio-net).

    Attributes:
        backend: ``"passt"`` (the program of that name, which needs no permissions), ``"tap"`` (a tap interface of the
            host, which needs CAP_NET_ADMIN or one that was made for this user), or ``"socket"`` (a unix socket whose
            other end speaks passt's framing, such as that of another VM: whoever comes first waits there).
        tap: name of the host's tap interface; empty lets the kernel choose one.
        socket: path of the unix socket, for that backend.
        mac: ``"02:00:00:00:00:01"``; empty for one that is random and locally administered.
        mtu: bytes of the largest packet, 0 for what the backend likes best: 65,520, or what the tap interface has.
        forwards: host ports that lead into the guest, such as ``"tcp 8080:80"`` or ``"udp 5353"``, for passt.
        queues: pairs of a receive and a transmit queue, 1 to 8.
    """

    KIND: ClassVar[str] = "net"

    backend: str = "passt"
    tap: str = ""
    socket: Path | None = None
    mac: str = ""
    mtu: int = 0
    forwards: tuple[str, ...] = ()
    queues: int = 1

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        _require_choice("net backend", self.backend, ("passt", "tap", "socket"))
        if not isinstance(self.tap, str) or len(self.tap.encode()) > 15:
            raise ConfigError(f"net tap is {self.tap!r}, an interface's name has at most 15 bytes")
        if self.backend == "socket":
            self._path("socket")
        elif self.socket is not None:
            raise ConfigError(f"net socket is {str(self.socket)!r}, but the backend is {self.backend!r}: use 'socket'")
        if not isinstance(self.mac, str) or (self.mac and not _MAC.fullmatch(self.mac)):
            raise ConfigError(f"net mac is {self.mac!r}, it must look like '02:00:00:00:00:01'")
        if self.mac and int(self.mac[:2], 16) & 1:
            raise ConfigError(f"net mac is {self.mac!r}, a group address; the first byte must be even")
        if self.mtu != 0 or isinstance(self.mtu, bool):
            _require_int("net mtu", self.mtu, 68, 65520)
        if not isinstance(self.forwards, (tuple, list)):
            raise ConfigError(f"net forwards is {self.forwards!r}, it must be a list such as ['tcp 8080:80']")
        object.__setattr__(self, "forwards", tuple(self.forwards))
        for each in self.forwards:
            match = _FORWARD.fullmatch(each) if isinstance(each, str) else None
            if match is None or not all(0 < int(port) < 65536 for port in match.groups()[1:] if port is not None):
                raise ConfigError(
                    f"net forward {each!r} must look like 'tcp 8080:80', a protocol and one or two ports of 1 to 65535"
                )
        if self.forwards and self.backend != "passt":
            raise ConfigError(f"net forwards need the backend 'passt', not {self.backend!r}")
        _require_int("net queues", self.queues, 1, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class BalloonConfig(DeviceConfig):
    """A way to take memory back from the guest (virtio-balloon).

    Attributes:
        target_mib: MiB that the guest shall give up; it can be changed while the VM runs.
        deflate_on_oom: the guest takes pages back rather than kill a process.
        free_page_reporting: the guest names free pages by itself, and the host takes them back.
        statistics_seconds: how often the guest's memory statistics are asked for, 0 for only when somebody asks.
    """

    KIND: ClassVar[str] = "balloon"

    target_mib: int = 0
    deflate_on_oom: bool = True
    free_page_reporting: bool = True
    statistics_seconds: int = 0

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        _require_int("balloon target_mib", self.target_mib, 0, MAX_MEMORY_MIB, " MiB")
        _require_flag("balloon deflate_on_oom", self.deflate_on_oom)
        _require_flag("balloon free_page_reporting", self.free_page_reporting)
        _require_int("balloon statistics_seconds", self.statistics_seconds, 0, 86_400, " seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyConfig(DeviceConfig):
    """A source of random numbers (virtio-rng).

    Attributes:
        bytes_per_second: how much the guest may draw, 0 for as much as it likes.
    """

    KIND: ClassVar[str] = "rng"

    bytes_per_second: int = 0

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        _require_int("rng bytes_per_second", self.bytes_per_second, 0, 1 << 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class PortsConfig(DeviceConfig):
    """Consoles and named ports (virtio-console, multiport): ``/dev/hvc0`` and ``/dev/vport<n>p<m>`` in the guest.

    Attributes:
        ports: name of each port → path of the unix socket that is its host end, or None for one that is used from
            Python only. The first port is a console (``hvc0``).
        columns: width of the console's window in characters; it can be changed while the VM runs.
        rows: its height.
    """

    KIND: ClassVar[str] = "console"

    ports: Mapping[str, Path | None] = field(default_factory=dict)
    columns: int = 80
    rows: int = 24

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        if not isinstance(self.ports, Mapping) or not 1 <= len(self.ports) <= 31:
            raise ConfigError(f"console ports is {self.ports!r}, it must map 1 to 31 names to sockets")
        for name in self.ports:
            if not isinstance(name, str) or not name or len(name.encode()) > 64 or "\0" in name or "/" in name:
                raise ConfigError(f"console port {name!r} must have a name of 1 to 64 bytes, without a slash")
        ports = {name: _require_path(f"console port {name!r}", path) for name, path in self.ports.items()}
        object.__setattr__(self, "ports", ports)
        _require_int("console columns", self.columns, 1, 0xFFFF)
        _require_int("console rows", self.rows, 1, 0xFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostFsConfig(DeviceConfig):
    """Shared directories (virtio-fs) that another process serves over vhost-user, as ``python -m vmm.vhost.fs`` does.

    A VM that has one when it starts keeps its memory where other processes can be given it; to any other VM none can
    be added.

    Attributes:
        tag: what the guest calls it, 1 to 36 bytes of UTF-8.
        socket: path of the unix socket at which that process listens.
        queues: request queues, 1 to 8.
    """

    KIND: ClassVar[str] = "vhost-fs"
    SHARES_MEMORY: ClassVar[bool] = True

    tag: str = ""
    socket: Path | None = None
    queues: int = 1

    def __post_init__(self) -> None:
        DeviceConfig.__post_init__(self)
        if not isinstance(self.tag, str) or not 1 <= len(self.tag.encode()) <= 36 or "\0" in self.tag:
            raise ConfigError(f"vhost-fs tag is {self.tag!r}, it must have 1 to 36 bytes")
        self._path("socket")
        _require_int("vhost-fs queues", self.queues, 1, 8)


DEVICE_CONFIGS: Mapping[str, type[DeviceConfig]] = {
    each.KIND: each
    for each in (
        *(BlockConfig, VsockConfig, FsConfig, NetworkConfig, BalloonConfig, EntropyConfig, PortsConfig),
        VhostFsConfig,
    )
}


def device_from_dict(values: Mapping[str, Any]) -> DeviceConfig:
    """Build a device's configuration from plain data: its ``kind``, and the fields of that kind.

    Raises:
        ConfigError: no or an unknown kind, an unknown field, or a bad value.
    """
    known = ", ".join(map(repr, DEVICE_CONFIGS))
    fields = dict(values)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in DEVICE_CONFIGS:
        raise ConfigError(f"a device's kind is {kind!r}, it must be one of {known}")
    return _from_dict(DEVICE_CONFIGS[kind], f"a {kind} device", fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """Everything that decides what a VM is before it starts.

    Attributes:
        vcpus: harts that the guest boots with, 1 to 32. The deterministic clock needs exactly 1.
        memory_mib: guest RAM in MiB. A stock Debian kernel for riscv64 boots with 80 and panics with 64.
        max_vcpus: harts that there can be while the VM runs; None for no more than ``vcpus``. The kernel knows of all
            of them from the start, and is told by ``maxcpus=`` to leave the others alone; one that was not plugged in
            cannot be started.
        max_memory_mib: RAM that there can be while the VM runs; None for no more than ``memory_mib``. The guest boots
            with all of it, and a balloon takes what is above ``memory_mib`` as soon as its driver is there. One is
            added if the devices have none. A guest that loads no such driver keeps everything.
        hotplug_slots: virtio-mmio slots that are free for devices which come while the VM runs, 0 to 32; there are more
            if fewer than 8 would be declared in all.
        kernel: path of a RISC-V ``Image`` or ELF file.
        initrd: path of an initial RAM file system, or None.
        cmdline: the kernel's command line.
        clock: ``"real"`` (guest time is host time) or ``"deterministic"`` (guest time comes from retired
            instructions, idle time is skipped, every boot is the same).
        console: see :class:`ConsoleConfig`; plain data is accepted too.
        trace: count and time every exit by kind, device and SBI call from the first instruction on.
        devices: the virtio devices, in the order in which the guest finds them; plain data is accepted too.

    Raises:
        ConfigError: a value that certainly cannot work, in one sentence.
    """

    vcpus: int = 1
    memory_mib: int = 256
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    hotplug_slots: int = 4
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = DEFAULT_CMDLINE
    clock: str = "real"
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    trace: bool = False
    devices: tuple[DeviceConfig, ...] = ()

    def __post_init__(self) -> None:
        _require_int("vcpus", self.vcpus, 1, MAX_VCPUS)
        _require_int("memory_mib", self.memory_mib, 1, MAX_MEMORY_MIB, " MiB")
        if self.max_vcpus is not None:
            _require_int("max_vcpus", self.max_vcpus, self.vcpus, MAX_VCPUS)
        if self.max_memory_mib is not None:
            _require_int("max_memory_mib", self.max_memory_mib, self.memory_mib, MAX_MEMORY_MIB, " MiB")
        _require_int("hotplug_slots", self.hotplug_slots, 0, MAX_HOTPLUG_SLOTS)
        object.__setattr__(self, "kernel", _require_path("kernel", self.kernel))
        object.__setattr__(self, "initrd", _require_path("initrd", self.initrd))
        if not isinstance(self.cmdline, str) or "\0" in self.cmdline or "\n" in self.cmdline:
            raise ConfigError(f"cmdline is {self.cmdline!r}, it must be one line, without zero bytes")
        if (length := len(self.boot_cmdline.encode())) > MAX_CMDLINE_BYTES:
            told = f" with {self._cpu_limit.strip()!r}" if self._cpu_limit else ""
            raise ConfigError(f"cmdline has {length} bytes{told}, Linux keeps at most {MAX_CMDLINE_BYTES}")
        if self.clock not in CLOCKS:
            raise ConfigError(f"clock is {self.clock!r}, it must be 'real' or 'deterministic'")
        if self.clock == "deterministic" and self.harts > 1:
            which = "vcpus" if self.vcpus > 1 else "max_vcpus"
            raise ConfigError(
                f"the deterministic clock needs {which} = 1, not {self.harts}, since parallel harts have no one order"
            )
        if isinstance(self.console, Mapping):
            object.__setattr__(self, "console", ConsoleConfig.from_dict(self.console))
        if not isinstance(self.console, ConsoleConfig):
            raise ConfigError(f"console is {self.console!r}, it must be a ConsoleConfig")
        if not isinstance(self.trace, bool):
            raise ConfigError(f"trace is {self.trace!r}, it must be True or False")
        object.__setattr__(self, "devices", _name_devices(self.devices))
        if self.spare_memory_mib and not any(isinstance(each, BalloonConfig) for each in self.devices):
            # Without DEFLATE_ON_OOM, since memory that a guest may take back when it likes is no limit.
            object.__setattr__(self, "devices", _name_devices((*self.devices, BalloonConfig(deflate_on_oom=False))))

    @property
    def harts(self) -> int:
        """Harts that there are, plugged in or not."""
        return self.vcpus if self.max_vcpus is None else self.max_vcpus

    @property
    def memory_bytes(self) -> int:
        """Guest RAM in bytes, with what a balloon holds."""
        return (self.memory_mib if self.max_memory_mib is None else self.max_memory_mib) * MIB

    @property
    def spare_memory_mib(self) -> int:
        """MiB of guest RAM that a balloon holds."""
        return self.memory_bytes // MIB - self.memory_mib

    @property
    def boot_cmdline(self) -> str:
        """What the kernel is given."""
        # In front, since Linux takes nothing behind a "--" for itself.
        return self._cpu_limit + self.cmdline

    @property
    def _cpu_limit(self) -> str:
        return f"maxcpus={self.vcpus} " if self.harts > self.vcpus else ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VmConfig:
        """Build from plain data (a YAML or JSON mapping).

        Raises:
            ConfigError: an unknown field, with the one that was probably meant, or a bad value.
        """
        return _from_dict(cls, "a VM configuration", values)

    def replace(self, **changes: Any) -> VmConfig:
        """A copy with ``changes``, checked like a new one."""
        kept = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return self.from_dict({**kept, **changes})


def _name_devices(devices: object) -> tuple[DeviceConfig, ...]:
    """Every device with a name of its own."""
    if not isinstance(devices, (tuple, list)):
        raise ConfigError(f"devices is {devices!r}, it must be a list of device configurations")
    if len(devices) > MAX_DEVICES:
        raise ConfigError(f"{len(devices)} devices are too many, a VM has at most {MAX_DEVICES}")
    named: dict[str, DeviceConfig] = {}
    for each in devices:
        config = device_from_dict(each) if isinstance(each, Mapping) else each
        if not isinstance(config, DeviceConfig) or not config.KIND:
            raise ConfigError(f"device {each!r} must be a device configuration such as BlockConfig")
        number = sum(other.KIND == config.KIND for other in named.values())
        name = config.name or f"{config.KIND}{number}"
        if name in named:
            raise ConfigError(f"two devices are called {name!r}; give each a name of its own")
        named[name] = dataclasses.replace(config, name=name)
    return tuple(named.values())
