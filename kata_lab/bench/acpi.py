"""Hotplug the other way: a QEMU guest that gets CPUs, memory, disks and shared directories through ACPI and PCI.

What upcall does with one message, ACPI does in a chain (ACPI 6.5, sections 5.6.6 "Device Object Notifications", 6.3.5
``_OST``, and QEMU's docs/specs/acpi_cpu_hotplug.txt and acpi_mem_hotplug.txt):

::

    host                        QEMU                       guest's kernel                  guest's userland
    device_add ────────────────→ status bit, SCI ─────────→ runs the DSDT's bytecode:
               ←──────────────── answers                    scans the slots, Notify()
                                                            device check: device found ──→ a CPU: online by sysfs
                                 ACPI_DEVICE_OST ←───────── _OST: acknowledged             a disk: read
    "online …" ←──────────────── serial port ←──────────────────────────────────────────── tells

Times run from the moment when the first request of a kind is sent until the guest has told that it uses the device;
each comes with the steps in between, for a picture. A removal ends with QEMU's event DEVICE_DELETED. Memory comes in
pieces of the size that the guest's kernel brings online at once, 128 MiB on x86-64: smaller ones cannot be used by it.

Two things are as they are because of the translator TCG. Since late 2025 (6.12.y, arch/x86/kernel/acpi/boot.c,
acpi_is_processor_usable()), Linux believes that vCPUs can be plugged in only where it recognises a hypervisor, and it
recognises none in TCG; so the machine says that it is VMware's, by the serial number and the port by which Linux tells.
And QEMU 7.2 aborts, its heap damaged, when a vCPU is plugged in after one was removed: removing vCPUs is the last thing
that a guest can be asked for. Leaves out network interfaces, and firmware other than SeaBIOS.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kata_lab.bench.acpi_image import acpi_image
from kata_lab.bench.acpi_machine import LONGEST_BOOT, PORTS, PROGRAM, AcpiError, AcpiMachine, Word
from kata_lab.bench.peer import Peer

if TYPE_CHECKING:
    from kata_lab.image.library import Image

__all__ = ["AcpiError", "AcpiGuest", "Hotplug", "Step"]

MAX_VCPUS: Final = 8
MEMORY_MIB: Final = 512
_UP: Final = re.compile(r"up (\d{1,12})")
_RANGES: Final = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
_EJECT: Final = 3  #: the event of an _OST that answers a request to eject (ACPI 6.5, 6.3.5)
_REFUSALS: Final = (1, 2, 0x80, 0x81, 0x82, 0x83)  #: its statuses other than success and "in progress"
_REFUSED: Final = ("DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR")


@dataclass(frozen=True, slots=True)
class Step:
    """Something that was told on the way.

    Attributes:
        name: for a person.
        seconds: since the request was sent.
    """

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Hotplug:
    """A request that was carried out.

    Attributes:
        name: what was asked for.
        seconds: from the request until the guest used it, or, for a removal, until QEMU had it removed.
        taken: from the request until the last that the kernel found, or that a driver took, before that; ``seconds`` if
            nothing came.
        steps: in the order of their time; the first is the request, the last what it was waited for.
        devices: the names of the devices that came or went.
    """

    name: str
    seconds: float
    taken: float
    steps: tuple[Step, ...]
    devices: tuple[str, ...]

    def __float__(self) -> float:
        return self.seconds


class AcpiGuest:
    """A QEMU guest with ACPI and PCI hotplug: an asynchronous context manager that boots it, and leaves nothing behind.

    One request runs at a time; others wait for it. After an error of one the guest goes on, unless QEMU itself ended.

    Args:
        max_vcpus: vCPUs that it can have, 2 to 64; it boots with one.
        memory_mib: RAM that it boots with, in MiB.
        image: the guest; built when it is first needed if None.
    """

    def __init__(self, *, max_vcpus: int = MAX_VCPUS, memory_mib: int = MEMORY_MIB, image: Image | None = None) -> None:
        if not 2 <= max_vcpus <= 64:
            raise AcpiError(f"the guest cannot have room for {max_vcpus} vCPUs: it can for 2 to 64")
        self.max_vcpus = max_vcpus
        self.memory_mib = memory_mib
        self.block_mib = 0  #: size of the pieces in which memory comes, in MiB
        self._image = image
        self._booted: AcpiMachine | None = None
        self._stack = contextlib.AsyncExitStack()
        self._vcpus: list[str] = []
        self._disks: dict[str, int] = {}
        self._shares: dict[str, tuple[int, contextlib.AsyncExitStack]] = {}
        self._dimms: list[tuple[str, int]] = []
        self._named = 0
        self._worn = False  #: a vCPU was removed
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> AcpiGuest:
        peer = find_qemu()
        image = await asyncio.to_thread(acpi_image) if self._image is None else self._image
        async with contextlib.AsyncExitStack() as stack:
            booting = AcpiMachine.boot(peer, image, self.max_vcpus, self.memory_mib)
            machine = await stack.enter_async_context(booting)
            up = machine.journal.find(lambda word: word.source == "guest" and bool(_UP.fullmatch(word.text)))
            word = await machine.while_running(up, "telling that its guest is up", LONGEST_BOOT)
            self.block_mib = int(word.text.split()[1]) >> 20
            if not self.block_mib:
                raise AcpiError(f"the guest says {word.text!r}: a block of its memory should be some MiB")
            self._booted, self._stack = machine, stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._booted = None
        try:
            await self._stack.aclose()
        finally:
            for _, serving in self._shares.values():
                await serving.aclose()

    @property
    def pid(self) -> int:
        """Of QEMU's process."""
        return self._machine.pid

    @property
    def vcpus(self) -> int:
        """How many vCPUs the guest has now."""
        return 1 + len(self._vcpus)

    @property
    def disks(self) -> tuple[str, ...]:
        """The names of the disks that were added."""
        return tuple(self._disks)

    @property
    def shares(self) -> tuple[str, ...]:
        """The tags of the shared directories that were added."""
        return tuple(self._shares)

    @property
    def _machine(self) -> AcpiMachine:
        if self._booted is None:
            raise AcpiError("the guest does not run: ask within 'async with AcpiGuest() as guest'")
        return self._booted

    # vCPUs

    async def add_vcpus(self, count: int) -> Hotplug:
        """Until the guest's kernel schedules on all of them.

        Raises:
            AcpiError: there is no room for so many, or QEMU or the guest fails.
        """
        async with self._request(f"{count} more vCPU{'s' if count > 1 else ''}") as request:
            slots = await self._free_slots()
            if not 1 <= count <= len(slots):
                raise AcpiError(f"{count} vCPUs cannot be added: the guest has {self.vcpus} of {self.max_vcpus}")
            names = [self._name("vcpu") for _ in range(count)]
            wanted = self.vcpus + count
            request.begin()
            for name, slot in zip(names, slots, strict=False):
                await self._machine.command("device_add", {"driver": slot["type"], "id": name, **slot["props"]})
                self._vcpus.append(name)
                request.note(f"QEMU answered for {name}")
            await request.until(lambda word: _online(word) == wanted)
            return request.done(names)

    async def remove_vcpus(self, count: int) -> Hotplug:
        """Take away those that were added last, until QEMU has removed them.

        Raises:
            AcpiError: there are not so many, or the guest keeps one.
        """
        async with self._request(f"{count} vCPU{'s' if count > 1 else ''} less") as request:
            if not 1 <= count <= len(self._vcpus):
                raise AcpiError(f"{count} vCPUs cannot be removed: {len(self._vcpus)} were added")
            names = self._vcpus[: -count - 1 : -1]
            self._worn = True
            request.begin()
            for name in names:
                await self._unplug(request, name)
                self._vcpus.remove(name)
            return request.done(names)

    async def _free_slots(self) -> list[Mapping[str, Any]]:
        """Where vCPUs can be plugged in, the next one first."""
        slots = [each for each in await self._machine.command("query-hotpluggable-cpus") if "qom-path" not in each]
        return sorted(slots, key=lambda slot: tuple(sorted(slot["props"].items())))

    # Memory

    async def resize_memory(self, change_mib: int) -> Hotplug:
        """Grow by one piece (until the guest's kernel hands it out), or take away the one that came last.

        Args:
            change_mib: MiB, a multiple of :attr:`block_mib`; a negative one must be the size of the last piece.

        Raises:
            AcpiError: another size, no room, or a guest that keeps what it uses.
        """
        if change_mib < 0:
            return await self._shrink(-change_mib)
        async with self._request(f"{change_mib} MiB more") as request:
            if change_mib == 0 or change_mib % self.block_mib:
                raise AcpiError(
                    f"the guest cannot grow by {change_mib} MiB: its kernel takes multiples of {self.block_mib} MiB"
                )
            name = self._name("dimm")
            backend = {"qom-type": "memory-backend-memfd", "id": f"{name}-ram", "size": change_mib << 20, "share": True}
            request.begin()
            await self._machine.command("object-add", backend)
            try:
                dimm = {"driver": "pc-dimm", "id": name, "memdev": f"{name}-ram"}
                await self._machine.command("device_add", dimm)
            except AcpiError:
                await self._quietly("object-del", {"id": f"{name}-ram"})
                raise
            self._dimms.append((name, change_mib))
            request.note(f"QEMU answered for {name}")
            blocks = change_mib // self.block_mib
            await request.until(lambda word: word.text.startswith("online memory "), count=blocks)
            return request.done([name])

    async def _shrink(self, change_mib: int) -> Hotplug:
        async with self._request(f"{change_mib} MiB less") as request:
            if not self._dimms or self._dimms[-1][1] != change_mib:
                last = f"the last piece has {self._dimms[-1][1]} MiB" if self._dimms else "no piece was added"
                raise AcpiError(f"{change_mib} MiB cannot be taken from the guest: {last}")
            name, _ = self._dimms[-1]
            request.begin()
            await self._unplug(request, name)
            self._dimms.pop()
            await self._machine.command("object-del", {"id": f"{name}-ram"})
            return request.done([name])

    # Disks

    async def add_disk(self, path: Path | str) -> Hotplug:
        """A raw file as a disk, until the guest has read its first sector.

        Raises:
            AcpiError: the file cannot be opened, no port is free, or QEMU or the guest fails.
        """
        async with self._request("a disk") as request:
            name, port = self._name("disk"), self._free_port()
            node = {"driver": "file", "node-name": name, "filename": os.fspath(Path(path).absolute())}
            disk = {"driver": "virtio-blk-pci", "id": name, "bus": f"port{port}", "drive": name, "serial": name}
            request.begin()
            await self._machine.command("blockdev-add", node)
            try:
                await self._machine.command("device_add", disk)
            except AcpiError:
                await self._quietly("blockdev-del", {"node-name": name})
                raise
            self._disks[name] = port
            request.note(f"QEMU answered for {name}")
            await request.until(lambda word: word.text == f"online disk {name}")
            return request.done([name])

    async def remove_disk(self, name: str | None = None) -> Hotplug:
        """Take away a disk, the last one if none is named, until QEMU has removed it.

        Raises:
            AcpiError: there is no such disk, or the guest keeps it.
        """
        async with self._request("a disk less") as request:
            name = self._known("disk", self._disks, name)
            request.begin()
            await self._unplug(request, name)
            del self._disks[name]
            await self._machine.command("blockdev-del", {"node-name": name})
            return request.done([name])

    # Shared directories

    async def add_share(self, path: Path | str) -> Hotplug:
        """A directory by virtiofsd, until the guest has mounted and listed it; its tag is the device's name.

        Starting virtiofsd is part of it, as it is of ours.

        Raises:
            AcpiError: there is no virtiofsd, no port is free, or one of the three fails.
        """
        async with self._request("a shared directory") as request:
            name, port = self._name("share"), self._free_port()
            program = find_virtiofsd()
            async with contextlib.AsyncExitStack() as stack:
                request.begin()
                address = await stack.enter_async_context(_serving(program, Path(path), self._machine.directory / name))
                request.note("virtiofsd runs")
                backend = {"type": "socket", "data": {"addr": address, "server": False}}
                await self._machine.command("chardev-add", {"id": name, "backend": backend})
                device = {"driver": "vhost-user-fs-pci", "id": name, "bus": f"port{port}", "chardev": name, "tag": name}
                try:
                    await self._machine.command("device_add", device)
                except AcpiError:
                    await self._quietly("chardev-remove", {"id": name})
                    raise
                self._shares[name] = port, stack.pop_all()
            request.note(f"QEMU answered for {name}")
            await request.until(lambda word: word.text == f"online share {name}")
            return request.done([name])

    async def remove_share(self, name: str | None = None) -> Hotplug:
        """Take away a shared directory, the last one if none is named, until QEMU has removed it.

        Raises:
            AcpiError: there is no such share, or the guest keeps it.
        """
        async with self._request("a shared directory less") as request:
            name = self._known("share", self._shares, name)
            request.begin()
            await self._unplug(request, name)
            _, serving = self._shares.pop(name)
            async with serving:
                await self._machine.command("chardev-remove", {"id": name})
            return request.done([name])

    # What requests have in common

    @contextlib.asynccontextmanager
    async def _request(self, what: str) -> AsyncIterator[_Request]:
        async with self._one_at_a_time:
            yield _Request(what, self._machine)

    def _name(self, kind: str) -> str:
        """A name that no device of this guest has had: what is told late of another is not mistaken for it."""
        if self._worn:
            raise AcpiError(
                f"a {kind} cannot be added once a vCPU was removed, since QEMU would abort: boot another guest"
            )
        self._named += 1
        return f"{kind}{self._named}"

    def _free_port(self) -> int:
        taken = {*self._disks.values(), *(port for port, _ in self._shares.values())}
        free = sorted(set(range(1, PORTS + 1)) - taken)
        if not free:
            raise AcpiError(f"all {PORTS} ports of the guest have a device: remove one first")
        return free[0]

    def _known(self, kind: str, devices: Mapping[str, object], name: str | None) -> str:
        if not devices or name not in {None, *devices}:
            asked = "no name" if name is None else repr(name)
            raise AcpiError(f"there is no {kind} to remove for {asked}: it has {', '.join(devices) or 'none'}")
        return name or list(devices)[-1]

    async def _unplug(self, request: _Request, name: str) -> None:
        await self._machine.command("device_del", {"id": name})
        request.note(f"QEMU answered for {name}")
        word = await request.until(lambda word: _of(word, name) and (word.text == "DEVICE_DELETED" or _refuses(word)))
        if word.text != "DEVICE_DELETED":
            told = f"status {status:#x}" if (status := _status(word)) is not None else word.text
            raise AcpiError(f"the guest keeps {name}: it answered the request to eject it with {told}")

    async def _quietly(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Undo, after an error that is the one to be told."""
        with contextlib.suppress(AcpiError):
            await self._machine.command(command, arguments)


class _Request:
    """One request and the time since it was sent."""

    def __init__(self, name: str, machine: AcpiMachine) -> None:
        self._name = name
        self._machine = machine
        self._began = 0.0
        self._ended = 0.0
        self._answers: list[Step] = []

    def begin(self) -> None:
        self._machine.journal.clear()
        self._began = time.monotonic()
        self._answers = [Step("request sent", 0.0)]

    def note(self, name: str) -> None:
        self._answers.append(Step(name, time.monotonic() - self._began))

    async def until(self, wanted: Callable[[Word], bool], count: int = 1) -> Word:
        """Wait for what was asked for.

        Raises:
            AcpiError: the guest tells that it failed, or QEMU or the time ended.
        """
        found = self._machine.journal.find(lambda word: wanted(word) or word.text.startswith("failed "), count)
        word = await self._machine.while_running(found, f"carrying out the request for {self._name}")
        if word.text.startswith("failed "):
            raise AcpiError(f"the guest cannot use {self._name}: it told {word.text!r}")
        self._ended = word.at
        return word

    def done(self, devices: list[str]) -> Hotplug:
        words = [word for word in self._machine.journal.words if word.source == "guest" or _of_any(word, devices)]
        told = [Step(_spoken(word), word.at - self._began) for word in words]
        seconds = self._ended - self._began
        found = [word.at - self._began for word in words if word.text.startswith("add ") and word.at <= self._ended]
        steps = sorted([*self._answers, *told], key=lambda step: step.seconds)
        kept = tuple(step for step in steps if step.seconds <= seconds)
        return Hotplug(self._name, seconds, max(found, default=seconds), kept, tuple(devices))


def find_qemu() -> Peer:
    """The QEMU for x86-64, and the library that talks to it.

    Raises:
        AcpiError: one of them is missing.
    """
    if shutil.which(PROGRAM) is None:
        raise AcpiError(f"this machine has no {PROGRAM} to compare with: install the package qemu-system-x86")
    if importlib.util.find_spec("qemu") is None or importlib.util.find_spec("qemu.qmp") is None:
        raise AcpiError("this Python has no qemu.qmp to talk to QEMU with: pip install kata-lab[bench]")
    return Peer.find(PROGRAM)


def find_virtiofsd() -> Path:
    """The server of shared directories: Debian's qemu-system-common has it until 12, its own package from 13 on.

    Raises:
        AcpiError: there is none.
    """
    for directory in ("/usr/lib/qemu", "/usr/libexec"):
        if found := shutil.which("virtiofsd", path=directory):
            return Path(found)
    raise AcpiError("this machine has no virtiofsd: install qemu-system-common (Debian 12) or virtiofsd (13 and later)")


@contextlib.asynccontextmanager
async def _serving(program: Path, path: Path, place: Path) -> AsyncIterator[Mapping[str, Any]]:
    """A running virtiofsd, and the address where QEMU reaches it: it inherits the socket that listens there."""
    if not path.is_dir():
        raise AcpiError(f"{path} cannot be shared: it is not a directory")
    with socket.socket(socket.AF_UNIX) as listener, Path(f"{place}.messages").open("wb") as messages:
        listener.bind(os.fspath(place))
        listener.listen(1)
        process = await asyncio.create_subprocess_exec(
            os.fspath(program),
            *(f"--fd={listener.fileno()}", "-o", f"source={path.absolute()},cache=auto"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            pass_fds=(listener.fileno(),),
            process_group=0,
        )
    try:
        yield {"type": "unix", "data": {"path": os.fspath(place)}}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        place.unlink(missing_ok=True)


def _online(word: Word) -> int:
    """How many processors the guest says are online; 0 if it says something else."""
    ranges = word.text.removeprefix("online cpu ")
    if word.source != "guest" or ranges == word.text or not _RANGES.fullmatch(ranges):
        return 0
    ends = [[int(end) for end in each.split("-")] for each in ranges.split(",")]
    return sum(each[-1] - each[0] + 1 for each in ends)


def _of(word: Word, name: str) -> bool:
    """Whether this is an event of the device.

    QEMU's translator never frees a vCPU, and so tells only that its interrupt controller, which goes with it, is gone.
    """
    named = name in (word.data.get("device"), word.data.get("info", {}).get("device"))
    return named or word.data.get("path") == f"/machine/peripheral/{name}/lapic"


def _of_any(word: Word, names: list[str]) -> bool:
    return any(_of(word, name) for name in names)


def _status(word: Word) -> int | None:
    """With which status the guest answered a request to eject."""
    info = word.data.get("info", {})
    return int(info["status"]) if word.text == "ACPI_DEVICE_OST" and info.get("source") == _EJECT else None


def _refuses(word: Word) -> bool:
    return word.text in _REFUSED or _status(word) in _REFUSALS


def _spoken(word: Word) -> str:
    """A step for a person."""
    if word.source == "guest":
        verb, _, rest = word.text.partition(" ")
        found = "the driver has" if rest.startswith(("block ", "virtiofs ")) else "the kernel found"
        return {"add": f"{found} {rest}", "online": f"{rest} is in use"}.get(verb, f"{rest} {verb}")
    if word.text == "ACPI_DEVICE_OST":
        return f"the kernel acknowledged {word.data['info']['device']} (_OST)"
    event = "QEMU removed" if word.text == "DEVICE_DELETED" else word.text
    return f"{event} {word.data.get('device') or word.data['path'].split('/')[3]}"
