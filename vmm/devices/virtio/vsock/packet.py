"""What goes through the queues of a socket device (virtio 1.2, section 5.10.6).

A packet is a header and, with RW, its payload::

    u64 src_cid │ u64 dst_cid │ u32 src_port │ u32 dst_port │ u32 len │ u16 type │ u16 op │ u32 flags
    │ u32 buf_alloc │ u32 fwd_cnt                                                              44 bytes, little endian

Left out: SEQPACKET; a packet of that type is answered with RST, as one of an unknown type is.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<QQIIIHHIII")

HOST_CID: Final = 2
STREAM: Final = 1  #: the only type served

F_STREAM: Final = 1 << 0  #: VIRTIO_VSOCK_F_STREAM (5.10.3)

# Operations.
REQUEST: Final = 1
RESPONSE: Final = 2
RST: Final = 3
SHUTDOWN: Final = 4
RW: Final = 5
CREDIT_UPDATE: Final = 6
CREDIT_REQUEST: Final = 7

_NAMES: Final = dict(
    enumerate(("REQUEST", "RESPONSE", "RST", "SHUTDOWN", "RW", "CREDIT_UPDATE", "CREDIT_REQUEST"), REQUEST)
)

# Flags of SHUTDOWN: what the sender of the packet will not do any more (5.10.6.4 and 5.10.6.6).
NO_RECEIVE: Final = 1
NO_SEND: Final = 2
NEITHER: Final = NO_RECEIVE | NO_SEND

TRANSPORT_RESET: Final = (0).to_bytes(4, "little")  #: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7)

COUNTER: Final = 0xFFFF_FFFF  #: counters of bytes run freely over 32 bits


class Header(NamedTuple):
    """The header of a packet."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def pack(self) -> bytes:
        """The 44 bytes."""
        return HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Header:
        """From the first 44 bytes of ``data``."""
        return cls._make(HEADER.unpack_from(data))

    def describe(self) -> str:
        """In a few words, for the trace."""
        name = _NAMES.get(self.op, f"operation {self.op}")
        size = f" {self.length} bytes" if self.op == RW else ""
        return f"{name}{size} {self.src_cid}:{self.src_port} → {self.dst_cid}:{self.dst_port}"

    def reset(self) -> Header:
        """The RST that answers this packet."""
        return Header(self.dst_cid, self.src_cid, self.dst_port, self.src_port, 0, self.type, RST, 0, 0, 0)
