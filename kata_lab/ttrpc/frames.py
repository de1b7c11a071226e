"""ttrpc's frames (PROTOCOL.md, "Message Frame")::

u32 length of the data, big endian │ u32 stream │ u8 type │ u8 flags │ data
"""

from __future__ import annotations

import asyncio
import enum
import struct
from dataclasses import dataclass
from typing import Final

HEADER: Final = struct.Struct(">IIBB")
MAX_DATA: Final = 4 << 20  #: bytes of data in a frame; more is refused


class FrameType(enum.IntEnum):
    """What a frame is."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


REMOTE_CLOSED: Final = 1  #: the sender sends no more on this stream
REMOTE_OPEN: Final = 2  #: of a request: data follows
NO_DATA: Final = 4  #: the frame carries no message, not even an empty one


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; ``oversized`` if its data was longer than allowed, and thrown away."""

    stream: int
    type: int
    flags: int
    data: bytes
    oversized: bool = False


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None where the stream ends between frames.

    Raises:
        asyncio.IncompleteReadError: it ends inside one.
    """
    try:
        header = await reader.readexactly(HEADER.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    length, stream, kind, flags = HEADER.unpack(header)
    if length <= MAX_DATA:
        return Frame(stream, kind, flags, await reader.readexactly(length) if length else b"")
    while length:
        length -= len(await reader.readexactly(min(length, 1 << 16)))
    return Frame(stream, kind, flags, b"", oversized=True)


def pack_frame(stream: int, kind: FrameType, data: bytes, flags: int = 0) -> bytes:
    """The bytes of a frame; the caller has checked the length of ``data``."""
    return HEADER.pack(len(data), stream, kind, flags) + data
