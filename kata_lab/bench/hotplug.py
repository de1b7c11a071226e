"""``kata-lab bench hotplug``: from the request until the guest uses what came, by upcall and through ACPI and PCI.

Ours is the lifsea guest in a MicroVm, whose device manager is asked over vsock (:mod:`vmm.hotplug`); the other is a
QEMU guest with ACPI and PCI (:mod:`kata_lab.bench.acpi`). In each run either side boots a fresh guest, in turns, and
carries out the same list, one request after the other. The clock runs from sending the request:

====================  =================================================  =============================================
figure                ours ends with                                     QEMU's ends with
====================  =================================================  =============================================
vcpu_plus_1_ms        the answer: the guest brought it online            the guest's word: it brought it online
vcpu_2_to_3_ms        the same of one more                               the same of one more
vcpu_plus_4_ms        the same of four more                              the same of four more
disk_ms               the answer: the guest's driver has it              the kernel's event: its driver has it
share_ms              the same                                           the same, virtiofsd's start included
memory_plus_64_ms     the answer: the balloon gave back 64 MiB           the guest's word: 128 MiB are online
memory_minus_64_ms    the answer: the balloon took 64 MiB                the event: 128 MiB are removed
vcpu_minus_1_ms       the answer: it is offline and its thread ended     the event: it is removed
disk_removal_ms       the answer: driver and slot let it go              the event: it is removed
share_removal_ms      the same                                           the same
====================  =================================================  =============================================

Before that a disk comes and goes uncounted on both sides: then both guests are certainly up. After that, what ours
answered is looked for in the guest, through a shell: the list of processors, the disk's bytes, the shared file, and the
memory. Two things are not alike on both sides, and ``limits`` repeats them. A kernel for x86-64 takes memory in blocks
of 128 MiB. And it runs code for one processor until there is a second, and then patches itself (``SMP alternatives``,
arch/x86/kernel/alternative.c), which is the larger part of QEMU's first vCPU: told ``noreplace-smp``, the kernel has it
online in about a third of the time. The vCPU after it shows what is left without.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.bench.acpi import AcpiGuest, find_qemu, find_virtiofsd
from kata_lab.bench.acpi_image import acpi_image
from kata_lab.bench.boot import prepare, versions
from kata_lab.bench.measure import BenchError, Sample, steps, warm

if TYPE_CHECKING:
    from kata_lab.image.library import Image
    from kata_lab.shell import GuestShell
    from vmm.actions import HotplugAction
    from vmm.microvm import MicroVm

NAMES: Final = (
    *(
        "vcpu_plus_1_ms",
        "vcpu_2_to_3_ms",
        "vcpu_plus_4_ms",
        "disk_ms",
        "share_ms",
        "memory_plus_64_ms",
        "memory_minus_64_ms",
    ),
    *("vcpu_minus_1_ms", "disk_removal_ms", "share_removal_ms"),
)
MAX_VCPUS: Final = 8
MEMORY_MIB: Final = 512
STEP_MIB: Final = 64
DISK_BYTES: Final = 16 << 20
CONTENT: Final = b"kata-lab"
GOAL_MS: Final = 50.0  #: of vcpu_plus_1_ms
GOAL_RATIO: Final = 5.0  #: of the same
_PATIENCE: Final = 120.0
_UNLIKE: Final = {
    "vcpu_2_to_3_ms": "without what the first vCPU costs QEMU's guest besides, the switch from code for one processor",
    "memory_plus_64_ms": "QEMU's guest takes memory in blocks of 128 MiB, ours a page at a time",
    "memory_minus_64_ms": "QEMU's guest gives memory in blocks of 128 MiB, ours a page at a time",
}


@dataclass(frozen=True, slots=True)
class Times:
    """Of one figure on one side: median and largest, in milliseconds."""

    median: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HotplugFigures:
    """What was measured.

    Attributes:
        ours: name → times, for each of :data:`NAMES`.
        qemu: the same.
        ratio: how many times sooner ours is: the median of QEMU / that of ours.
        limits: of what misses its goal, what the time went to; and what is not alike on both sides.
        runs: measured runs of each side.
        versions: of what took part.
    """

    ours: dict[str, Times]
    qemu: dict[str, Times]
    ratio: dict[str, float]
    limits: dict[str, str] = field(default_factory=dict)
    runs: int
    versions: dict[str, str] = field(default_factory=dict)


def measure_hotplug(runs: int) -> HotplugFigures:
    """Measure.

    Raises:
        AcpiError: there is no QEMU or virtiofsd, or QEMU or its guest fails.
        BenchError: our guest does not have what the VM answered that it has.
        ImageError: a guest cannot be built.
        VmmError: a hotplug of ours failed.
    """
    from kata_lab.image.build import build_named

    peer = find_qemu()
    find_virtiofsd()
    images = build_named("lifsea"), acpi_image()
    prepare()
    warm([file for image in images for file in (image.kernel, image.root)])
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kata-lab-bench-") as name, steps("Measuring hotplug", 2 * runs) as begin:
        place = Path(name)
        _fill(place)
        for _ in range(runs):
            begin("ours")
            told, line = _ours(images[0], place)
            ours.append(told)
            lines.append(line)
            begin("QEMU")
            theirs.append(asyncio.run(_qemu(images[1], place)))
    releases = {"guest kernel": images[0].manifest["release"], "qemu guest kernel": images[1].manifest["release"]}
    return figures(ours, theirs, lines, {**versions(), "qemu": peer.version, **releases})


def figures(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], lines: Sequence[str], told: dict[str, str]
) -> HotplugFigures:
    """Put runs together; milliseconds by name, and how the time of each +1 of ours went."""
    mine, qemu = ({name: _times([run[name] for run in side]) for name in NAMES} for side in (ours, theirs))
    ratio = {name: qemu[name].median / mine[name].median for name in NAMES}
    limits = dict(_UNLIKE)
    if mine["vcpu_plus_1_ms"].median > GOAL_MS or ratio["vcpu_plus_1_ms"] < GOAL_RATIO:
        slowest = max(range(len(ours)), key=lambda run: ours[run]["vcpu_plus_1_ms"])
        limits["vcpu_plus_1_ms"] = f"the slowest went to: {lines[slowest]}"
    return HotplugFigures(ours=mine, qemu=qemu, ratio=ratio, limits=limits, runs=len(ours), versions=told)


def _times(values: list[float]) -> Times:
    return Times(Sample(tuple(values)).median, max(values))


def _fill(place: Path) -> None:
    (place / "disk").write_bytes(CONTENT + bytes(DISK_BYTES - len(CONTENT)))
    (place / "first").write_bytes(bytes(1 << 20))
    (place / "share").mkdir()
    (place / "share" / "file").write_bytes(CONTENT)


def _ours(image: Image, place: Path) -> tuple[dict[str, float], str]:
    """Milliseconds by name, and how the time of the first vCPU went."""
    from kata_lab.shell import boot_image
    from vmm import actions
    from vmm.config import BlockConfig, FsConfig, VsockConfig

    room = MEMORY_MIB + STEP_MIB
    vsock = VsockConfig(socket=place / "vsock")
    booted = boot_image(image, devices=[vsock], max_vcpus=MAX_VCPUS, memory_mib=MEMORY_MIB, max_memory_mib=room)
    with booted as (vm, shell):

        def ask(action: HotplugAction[Any]) -> float:
            began = time.monotonic()
            vm.request(action).result(_PATIENCE)
            return (time.monotonic() - began) * 1e3

        ask(actions.InsertBlockDevice(BlockConfig(name="first", path=place / "first")))
        ask(actions.RemoveBlockDevice("first"))
        told = {"vcpu_plus_1_ms": ask(actions.ResizeVcpu(2))}
        line = _line(vm)
        told["vcpu_2_to_3_ms"] = ask(actions.ResizeVcpu(3))
        told["vcpu_plus_4_ms"] = ask(actions.ResizeVcpu(7))
        told["disk_ms"] = ask(actions.InsertBlockDevice(BlockConfig(name="disk", path=place / "disk")))
        told["share_ms"] = ask(actions.InsertFsDevice(FsConfig(name="share", path=place / "share", tag="share")))
        _check(shell, "cat /sys/devices/system/cpu/online", "0-6")
        _check(shell, f"head -c {len(CONTENT)} /dev/vda", CONTENT.decode())
        _check(shell, "mount -t virtiofs share /mnt && cat /mnt/file && umount /mnt", CONTENT.decode())
        before = _free_mib(shell)
        told["memory_plus_64_ms"] = ask(actions.ResizeMemory(MEMORY_MIB + STEP_MIB))
        if (gained := _free_mib(shell) - before) < STEP_MIB / 2:
            raise BenchError(f"the guest was given {STEP_MIB} MiB and has {gained} MiB more than before")
        told["memory_minus_64_ms"] = ask(actions.ResizeMemory(MEMORY_MIB))
        told["disk_removal_ms"] = ask(actions.RemoveBlockDevice("disk"))
        told["share_removal_ms"] = ask(actions.RemoveFsDevice("share"))
        told["vcpu_minus_1_ms"] = ask(actions.ResizeVcpu(6))
        _check(shell, "cat /sys/devices/system/cpu/online; ls /dev/vda 2>/dev/null", "0-5\n")
    return told, line


def _line(vm: MicroVm) -> str:
    """The steps of the last hotplug, with milliseconds since it was asked for."""
    record = vm.hotplugs[-1]
    told = [f"{step.name} at {(step.seconds - record.requested_at) * 1e3:.0f} ms" for step in record.steps]
    return ", ".join([*told, f"answered at {(record.answered_at - record.requested_at) * 1e3:.0f} ms"])


def _check(shell: GuestShell, command: str, wanted: str) -> None:
    found = shell.run(command).output
    if found.strip() != wanted.strip():
        raise BenchError(f"the guest has {found!r} where the VM's answer was for {wanted!r}: asked by {command!r}")


def _free_mib(shell: GuestShell) -> int:
    return int(shell.run("sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo", check=True).output) >> 10


async def _qemu(image: Image, place: Path) -> dict[str, float]:
    """Milliseconds by name."""
    async with AcpiGuest(max_vcpus=MAX_VCPUS, memory_mib=MEMORY_MIB, image=image) as guest:
        await guest.add_disk(place / "first")
        await guest.remove_disk()
        told = {
            "vcpu_plus_1_ms": (await guest.add_vcpus(1)).seconds,
            "vcpu_2_to_3_ms": (await guest.add_vcpus(1)).seconds,
            "vcpu_plus_4_ms": (await guest.add_vcpus(4)).seconds,
            "disk_ms": (await guest.add_disk(place / "disk")).taken,
            "share_ms": (await guest.add_share(place / "share")).taken,
            "memory_plus_64_ms": (await guest.resize_memory(guest.block_mib)).seconds,
            "memory_minus_64_ms": (await guest.resize_memory(-guest.block_mib)).seconds,
            "disk_removal_ms": (await guest.remove_disk()).seconds,
            "share_removal_ms": (await guest.remove_share()).seconds,
            "vcpu_minus_1_ms": (await guest.remove_vcpus(1)).seconds,
        }
    return {name: seconds * 1e3 for name, seconds in told.items()}
