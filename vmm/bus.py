"""The bus: which device answers at a guest-physical address.

Every load or store that an engine cannot satisfy from memory comes here. A device is anything with ``read`` and
``write``; it sees offsets from its own first byte and never learns where the board put it.

An access belongs to the device that holds all of its bytes; one that starts in a device and leaves it, or starts where
no device is, raises :class:`~vmm.errors.BusError`, which the VMM turns into an access fault or a crash report. Which
widths and alignments a device serves is the device's business: it reads 0 and ignores writes, or raises BusError, and
its documentation says which.

Attaching and detaching publish a new table in one assignment, so that lookups on other threads need no lock. Port I/O
(x86) is not covered.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vmm.errors import BusError, ConfigError


class Device(Protocol):
    """What the bus asks of a device. ``offset`` counts from the device's first byte, ``width`` is in bytes."""

    def read(self, offset: int, width: int) -> int:
        """The little-endian unsigned value of ``width`` bytes at ``offset``."""
        ...

    def write(self, offset: int, width: int, value: int) -> None:
        """Store the unsigned ``value`` of ``width`` bytes at ``offset``."""
        ...


@dataclass(frozen=True, slots=True)
class Attachment:
    """A device and the guest-physical range it answers at: ``size`` bytes from ``base``."""

    base: int
    size: int
    name: str
    device: Device

    @property
    def end(self) -> int:
        """Guest-physical address of the byte after the last."""
        return self.base + self.size


# (base, end, read, write): what a lookup needs, without a detour over the attachment.
_Span = tuple[int, int, Callable[[int, int], int], Callable[[int, int, int], None]]


class _Nobody:
    """Stands below the lowest device, so that a lookup always finds a span to look at."""

    def read(self, offset: int, width: int) -> int:
        raise AssertionError("no access fits into an empty span")

    def write(self, offset: int, width: int, value: int) -> None:
        raise AssertionError("no access fits into an empty span")


_BELOW_EVERYTHING = -(1 << 64)
_EMPTY: _Span = (_BELOW_EVERYTHING, _BELOW_EVERYTHING, _Nobody().read, _Nobody().write)


class Bus:
    """Maps guest-physical address ranges to devices."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attachments: tuple[Attachment, ...] = ()
        self._table: tuple[list[int], list[_Span]] = ([_BELOW_EVERYTHING], [_EMPTY])

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """All attached devices, lowest address first."""
        return self._attachments

    def attach(self, device: Device, base: int, size: int, name: str) -> None:
        """Let ``device`` answer for ``size`` bytes from guest-physical ``base``.

        Raises:
            ConfigError: the range is empty, starts below 0 or overlaps another device's.
        """
        new = Attachment(base, size, name, device)
        if base < 0 or size <= 0:
            raise ConfigError(f"{name} at {base:#x} with {size} bytes needs a base of 0 or more and at least 1 byte")
        with self._lock:
            for other in self._attachments:
                if new.base < other.end and other.base < new.end:
                    raise ConfigError(
                        f"{name} at {new.base:#x}..{new.end:#x} overlaps {other.name} at {other.base:#x}.."
                        f"{other.end:#x}; give it a range of its own"
                    )
            self._publish((*self._attachments, new))

    def detach(self, base: int) -> Attachment:
        """Remove the device whose range starts at ``base`` and return what was attached there.

        Raises:
            BusError: no device starts at ``base``.
        """
        with self._lock:
            for found in self._attachments:
                if found.base == base:
                    self._publish(tuple(other for other in self._attachments if other is not found))
                    return found
        raise BusError(f"no device starts at {base:#x}; {self._present()}")

    def read(self, address: int, width: int) -> int:
        """Read ``width`` bytes at guest-physical ``address``.

        Raises:
            BusError: no device holds all of these bytes, or the device refuses this access.
        """
        bases, spans = self._table
        base, end, read, _ = spans[bisect_right(bases, address) - 1]
        if address + width <= end:
            return read(address - base, width)
        raise self._unanswered("read", address, width)

    def write(self, address: int, width: int, value: int) -> None:
        """Write the low ``width`` bytes of ``value`` at guest-physical ``address``.

        Raises:
            BusError: no device holds all of these bytes, or the device refuses this access.
        """
        bases, spans = self._table
        base, end, _, write = spans[bisect_right(bases, address) - 1]
        if address + width > end:
            raise self._unanswered("write", address, width)
        write(address - base, width, value)

    def _publish(self, attachments: tuple[Attachment, ...]) -> None:
        ordered = sorted(attachments, key=lambda attachment: attachment.base)
        spans = [_EMPTY, *((each.base, each.end, each.device.read, each.device.write) for each in ordered)]
        self._attachments = tuple(ordered)
        self._table = ([span[0] for span in spans], spans)

    def _unanswered(self, kind: str, address: int, width: int) -> BusError:
        return BusError(f"no device answers a {kind} of {width} bytes at {address:#x}; {self._present()}")

    def _present(self) -> str:
        if not self._attachments:
            return "nothing is attached to the bus"
        return "attached are " + ", ".join(
            f"{each.name} at {each.base:#x}..{each.end:#x}" for each in self._attachments
        )
