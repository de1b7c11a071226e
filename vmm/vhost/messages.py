"""What travels between a VMM and a back end, as QEMU's docs/interop/vhost-user.rst lays it out (QEMU 7.2).

Every message is a header of three words, in the host's order, and a payload; descriptors go beside it (SCM_RIGHTS)::

    u32 request │ u32 flags: 1:0 version 1, 2 reply, 3 an acknowledgement is wanted │ u32 bytes of payload

Left out: logging of written memory, INFLIGHT, post-copy, memory slots, in-band notifications, and what belongs to
other kinds of devices. The back end sends no requests of its own.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from vmm.errors import VmmError

HEADER: Final = struct.Struct("=III")
VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3

NUMBER: Final = struct.Struct("=Q")
RING_STATE: Final = struct.Struct("=II")  #: ring, value
RING_ADDRESSES: Final = struct.Struct(
    "=IIQQQQ"
)  #: ring, flags, then in the VMM's addresses: table, used, available; log
TABLE_HEADER: Final = struct.Struct("=II")  #: regions, padding
REGION: Final = struct.Struct("=QQQQ")  #: guest-physical address, bytes, the VMM's address, offset in the descriptor

MAX_REGIONS: Final = 8
MAX_PAYLOAD: Final = TABLE_HEADER.size + MAX_REGIONS * REGION.size
MAX_DESCRIPTORS: Final = MAX_REGIONS

RING_MASK: Final = 0xFF  #: of the number that comes with a ring's descriptor
NO_DESCRIPTOR: Final = 1 << 8

PROTOCOL_FEATURES: Final = 1 << 30  #: VHOST_USER_F_PROTOCOL_FEATURES, beside the device's own features


class ProtocolFeature(enum.IntFlag):
    """What a front end and a back end may agree on beside the device's features."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    RESET_DEVICE = 1 << 13


KNOWN_PROTOCOL_FEATURES: Final = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.RESET_DEVICE


class RequestKind(enum.IntEnum):
    """The requests of a front end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    RESET_DEVICE = 34


class VhostError(VmmError):
    """The other side of a vhost-user connection broke a rule, or has gone."""


@dataclass(frozen=True, slots=True)
class Message:
    """A request or a reply. Who receives it owns its descriptors."""

    request: int
    flags: int
    payload: bytes
    descriptors: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What the specification calls the request."""
        try:
            return RequestKind(self.request).name
        except ValueError:
            return f"request {self.request}"

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The payload's words; VhostError if it has another length."""
        if len(self.payload) != layout.size:
            raise VhostError(f"{self.name} came with {len(self.payload)} bytes, it must have {layout.size}")
        return layout.unpack(self.payload)

    @property
    def number(self) -> int:
        """The payload as one number."""
        return self.unpack(NUMBER)[0]


@dataclass(frozen=True, slots=True)
class Region:
    """A part of guest memory.

    Attributes:
        address: guest-physical.
        size: bytes.
        user_address: where the VMM has it; addresses of rings are given so.
        offset: of its first byte in its descriptor's file.
    """

    address: int
    size: int
    user_address: int
    offset: int


def pack_table(regions: tuple[Region, ...]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    packed = (REGION.pack(each.address, each.size, each.user_address, each.offset) for each in regions)
    return TABLE_HEADER.pack(len(regions), 0) + b"".join(packed)


def unpack_table(message: Message) -> tuple[Region, ...]:
    """The regions of a SET_MEM_TABLE, each with one descriptor.

    Raises:
        VhostError: their number, or that of the descriptors, is not right.
    """
    payload = message.payload
    count = TABLE_HEADER.unpack_from(payload)[0] if len(payload) >= TABLE_HEADER.size else 0
    if not 1 <= count <= MAX_REGIONS or len(payload) < TABLE_HEADER.size + count * REGION.size:
        raise VhostError(
            f"a memory table of {len(payload)} bytes names {count} regions, it may have 1 to {MAX_REGIONS}"
        )
    if len(message.descriptors) != count:
        raise VhostError(f"a memory table of {count} regions came with {len(message.descriptors)} descriptors")
    return tuple(
        Region(*REGION.unpack_from(payload, TABLE_HEADER.size + number * REGION.size)) for number in range(count)
    )
