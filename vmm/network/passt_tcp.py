"""Two moments of a TCP connection that passt gets wrong, and what is done about them on the way to it.

Seen with passt 2023_03_09, the one of Debian 12, on its own log of frames (``--pcap``), and in the same way with QEMU's
virtio-net at its socket. Versions that do it right are not disturbed.

* *A connection from the host that is silent at first.* passt answers the guest's SYN,ACK with data of the client, or
  not at all: the guest never has the third segment of the handshake (RFC 9293, 3.5), its server is not woken, and so
  nobody ever speaks in a protocol in which the server does first. The guest is given that ACK here, but not before
  passt has seen the SYN,ACK: one that reads it together with data of the guest counts wrong and loops for ever. So an
  ARP request goes to passt behind it, and the ACK takes the place of the reply.
* *A connection of the guest that the guest ends first.* After the guest's FIN passt does not take from its socket what
  the guest acknowledges: an answer that comes then is sent over and over again, or its end is never told and the guest
  waits for ever in FIN-WAIT-2. So the first FIN is taken off here, as a wire may lose it, and the guest sends it again
  after its retransmission time, 200 ms or more with Linux (RFC 6298): an answer that is on its way comes before it.

What is left: an answer that begins later than that after the guest's FIN. Only another passt can help there.
"""

from __future__ import annotations

import itertools
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from vmm.network.offload import HEADER, complete_checksum, ones_complement_sum
from vmm.network.port import ETHERNET_HEADER, Buffer, Frame

MAX_CONNECTIONS: Final = 4096  #: that the guest opened and whose end is watched, the latest ones
MAX_ANSWERS: Final = 64  #: that wait for passt, the latest ones
ANSWER_BYTES: Final = 74  #: of the longest frame that is made for the guest

_ARP_TYPE: Final = b"\x08\x06"
_ARP_REQUEST: Final = bytes.fromhex("0001080006040001")  # Ethernet, IPv4, 6 and 4 bytes, a request
_ARP_BYTES: Final = 42
_TCP: Final = 6
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_HEAD: Final = 14 + 60 + 20  # Ethernet, the longest header of IPv4 and what TCP always has; IPv6's are shorter
_SEGMENT: Final = struct.Struct(
    ">2H2I2B3H"
)  # ports, sequence, acknowledged, data offset, flags, window, checksum, urg.
_WINDOW: Final = 256  # what passt begins with, in its units; its next segment tells more


class _Segment(NamedTuple):
    """Where TCP is in a frame: how long the headers before it are, and its flags."""

    begin: int
    flags: int


