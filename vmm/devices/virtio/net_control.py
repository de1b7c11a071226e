"""What the driver asks of a network device by its control queue (virtio 1.2, 5.1.6.5), and the filter that results.

A request is a class, a command and the command's data; the answer is one byte::

    0 CTRL_RX        0 promiscuous, 1 all multicast, 2 all unicast, 3 no multicast, 4 no unicast, 5 no broadcast
    1 CTRL_MAC       0 tables: two lists of addresses, unicast and multicast; 1 the interface's own address
    3 CTRL_ANNOUNCE  0 acknowledge
    4 CTRL_MQ        0 pairs to use

What cannot be understood is answered with an error and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# Feature bits (5.1.3).
CTRL_VQ: Final = 1 << 17
CTRL_RX: Final = 1 << 18
CTRL_RX_EXTRA: Final = 1 << 20
GUEST_ANNOUNCE: Final = 1 << 21
MQ: Final = 1 << 22
CTRL_MAC_ADDR: Final = 1 << 23

OK: Final = 0
ERROR: Final = 1

MAX_REQUEST: Final = 4096  #: bytes; Linux sends some 600 addresses at most
MAX_ADDRESSES: Final = 256  #: in each table; with more, every address of that kind passes

_BROADCAST: Final = b"\xff" * 6
_RX_FLAGS: Final = ("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast", "no_broadcast")


@dataclass(slots=True)
class Filter:
    """Which frames the guest wants (5.1.6.5.1, 5.1.6.5.2); at first those for its own address, and all group addresses.

    Attributes:
        address: the interface's own.
        promiscuous: all frames.
        all_multicast, all_unicast: all of that kind.
        no_multicast, no_unicast, no_broadcast: none of that kind.
        unicast, multicast: more addresses.
    """

    address: bytes
    promiscuous: bool = False
    all_multicast: bool = True
    all_unicast: bool = False
    no_multicast: bool = False
    no_unicast: bool = False
    no_broadcast: bool = False
    unicast: frozenset[bytes] = field(default=frozenset())
    multicast: frozenset[bytes] = field(default=frozenset())

    def passes(self, destination: bytes) -> bool:
        """Whether a frame to that address is wanted."""
        if self.promiscuous:
            return True
        if destination == _BROADCAST:
            return not self.no_broadcast
        if destination[0] & 1:
            return not self.no_multicast and (self.all_multicast or destination in self.multicast)
        if self.no_unicast:
            return False
        return destination == self.address or self.all_unicast or destination in self.unicast

    def save(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Filter:
        """What :meth:`save` saw."""
        return cls(**saved)


@dataclass(frozen=True, slots=True)
class Control:
    """Carries out requests.

    Attributes:
        filter: what requests of class CTRL_RX and CTRL_MAC change.
        use_pairs: called with a number of pairs; False if there are not so many.
        announced: called when the guest has announced itself to the network.
    """

    filter: Filter
    use_pairs: Callable[[int], bool]
    announced: Callable[[], None]

    def carry_out(self, request: bytes) -> int:
        """OK, or ERROR for a request that is unknown or malformed."""
        data = request[2:]
        match request[:2]:
            case b"\x00\x00" | b"\x00\x01" | b"\x00\x02" | b"\x00\x03" | b"\x00\x04" | b"\x00\x05" as kind:
                done = len(data) == 1 and data[0] < 2
                if done:
                    setattr(self.filter, _RX_FLAGS[kind[1]], bool(data[0]))
            case b"\x01\x00":
                done = self._set_tables(data)
            case b"\x01\x01":
                done = len(data) == 6 and not data[0] & 1
                if done:
                    self.filter.address = data
            case b"\x03\x00":
                self.announced()
                done = True
            case b"\x04\x00":
                done = len(data) == 2 and self.use_pairs(int.from_bytes(data, "little"))
            case _:
                done = False
        return OK if done else ERROR

    def _set_tables(self, data: bytes) -> bool:
        tables = []
        for _ in range(2):
            # 5.1.6.5.2: u32 entries, and so many addresses.
            count = int.from_bytes(data[:4], "little")
            if len(data) < 4 or len(data) < 4 + 6 * count:
                return False
            tables.append([data[4 + 6 * n : 10 + 6 * n] for n in range(count)])
            data = data[4 + 6 * count :]
        unicast, multicast = tables
        if len(unicast) > MAX_ADDRESSES or len(multicast) > MAX_ADDRESSES:
            return False
        self.filter.unicast, self.filter.multicast = frozenset(unicast), frozenset(multicast)
        return True
