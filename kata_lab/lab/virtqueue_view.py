"""A virtqueue in pictures and tables: what driver and device have written, and where a chain of descriptors leads.

What is shown is a :class:`Frame`, taken at one moment from a slot: the queue's own decoded view
(:meth:`vmm.devices.virtio.queue.Queue.view`) and, for each buffer that waits to be taken, the way through its
descriptors (virtio 1.2, 2.7.5 to 2.7.8). The device merges neighbouring parts of a chain; here every descriptor is
kept, and one that breaks a rule is shown, with what is wrong, instead of refused. Packed queues are left out.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kata_lab.lab.picture import ORANGE, SKY, YELLOW, Picture, Table, drawing

if TYPE_CHECKING:
    from vmm.devices.virtio.mmio import VirtioMmio
    from vmm.memory import GuestMemory

KEPT_BYTES: Final = 64  #: of each part that a frame copies
_LONGEST: Final = 1024  #: descriptors that are followed
_ROWS: Final = 6
_ROW: Final = 22
_MONO: Final = "font-family='monospace' font-size='11'"


@dataclass(frozen=True, slots=True)
class Part:
    """One descriptor of a chain.

    Attributes:
        index: its place in its table.
        inside: whether that is the indirect table, not the queue's own.
        address: guest-physical.
        length: bytes.
        flags: NEXT 1, WRITE 2, INDIRECT 4.
        next: where the chain goes on, if NEXT is set.
        data: a copy of the first bytes that it names, at most :data:`KEPT_BYTES`; empty where memory is not.
    """

    index: int
    inside: bool
    address: int
    length: int
    flags: int
    next: int
    data: bytes

    @property
    def writable(self) -> bool:
        """Whether the device writes it."""
        from vmm.devices.virtio.queue import WRITE

        return bool(self.flags & WRITE)

    @property
    def indirect(self) -> bool:
        """Whether what it names is a table of descriptors."""
        from vmm.devices.virtio.queue import INDIRECT

        return bool(self.flags & INDIRECT)

    @property
    def flag_names(self) -> str:
        """Such as ``NEXT WRITE``, or ``-``."""
        names = [name for bit, name in ((1, "NEXT"), (2, "WRITE"), (4, "INDIRECT")) if self.flags & bit]
        return " ".join(names) or "-"


@dataclass(frozen=True, slots=True)
class Walk:
    """The way through one chain: its first descriptor, all parts in order, and what is wrong ("" if nothing)."""

    head: int
    parts: tuple[Part, ...]
    problem: str = ""

    @property
    def readable(self) -> tuple[Part, ...]:
        """The parts that the device reads."""
        return tuple(part for part in self.parts if not part.indirect and not part.writable)

    @property
    def writable(self) -> tuple[Part, ...]:
        """The parts that the device writes."""
        return tuple(part for part in self.parts if not part.indirect and part.writable)


@dataclass(frozen=True, slots=True)
class Frame:
    """A slot and one of its queues at one moment.

    Attributes:
        number: of the queue.
        view: what :meth:`vmm.devices.virtio.queue.Queue.view` says.
        waiting: the buffers that the driver made available and the device did not take yet.
        status: of the device, as the driver set it (2.1).
        interrupt_status: 1 a used buffer, 2 a change of configuration (4.2.2).
    """

    number: int
    view: Mapping[str, Any]
    waiting: tuple[Walk, ...]
    status: int
    interrupt_status: int


def take_frame(slot: VirtioMmio, number: int) -> Frame:
    """What queue ``number`` of a slot is now; nothing is changed by looking."""
    queue = slot.device.queues[number]
    waiting: list[Walk] = []
    with slot.device.lock:  # so that the driver does not take the queue away meanwhile
        view = queue.view()
        if view["ready"]:
            size, taken = view["size"], view["next_available"]
            for each in range(min((view["available_index"] - taken) & 0xFFFF, size)):
                head = view["available"][(taken + each) % size]
                waiting.append(follow(queue.memory, view["table"], head))
    return Frame(number, view, tuple(waiting), slot.read(0x070, 4), slot.read(0x060, 4))


def follow(memory: GuestMemory, table: Sequence[tuple[int, int, int, int]], head: int) -> Walk:
    """The way through the chain that begins at descriptor ``head`` of ``table``."""
    from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, NEXT

    parts: list[Part] = []
    inside, index = False, head
    seen: set[int] = set()
    while True:
        if index >= len(table):
            return Walk(head, tuple(parts), f"descriptor {index} is beyond a table of {len(table)}")
        if index in seen or len(parts) >= _LONGEST:
            return Walk(head, tuple(parts), f"descriptor {index} comes a second time: a loop")
        seen.add(index)
        address, length, flags, following = table[index]
        there = memory.base <= address <= memory.end - length
        data = memory.read(address, min(length, KEPT_BYTES)) if there else b""
        parts.append(Part(index, inside, address, length, flags, following, data))
        if not there:
            return Walk(head, tuple(parts), f"descriptor {index} names {address:#x}+{length:#x}, outside memory")
        if flags & INDIRECT:
            if inside or length % DESCRIPTOR.size or not length:
                return Walk(head, tuple(parts), f"descriptor {index} is an indirect one where none may be")
            table = list(DESCRIPTOR.iter_unpack(memory.read(address, min(length, DESCRIPTOR.size * _LONGEST))))
            inside, index = True, 0
            seen.clear()
        elif flags & NEXT:
            index = following
        else:
            return Walk(head, tuple(parts))


def walk_table(walk: Walk) -> Table:
    """A chain, descriptor by descriptor, with the first bytes of what each names."""
    rows = [
        (
            f"{'indirect' if part.inside else 'queue'}[{part.index}]",
            f"{part.address:#x}",
            f"{part.length}",
            part.flag_names,
            "a table" if part.indirect else "device writes" if part.writable else "device reads",
            part.data[:16].hex(" "),
        )
        for part in walk.parts
    ]
    caption = f"the chain that begins at descriptor {walk.head}" + (f"; {walk.problem}" if walk.problem else "")
    return Table(("table[index]", "address", "bytes", "flags", "what for", "first bytes"), rows, caption)


def hex_table(data: bytes, base: int = 0) -> Table:
    """Bytes, 16 to a row, as numbers and as characters."""
    rows = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in row)
        rows.append((f"{base + start:#x}", row.hex(" "), text))
    return Table(("address", "bytes", "as text"), rows, f"{len(data)} bytes")


def draw_queue(frame: Frame, walk: Walk | None = None) -> Picture:
    """The three areas of a queue, and one chain through them.

    Args:
        frame: the moment.
        walk: the chain to mark; the first that waits if not said otherwise.
    """
    view = frame.view
    if not view["ready"]:
        text = f"Queue {frame.number} is not ready: the driver has not said where it is."
        return drawing(f"<text x='10' y='24'>{html.escape(text)}</text>", 700, 40, text)
    if walk is None and frame.waiting:
        walk = frame.waiting[0]
    body: list[str] = []
    said: list[str] = []
    height = max(
        _draw_available(frame, body, said),
        _draw_descriptors(frame, walk, body, said),
        _draw_used(frame, body, said),
    )
    return drawing("".join(body), 1035, height, " ".join(said))


def _box(x: int, row: int, width: int, text: str, fill: str = "white") -> str:
    y = 54 + row * _ROW
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{_ROW}' fill='{fill}' stroke='#888'/>"
        f"<text x='{x + 5}' y='{y + 15}' xml:space='preserve' {_MONO}>{html.escape(text)}</text>"
    )


def _heading(x: int, title: str, below: str) -> str:
    return (
        f"<text x='{x}' y='20' font-weight='bold'>{html.escape(title)}</text>"
        f"<text x='{x}' y='38' font-size='11'>{html.escape(below)}</text>"
    )


def _window(last: int, size: int) -> list[int]:
    """Free-running positions around ``last``, the newest below, none twice in the ring."""
    count = min(_ROWS, size)
    first = max(last - count + 1, 0)
    return list(range(first, first + count))


def _draw_available(frame: Frame, body: list[str], said: list[str]) -> int:
    view = frame.view
    size, index, taken = view["size"], view["available_index"], view["next_available"]
    body.append(_heading(10, "available ring", f"by the driver: idx = {index}; taken: {taken}"))
    for row, position in enumerate(_window(index, size)):
        new = (position - taken) & 0xFFFF < (index - taken) & 0xFFFF
        mark = "  new" if new else ""
        text = f"ring[{position % size}] = {view['available'][position % size]}{mark}"
        body.append(_box(10, row, 175, text, YELLOW if new else "white"))
    fresh = ", ".join(str(walk.head) for walk in frame.waiting) or "none"
    said.append(
        f"Queue {frame.number} of {size} entries. Available ring: idx {index}, the device has taken {taken};"
        f" new heads: {fresh}."
    )
    return 70 + _ROWS * _ROW


def _draw_descriptors(frame: Frame, walk: Walk | None, body: list[str], said: list[str]) -> int:
    view, parts = frame.view, walk.parts if walk is not None else ()
    own = {part.index: part for part in parts if not part.inside}
    shown = sorted(own)[:_ROWS]
    for near in range(view["size"]):
        if len(shown) >= _ROWS:
            break
        if near not in own:
            shown.append(near)
    shown.sort()
    body.append(_heading(235, "descriptor table", f"by the driver: {view['size']} × address, length, flags"))
    for row, index in enumerate(shown):
        address, length, _, _ = view["table"][index]
        part = own.get(index)
        text = f"[{index}] {address:#x} {length:>5}"
        body.append(_box(235, row, 290, text + (f" {part.flag_names}" if part else ""), _fill(part)))
    if walk is not None and walk.head in shown:
        end = 54 + shown.index(walk.head) * _ROW + 11
        start = 54 + 11 + _ROW * _row_of(frame, walk.head)
        body.append(_arrow(185, start, 235, end))
    inside = [part for part in parts if part.inside]
    if inside:
        body.append(_heading(570, "indirect table", "by the driver, for this buffer only"))
        for row, part in enumerate(inside[:_ROWS]):
            body.append(
                _box(570, row, 235, f"[{part.index}] {part.address:#x} {part.length:>5} {_way(part)}", _fill(part))
            )
        body.append(_arrow(525, 54 + shown.index(walk.head if walk else 0) * _ROW + 11, 570, 65))
        if len(inside) > _ROWS:
            body.append(
                f"<text x='570' y='{54 + _ROWS * _ROW + 15}' font-size='11'>and {len(inside) - _ROWS} more</text>"
            )
    for x, part_text, fill in ((235, "R: the device reads", SKY), (380, "W: the device writes", ORANGE)):
        y = 62 + _ROWS * _ROW
        body.append(f"<rect x='{x}' y='{y}' width='12' height='12' fill='{fill}' stroke='#888'/>")
        body.append(f"<text x='{x + 17}' y='{y + 11}' font-size='11'>{part_text}</text>")
    if walk is not None:
        chain = "; ".join(
            f"{'indirect' if part.inside else 'queue'}[{part.index}] {part.length} bytes at {part.address:#x},"
            f" {'a table' if part.indirect else 'the device writes' if part.writable else 'the device reads'}"
            for part in parts
        )
        said.append(f"The chain at descriptor {walk.head}: {chain}.")
    return 90 + _ROWS * _ROW


def _draw_used(frame: Frame, body: list[str], said: list[str]) -> int:
    view = frame.view
    size, index = view["size"], view["used_index"]
    body.append(_heading(840, "used ring", f"by the device: idx = {index}"))
    last = max(index - 1, 0)
    for row, position in enumerate(_window(last, size)):
        head, written = view["used"][position % size]
        newest = index > 0 and position == last
        mark = " latest" if newest else ""
        body.append(
            _box(840, row, 185, f"[{position % size}] {head}, {written} bytes{mark}", YELLOW if newest else "white")
        )
    newest_said = "nothing yet"
    if index:
        head, written = view["used"][last % size]
        newest_said = f"descriptor {head} with {written} bytes written"
    said.append(f"Used ring: idx {index}, the newest element is {newest_said}.")
    return 70 + _ROWS * _ROW


def _row_of(frame: Frame, head: int) -> int:
    """The row of the available ring that names ``head``, from the newest up."""
    view = frame.view
    window = _window(view["available_index"], view["size"])
    rows = [row for row, position in enumerate(window) if view["available"][position % view["size"]] == head]
    newest = [row for row in rows if window[row] < view["available_index"]]
    return (newest or rows or [0])[-1]


def _way(part: Part) -> str:
    return "W" if part.writable else "R"


def _fill(part: Part | None) -> str:
    if part is None or part.indirect:
        return "white" if part is None else YELLOW
    return ORANGE if part.writable else SKY


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return (
        f"<line x1='{x1}' y1='{y1}' x2='{x2 - 7}' y2='{y2}' stroke='black' stroke-width='1.5'/>"
        f"<path d='M {x2 - 8} {y2 - 4} L {x2} {y2} L {x2 - 8} {y2 + 4} z' fill='black'/>"
    )