class TcpAttendant:
    """Looks at what the guest sends to passt, and at what comes back while an answer of its own waits.

    Attributes:
        answers: frames that the guest is given in the place of ARP replies to these hardware addresses.
    """

    def __init__(self) -> None:
        self.answers: OrderedDict[bytes, bytes] = OrderedDict()
        self._marks = itertools.count()
        # Connections that the guest opened: the first sequence number of a FIN that was taken off, or -1.
        self._opened: OrderedDict[bytes, int] = OrderedDict()

    def passed_on(self, frame: Frame) -> Sequence[Frame]:
        """What passt is sent in the place of a frame of the guest."""
        head = frame.parts[0][:_HEAD]
        if len(head) < min(_HEAD, frame.length):
            head = b"".join([part[:_HEAD] for part in frame.parts])[:_HEAD]
        segment = _segment(head)
        if segment is None or not segment.flags & (_SYN | _FIN | _RST):
            return (frame,)
        begin, flags = segment
        if flags & (_SYN | _ACK) == _SYN | _ACK:
            return (frame, self._asking(_acknowledgment(bytes(head), begin)))
        if flags & _SYN:
            self._opened[_connection(head, begin)] = -1
            if len(self._opened) > MAX_CONNECTIONS:
                self._opened.popitem(last=False)
        elif flags & _RST:
            self._opened.pop(_connection(head, begin), None)
        else:
            return self._without_end(frame, head, begin)
        return (frame,)

    def replaced(self, frame: memoryview) -> bytes | None:
        """What the guest is given instead of a frame of passt; None if that is for the guest."""
        if len(frame) < _ARP_BYTES or bytes(frame[12:14]) != _ARP_TYPE:
            return None
        return self.answers.pop(bytes(frame[32:38]), None)

    def _asking(self, answer: bytes) -> Frame:
        """An ARP request (RFC 826) whose reply is exchanged for ``answer``."""
        mark = b"\x02" + next(self._marks).to_bytes(8, "big")[3:]
        self.answers[mark] = answer
        if len(self.answers) > MAX_ANSWERS:
            self.answers.popitem(last=False)
        guest = answer[:6]
        # For an address that is nobody's, from nobody's.
        request = b"\xff" * 6 + guest + _ARP_TYPE + _ARP_REQUEST + mark + bytes(10) + b"\0\0\0\1"
        return Frame(bytes(HEADER.size), [request], len(request))

    def _without_end(self, frame: Frame, head: Buffer, begin: int) -> Sequence[Frame]:
        connection = _connection(head, begin)
        before = self._opened.get(connection)
        if before is None:
            return (frame,)
        header = begin + (head[begin + 12] >> 4) * 4
        carried = _ip_end(head) - header
        end = (int.from_bytes(head[begin + 4 : begin + 8], "big") + carried) & 0xFFFF_FFFF
        if before == end:
            del self._opened[connection]
            return (frame,)
        self._opened[connection] = end
        if carried <= 0:
            return ()
        # Data goes on; nobody verifies its checksum.
        data = bytearray().join(frame.parts)
        data[begin + 13] &= ~_FIN
        return (Frame(frame.header, [data], frame.length),)


def _acknowledgment(head: bytes, begin: int) -> bytes:
    """The frame that acknowledges a SYN,ACK of the guest."""
    source, destination, sequence, acknowledged, *_ = _SEGMENT.unpack_from(head, begin)
    segment = bytearray(
        _SEGMENT.pack(destination, source, acknowledged, (sequence + 1) & 0xFFFF_FFFF, 5 << 4, _ACK, _WINDOW, 0, 0)
    )
    fourth = head[12] == 8
    at, width = (26, 4) if fourth else (22, 16)
    to, of = head[at : at + width], head[at + width : at + 2 * width]
    if fourth:
        header = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 1 << 14, 64, _TCP, 0) + of + to)
        complete_checksum(header, 0, 10)
    else:
        header = bytearray(struct.pack(">IHBB", 6 << 28, len(segment), _TCP, 64) + of + to)
    pseudo = bytearray(of + to + struct.pack(">II", len(segment), _TCP))
    segment[16:18] = ones_complement_sum(pseudo).to_bytes(2, "big")
    complete_checksum(segment, 0, 16)
    return head[6:12] + head[:6] + head[12:14] + bytes(header) + bytes(segment)


def _segment(head: Buffer) -> _Segment | None:
    """The TCP segment that begins in a frame, None if there is none."""
    length = len(head)
    if length < 54:
        return None
    kind = head[12] << 8 | head[13]
    if kind == 0x0800 and head[23] == _TCP:
        begin = ETHERNET_HEADER + (head[14] & 15) * 4
        # A fragment but the first has no header of TCP's.
        if begin < 34 or head[20] & 0x1F or head[21]:
            return None
    elif kind == 0x86DD and head[20] == _TCP:
        begin = ETHERNET_HEADER + 40
    else:
        return None
    return _Segment(begin, head[begin + 13]) if begin + 20 <= length else None


def _ip_end(head: Buffer) -> int:
    """Where a frame's IP packet ends, by its own header."""
    if head[12] == 8:
        return ETHERNET_HEADER + (head[16] << 8 | head[17])
    return ETHERNET_HEADER + 40 + (head[18] << 8 | head[19])


def _connection(head: Buffer, begin: int) -> bytes:
    """Addresses and ports of a frame of the guest."""
    at, width = (26, 8) if head[12] == 8 else (22, 32)
    return bytes(head[at : at + width]) + bytes(head[begin : begin + 4])
