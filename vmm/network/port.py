"""What virtio-net asks of the host's side of an interface.

Frames from the host lie in an :class:`Inbox`, a buffer into which many are read at once, each with room before it for
virtio-net's header, so that header and frame are copied into the guest's buffers in one go. Frames of the guest are
views of its memory. A port takes all of them: what the host does not take now is copied and sent later (a stream must
not lose half a frame), or is dropped as a wire would.

Nothing here blocks, and no method is called by two threads at once: the device's lock sees to that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from vmm.errors import VmmError

ETHERNET_HEADER: Final = 14
MAX_IP_PACKET: Final = 65_535

Buffer = bytes | bytearray | memoryview


class NetworkError(VmmError):
    """The host does not have, or does not allow, what a network interface needs."""


@dataclass(slots=True)
class Frame:
    """A frame that the guest sends.

    Attributes:
        header: its virtio-net header, 12 bytes.
        parts: its bytes, in order.
        length: their number.
    """

    header: bytes
    parts: Sequence[Buffer]
    length: int


@dataclass(slots=True)
class Inbox:
    """Frames that came from the host and wait for the guest.

    Attributes:
        descriptor: the file descriptor that becomes readable when there are more, -1 if there will be none.
        buffer: where they lie.
        frames: begin of each one's header and end of its bytes, the next one last.
    """

    descriptor: int
    buffer: memoryview
    frames: list[tuple[int, int]] = field(default_factory=list)


class Port(ABC):
    """The host's side of one interface.

    Attributes:
        features: virtio-net's offload features that it can carry.
        mtu: bytes of the largest packet that the guest shall send, 0 for not saying.
        header: the first 10 bytes of the header of frames for the guest, or None if they come with one of their own.
        inboxes: one, or one for each pair of queues.
        up: whether the other side is there; while it is not, everything sent is dropped.
        pending: bytes that were taken from the guest and not yet by the host; until they are, nothing more may be sent.
        dropped: frames that the port could not pass on, in either direction.
    """

    features: int = 0
    mtu: int = 0
    header: bytes | None = None
    inboxes: tuple[Inbox, ...] = ()
    up: bool = True
    pending: bytes = b""
    dropped: int = 0

    @abstractmethod
    def receive(self, inbox: Inbox) -> bool:
        """Read what is there into an inbox whose frames were all taken; False if there was nothing."""

    @abstractmethod
    def send(self, pair: int, frames: Sequence[Frame]) -> None:
        """Send frames by the queues' pair of that number; nothing may be :attr:`pending`."""

    @abstractmethod
    def flush(self) -> None:
        """The host takes more: send what is pending."""

    @abstractmethod
    def accept(self, features: int) -> None:
        """The driver accepted these of :attr:`features`."""

    @abstractmethod
    def use_pairs(self, count: int) -> None:
        """The driver uses that many pairs of queues."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; a second call does nothing."""
