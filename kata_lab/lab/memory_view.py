"""Guest memory as the host sees it: which pages it really gave, and what answers at which address.

The host's page table is read from ``/proc/self/pagemap`` (Linux Documentation/admin-guide/mm/pagemap.rst): bit 63 of an
entry says that the page is in RAM, bit 62 that it is swapped out. A host with transparent huge pages gives 2 MiB at the
first touch of an aligned range.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLUE, Picture, Table, drawing

if TYPE_CHECKING:
    from vmm.bus import Bus
    from vmm.memory import GuestMemory

_ENTRY_BYTES: Final = 8
_GIVEN_BITS: Final = 0xC0
_PAGEMAP: Final = "/proc/self/pagemap"


def touched_bytes(memory: GuestMemory, start: int | None = None, length: int | None = None) -> int:
    """Bytes of guest memory, or of ``length`` bytes from guest-physical ``start``, that the host has given so far.

    Raises:
        LabError: the host has no readable ``/proc/self/pagemap``.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    offset = 0 if start is None else start - memory.base
    size = memory.size - offset if length is None else length
    first = (memory.host_address + offset) // page
    pages = -(-size // page)
    try:
        with open(_PAGEMAP, "rb", buffering=0) as pagemap:
            pagemap.seek(first * _ENTRY_BYTES)
            entries = pagemap.read(pages * _ENTRY_BYTES)
    except OSError as error:
        raise LabError(f"{_PAGEMAP} cannot be read: {error.strerror}; a Linux host with /proc has it") from error
    return page * sum(1 for top in entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES] if top & _GIVEN_BITS)


def draw_touched(memory: GuestMemory, cells: int = 64) -> Picture:
    """Guest memory from its first byte (left) to its last, in equal parts, each filled as far as the host gave it."""
    width, height = 10, 60
    part = memory.size // cells
    shares = [touched_bytes(memory, memory.base + number * part, part) / part for number in range(cells)]
    given = touched_bytes(memory)
    alternative = (
        f"Guest memory from {memory.base:#x} to {memory.end:#x}: the host has given {given / 1024:,.0f} of "
        f"{memory.size / 1024:,.0f} KiB, in {sum(share > 0 for share in shares)} of {cells} equal parts."
    )
    body = []
    for number, share in enumerate(shares):
        x, filled = 10 + number * width, max(share * height, 3 if share else 0)
        body.append(f"<rect x='{x}' y='10' width='{width}' height='{height}' fill='white' stroke='#999'/>")
        body.append(
            f"<rect x='{x}' y='{10 + height - filled:.1f}' width='{width}' height='{filled:.1f}' fill='{BLUE}'/>"
        )
    body.append(f"<text x='10' y='88'>{memory.base:#x}</text>")
    body.append(f"<text x='{10 + cells * width}' y='88' text-anchor='end'>{memory.end:#x}</text>")
    middle = 10 + cells * width / 2
    body.append(f"<text x='{middle}' y='88' text-anchor='middle'>{given / 1024:,.0f} KiB given (filled)</text>")
    return drawing("".join(body), 20 + cells * width, 100, alternative)


def address_table(bus: Bus, memory: GuestMemory) -> Table:
    """What answers at which guest-physical address: every device on the bus, and RAM."""
    spans = [(each.base, each.end, each.name) for each in bus.attachments]
    spans.append((memory.base, memory.end, "RAM"))
    rows = [(f"{base:#011x}", f"{end - 1:#011x}", f"{end - base:#x}", name) for base, end, name in sorted(spans)]
    return Table(("first address", "last address", "bytes", "who answers"), rows, "Physical addresses of the guest")
