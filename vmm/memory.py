"""Guest memory: RAM in anonymous mappings, reached through bounds-checked access.

The host gives a page to the guest only when the guest (or a device) first touches it: the mapping is private, anonymous
and reserves no swap; :meth:`GuestMemory.release` takes pages back. Memory that other processes shall work on
(vhost-user) is a file without a name instead (memfd_create(2)), which they map too. Writers on the host side tell
listeners what they wrote, since an engine that keeps decoded instructions must drop those of an overwritten page.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from types import TracebackType

from vmm.errors import ConfigError, GuestAddressError

PAGE_SIZE = 4096

WriteListener = Callable[[int, int], None]
Marks = bytearray | mmap.mmap  #: one byte for each page


class GuestMemory:
    """One contiguous range of guest-physical RAM.

    Args:
        base: guest-physical address of the first byte, a multiple of 4096.
        size: bytes, a multiple of 4096.
        shared: other processes can map it, through :attr:`descriptor`.

    Raises:
        ConfigError: a size or base that is not a positive multiple of the page size, or that the host cannot map.
    """

    def __init__(self, base: int, size: int, shared: bool = False) -> None:
        if base < 0 or base % PAGE_SIZE:
            raise ConfigError(f"guest memory base {base:#x} must be a multiple of {PAGE_SIZE}")
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError(f"guest memory size {size} must be a positive multiple of {PAGE_SIZE} bytes")
        self.base = base
        self.size = size
        #: Guest-physical address of the byte after the last.
        self.end = base + size
        #: The file that memory is in, None unless it is shared.
        self.descriptor: int | None = None
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            if shared:
                self.descriptor = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
                os.ftruncate(self.descriptor, size)
                flags = mmap.MAP_SHARED
            flags |= getattr(mmap, "MAP_NORESERVE", 0)
            self._map = mmap.mmap(-1 if self.descriptor is None else self.descriptor, size, flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            self._close_descriptor()
            raise ConfigError(
                f"the host cannot map {size >> 20} MiB of guest memory: {error}; give the machine less"
            ) from error
        self._view = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        self.host_address = ctypes.addressof(anchor)
        del anchor
        self._listeners: list[tuple[WriteListener, Marks | None]] = []
        self._release_listeners: list[WriteListener] = []

    def __contains__(self, address: int) -> bool:
        return self.base <= address < self.end

    def _offset(self, address: int, length: int) -> int:
        if length < 0 or not self.base <= address <= self.end - length:
            raise GuestAddressError(
                f"guest range {address:#x}+{length:#x} is not inside memory {self.base:#x}..{self.end:#x}"
            )
        return address - self.base

    def read(self, address: int, length: int) -> bytes:
        """Copy ``length`` bytes out of guest memory."""
        offset = self._offset(address, length)
        return bytes(self._view[offset : offset + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into guest memory and tell the listeners."""
        offset = self._offset(address, len(data))
        self._view[offset : offset + len(data)] = data
        self.notify(address, len(data))

    def view(self, address: int, length: int) -> memoryview:
        """The bytes themselves, writable. Who writes through a view calls :meth:`notify` afterwards."""
        offset = self._offset(address, length)
        return self._view[offset : offset + length]

    def views(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """As :meth:`view`, for several ranges of address and length."""
        whole, base, end = self._view, self.base, self.end
        found = [
            whole[address - base : address - base + length]
            for address, length in ranges
            if length >= 0 and base <= address <= end - length
        ]
        if len(found) < len(ranges):
            for address, length in ranges:
                self._offset(address, length)  # refuses one of them
        return found

    def read_int(self, address: int, width: int) -> int:
        """A little-endian unsigned integer of ``width`` bytes."""
        return int.from_bytes(self.read(address, width), "little")

    def write_int(self, address: int, width: int, value: int) -> None:
        """Store the low ``width`` bytes of ``value``, little-endian."""
        self.write(address, (value & ((1 << 8 * width) - 1)).to_bytes(width, "little"))

    def release(self, address: int, length: int) -> int:
        """Give the host's pages that lie wholly within ``length`` bytes at ``address`` back to it, and tell the
        listeners; from then on they read as zeroes and take no memory until they are written.

        Views of them stay valid. Returns how many bytes were given back; what is left of the range stays as it was.

        Raises:
            GuestAddressError: the range is not inside memory.
        """
        offset = self._offset(address, length)
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        released = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if released <= 0:
            return 0
        # What is in a file goes only with a hole in the file.
        self._map.madvise(mmap.MADV_DONTNEED if self.descriptor is None else mmap.MADV_REMOVE, start, released)
        for listener in self._release_listeners:
            listener(self.base + start, released)
        return released

    def subscribe(
        self, listener: WriteListener, released: WriteListener | None = None, marks: Marks | None = None
    ) -> None:
        """Call ``listener(address, length)`` after every write from the host side, and ``released`` (by default
        ``listener`` too) after pages were given back to the host.

        Args:
            marks: a byte for each page, which the listener keeps: writes to pages whose byte is 0 are not its concern.
        """
        self._listeners.append((listener, marks))
        self._release_listeners.append(released or listener)

    def unsubscribe(self, listener: WriteListener) -> None:
        """Undo :meth:`subscribe`."""
        index = [each for each, _ in self._listeners].index(listener)
        del self._listeners[index]
        del self._release_listeners[index]

    def notify(self, address: int, length: int) -> None:
        """Tell the listeners that ``length`` bytes at ``address`` were written through a view.

        Raises:
            GuestAddressError: they are not inside memory.
        """
        self._offset(address, length)
        self.notify_parts(((address, length),), length)

    def notify_parts(self, parts: Sequence[tuple[int, int]], length: int) -> None:
        """As :meth:`notify`, for the first ``length`` bytes of several parts of address and length, none of them empty.

        Raises:
            GuestAddressError: they are not inside memory.
        """
        # Devices come here with every buffer, which may have hundreds of parts: no call where all is well.
        base, end = self.base, self.end
        for listener, marks in self._listeners:
            left = length
            for address, size in parts:
                if left <= 0:
                    break
                if size > left:
                    size = left
                left -= size
                if not base <= address <= end - size:
                    self._offset(address, size)
                if marks is not None:
                    first, last = address - base >> 12, address - base + size - 1 >> 12
                    if not (marks[first] or (last > first and marks[first + 1 : last + 1].strip(b"\0"))):
                        continue
                listener(address, size)

    def close(self) -> None:
        """Give the mapping back. Views handed out must be released first."""
        if not self._map.closed:
            self._view.release()
            self._map.close()
            self._close_descriptor()

    def _close_descriptor(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
