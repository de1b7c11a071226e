"""virtio-net's header and what it asks to be done to a frame (virtio 1.2, 5.1.6).

::

    0  u8 flags   1  u8 gso_type   2  u16 hdr_len   4  u16 gso_size   6  u16 csum_start   8  u16 csum_offset
    10 u16 num_buffers

A frame with NEEDS_CSUM holds, where its TCP or UDP checksum belongs, only the sum of the pseudo header. Somebody has to
add the rest before it goes to where checksums are verified: :func:`complete_checksum` (RFC 1071).
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

HEADER: Final = struct.Struct("<BBHHHHH")

# Feature bits (5.1.3): what the device does for the guest, and what the driver can take.
CSUM: Final = 1 << 0
GUEST_CSUM: Final = 1 << 1
GUEST_TSO4: Final = 1 << 7
GUEST_TSO6: Final = 1 << 8
GUEST_ECN: Final = 1 << 9
HOST_TSO4: Final = 1 << 11
HOST_TSO6: Final = 1 << 12
HOST_ECN: Final = 1 << 13

# Bits of flags.
NEEDS_CSUM: Final = 1
DATA_VALID: Final = 2

# gso_type, and the bit that may be set beside it.
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_ECN: Final = 0x80


def ones_complement_sum(data: bytearray | memoryview) -> int:
    """The 16-bit one's complement sum of ``data``, in network order, odd lengths filled up with a zero."""
    whole = len(data) & ~3
    # A sum of little-endian words is that of big-endian ones with its bytes swapped (RFC 1071, 2(B)).
    total = int(np.frombuffer(data, "<u4", whole // 4).sum(dtype=np.uint64)) if whole else 0
    total += int.from_bytes(data[whole:], "little")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFF) << 8 | total >> 8


def complete_checksum(frame: bytearray, start: int, offset: int) -> None:
    """Write the checksum of ``frame[start:]`` at ``start + offset``, where the sum of the pseudo header is now.

    Raises:
        ValueError: the checksum's place is not inside the frame.
    """
    place = start + offset
    if place + 2 > len(frame):
        raise ValueError(f"a checksum at {place} is not inside a frame of {len(frame)} bytes")
    checksum = ~ones_complement_sum(memoryview(frame)[start:]) & 0xFFFF
    # A UDP checksum of 0 means that there is none (RFC 768); all ones is the same number, also for TCP.
    frame[place : place + 2] = (checksum or 0xFFFF).to_bytes(2, "big")
