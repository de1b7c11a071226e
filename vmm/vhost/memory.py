"""Guest memory in a back end: the regions that a VMM shares, in one range of addresses.

The back end's queues work on one range, as in the VMM. Between two regions there is memory of the back end's own, which
nobody else sees: a guest that names such an address reads and writes nothing of anybody's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Final

from vmm.errors import VmmError
from vmm.memory import PAGE_SIZE, GuestMemory
from vmm.vhost.messages import Region, VhostError

MAX_SPAN: Final = 1 << 42  #: bytes from the first region to the end of the last

_MAP_FIXED: Final = 0x10
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class SharedMemory(GuestMemory):
    """What a memory table describes.

    Args:
        regions: of the table.
        descriptors: one for each; they may be closed afterwards.

    Raises:
        VhostError: regions that overlap, are not made of pages, or are larger than the files that they are in.
    """

    def __init__(self, regions: Sequence[Region], descriptors: Sequence[int]) -> None:
        ordered = sorted(zip(regions, descriptors, strict=True), key=lambda pair: pair[0].address)
        self._regions = [region for region, _ in ordered]
        end = 0
        for region, descriptor in ordered:
            if region.address < end or not region.size or (region.address | region.size | region.offset) % PAGE_SIZE:
                raise VhostError(f"{_described(region)} must be made of pages, and overlap no other")
            if region.offset + region.size > os.fstat(descriptor).st_size:
                raise VhostError(f"{_described(region)} is larger than the file that it is in")
            end = region.address + region.size
        base = self._regions[0].address
        if end - base > MAX_SPAN:
            raise VhostError(f"guest memory from {base:#x} to {end:#x} is more than {MAX_SPAN >> 40} TiB")
        try:
            super().__init__(base, end - base)
        except VmmError as error:
            raise VhostError(str(error)) from error
        try:
            for region, descriptor in ordered:
                self._put(region, descriptor)
        except BaseException:
            self.close()
            raise

    def _put(self, region: Region, descriptor: int) -> None:
        """Let the region take the place of the memory there; closing the whole gives it back too."""
        place = self.host_address + region.address - self.base
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        found = _LIBC.mmap(place, region.size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, region.offset)
        if found != place:
            raise VhostError(f"{_described(region)} cannot be mapped: {os.strerror(ctypes.get_errno())}")

    def from_user(self, address: int) -> int:
        """The guest-physical address of what the VMM has at ``address``; VhostError if it shares nothing there."""
        for each in self._regions:
            if each.user_address <= address < each.user_address + each.size:
                return each.address + address - each.user_address
        raise VhostError(f"the address {address:#x} is in none of the regions of memory that are shared")


def _described(region: Region) -> str:
    return f"the region of {region.size:#x} bytes at {region.address:#x}, from offset {region.offset:#x}"
