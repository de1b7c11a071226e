"""Slots, registers, features and requests of virtio devices, as tables and charts.

Registers are those of virtio-mmio (virtio 1.2, 4.2.2), the steps of initialisation those of 3.1.1, feature bits those
of section 6 and of the block device (5.2.3); bits of other devices are shown by their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLUE, Picture, Table, figure_picture
from kata_lab.lab.slot_probe import Access

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.devices.virtio.queue import Request
    from vmm.microvm import MicroVm
    from vmm.trace import Trace

REGISTERS: Final[Mapping[int, str]] = {
    0x000: "MagicValue",
    0x004: "Version",
    0x008: "DeviceID",
    0x00C: "VendorID",
    0x010: "DeviceFeatures",
    0x014: "DeviceFeaturesSel",
    0x020: "DriverFeatures",
    0x024: "DriverFeaturesSel",
    0x030: "QueueSel",
    0x034: "QueueNumMax",
    0x038: "QueueNum",
    0x044: "QueueReady",
    0x050: "QueueNotify",
    0x060: "InterruptStatus",
    0x064: "InterruptACK",
    0x070: "Status",
    0x080: "QueueDescLow",
    0x084: "QueueDescHigh",
    0x090: "QueueDriverLow",
    0x094: "QueueDriverHigh",
    0x0A0: "QueueDeviceLow",
    0x0A4: "QueueDeviceHigh",
    0x0B0: "SHMLenLow",
    0x0B4: "SHMLenHigh",
    0x0FC: "ConfigGeneration",
}
STATUS_BITS: Final[Mapping[int, str]] = {
    1: "ACKNOWLEDGE",
    2: "DRIVER",
    8: "FEATURES_OK",
    4: "DRIVER_OK",
    64: "DEVICE_NEEDS_RESET",
    128: "FAILED",
}
_STATUS_STEPS: Final[Mapping[int, str]] = {
    1: "a device was noticed",
    2: "there is a driver for it",
    8: "the features are chosen",
    4: "the queues are set up: go",
}
_RESERVED_BITS: Final[Mapping[int, str]] = {
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
}
_BLOCK_BITS: Final[Mapping[int, str]] = {
    1: "SIZE_MAX",
    2: "SEG_MAX",
    4: "GEOMETRY",
    5: "RO",
    6: "BLK_SIZE",
    9: "FLUSH",
    10: "TOPOLOGY",
    11: "CONFIG_WCE",
    12: "MQ",
    13: "DISCARD",
    14: "WRITE_ZEROES",
}
_BLOCK_ID: Final = 2
_MICROSECONDS: Final = 1e6


def slot_table(vm: MicroVm) -> Table:
    """The virtio-mmio slots of a machine, as a driver that probes them finds them."""
    from vmm.board.riscv_virt import virtio_address, virtio_interrupt
    from vmm.devices.virtio.mmio import VirtioMmio

    rows = []
    for number, slot in enumerate(vm.machine.board.slots):
        magic = slot.read(0x000, 4).to_bytes(4, "little")
        name = slot.device.name if isinstance(slot, VirtioMmio) else "(empty)"
        rows.append(
            (
                f"{virtio_address(number):#x}",
                str(virtio_interrupt(number)),
                repr(magic)[1:],
                str(slot.read(0x004, 4)),
                str(slot.read(0x008, 4)),
                status_text(slot.read(0x070, 4)) or "-",
                name,
            )
        )
    header = ("address", "interrupt", "MagicValue", "Version", "DeviceID", "Status", "what we plugged")
    return Table(header, rows, "The virtio-mmio slots")


def status_text(status: int) -> str:
    """The bits of a device status by name."""
    return " ".join(name for bit, name in STATUS_BITS.items() if status & bit)


def access_table(accesses: Iterable[Access], caption: str = "") -> Table:
    """What a driver did to a slot's registers, in order, and what it means; writes to Status are marked."""
    rows: list[tuple[str, ...]] = []
    marked = set()
    status = 0
    sel = {0x014: 0, 0x024: 0}
    for access in accesses:
        name = REGISTERS.get(access.offset, f"configuration + {access.offset - 0x100:#x}")
        meaning = _meaning(access, status, sel)
        if access.offset == 0x070 and access.write:
            marked.add(len(rows))
            status = access.value
        if access.write and access.offset in sel:
            sel[access.offset] = access.value
        rows.append(("write" if access.write else "read", f"{access.offset:03x} {name}", f"{access.value:#x}", meaning))
    return Table(
        ("access", "register", "value", "what it means"),
        rows,
        caption or f"{len(rows)} accesses, in order",
        frozenset(marked),
    )


def _meaning(access: Access, status: int, sel: Mapping[int, int]) -> str:
    value = access.value
    match access.offset:
        case 0x000 | 0x00C:
            return f"the bytes {value.to_bytes(4, 'little').decode('ascii', 'replace')!r}"
        case 0x010:
            return f"offered bits {32 * sel[0x014]} to {32 * sel[0x014] + 31}"
        case 0x020:
            return f"accepted bits {32 * sel[0x024]} to {32 * sel[0x024] + 31}"
        case 0x030:
            return f"the next registers are about queue {value}"
        case 0x034:
            return f"at most {value} entries"
        case 0x038:
            return f"{value} entries it shall be"
        case 0x044:
            return "the queue may be used" if value else "the queue is not in use"
        case 0x050:
            return f"buffers wait in queue {value}"
        case 0x060 | 0x064:
            names = [name for bit, name in ((1, "a used buffer"), (2, "the configuration changed")) if value & bit]
            return " and ".join(names)
        case 0x070 if not access.write:
            return status_text(value)
        case 0x070:
            added = [f"{STATUS_BITS[bit]}: {step}" for bit, step in _STATUS_STEPS.items() if value & bit & ~status]
            return "reset" if not value else "; ".join(added)
    return ""


def feature_table(device: VirtioDevice) -> Table:
    """Every feature that a device offers, and whether its driver accepted it."""
    from vmm.devices.virtio.device import COMMON_FEATURES

    offered, accepted = device.features | COMMON_FEATURES, device.accepted
    rows = []
    for bit in range(64):
        if (offered | accepted) >> bit & 1:
            own = _BLOCK_BITS if device.DEVICE_ID == _BLOCK_ID else {}
            name, where = own.get(bit, ""), "5.2.3"
            if bit in _RESERVED_BITS:
                name, where = _RESERVED_BITS[bit], "6"
            rows.append(
                (str(bit), name or "of this device", where if name else "", _mark(offered, bit), _mark(accepted, bit))
            )
    caption = f"Features of {device.name}"
    return Table(("bit", "name", "virtio 1.2", "offered", "accepted"), rows, caption)


def _mark(features: int, bit: int) -> str:
    return "yes" if features >> bit & 1 else "-"


def request_table(requests: Sequence[Request]) -> Table:
    """Buffers that went through a queue, the oldest first."""
    rows = [
        (
            each.detail,
            str(each.head),
            str(each.readable),
            str(each.writable),
            str(each.written),
            f"{each.seconds * _MICROSECONDS:,.0f}",
        )
        for each in requests
    ]
    header = ("what it was", "head", "to read", "to write", "written", "µs")
    return Table(header, rows, f"{len(rows)} requests")


def latency_chart(requests: Sequence[Request]) -> Picture:
    """How long requests were with the device, as a histogram over microseconds.

    Raises:
        LabError: there are none.
    """
    from matplotlib.figure import Figure

    if not requests:
        raise LabError("no request was traced: set `queue.tracing`, and have the guest ask for something")
    times = sorted(each.seconds * _MICROSECONDS for each in requests)
    figure = Figure(figsize=(8, 2.4))
    axes = figure.subplots()
    axes.hist(times, bins=24, color=BLUE, edgecolor="black", linewidth=0.5)
    axes.set_xlabel("µs from taking the buffer to giving it back")
    axes.set_ylabel("requests")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd")
    median = times[len(times) // 2]
    return figure_picture(
        figure,
        f"Histogram of {len(times)} requests: the shortest took {times[0]:.0f} µs, the middle one {median:.0f} µs,"
        f" the longest {times[-1]:.0f} µs.",
    )


def exit_counts(trace: Trace) -> dict[tuple[str, str], int]:
    """Exits so far by kind and device, SBI function or "": what :func:`exits_per` compares."""
    return {(each.kind, each.name): each.count for each in trace.exits}


def exits_per(before: Mapping[tuple[str, str], int], after: Mapping[tuple[str, str], int], requests: int) -> Table:
    """Exits between two counts, for each of so many requests, the most first."""
    grown = {key: count - before.get(key, 0) for key, count in after.items()}
    order = sorted((key for key in grown if grown[key]), key=lambda key: (-grown[key], key))
    rows = [
        (f"{kind} {name}".strip(), f"{grown[kind, name]:,}", f"{grown[kind, name] / requests:.2f}")
        for kind, name in order
    ]
    return Table(("exit", "how many", "per request"), rows, f"Exits while {requests:,} requests were made")
