"""What a guest behind passt is told of its network: the host's own address and gateway, as passt's DHCP would tell it.

The host's side is read from ``/proc/net`` (proc(5)) and resolv.conf(5). IPv6 is left to router advertisements, which
passt sends.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class GuestNetwork:
    """An interface's addresses, as the agent's messages want them.

    Attributes:
        address: IPv4.
        prefix: its length in bits.
        gateway: of the default route; also the host itself, as passt maps it.
        nameservers: for resolv.conf.
        search: domains for resolv.conf.
    """

    address: str
    prefix: int
    gateway: str
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()

    def interface(self, name: str, hardware_address: str = "") -> dict[str, object]:
        """As the message ``types.Interface``."""
        address = {"family": 0, "address": self.address, "mask": str(self.prefix)}
        return {"device": name, "name": name, "hwAddr": hardware_address, "IPAddresses": [address]}

    def routes(self, name: str) -> list[dict[str, object]]:
        """As messages ``types.Route``: to the gateway, which may lie outside the prefix, and through it."""
        return [
            {"dest": f"{self.gateway}/32", "device": name},
            {"gateway": self.gateway, "device": name},
        ]

    @property
    def resolver(self) -> list[str]:
        """Lines of resolv.conf."""
        lines = [f"nameserver {each}" for each in self.nameservers]
        return [*lines, f"search {' '.join(self.search)}"] if self.search else lines


def network_behind_passt(
    routes: Path = Path("/proc/net/route"), resolver: Path = Path("/etc/resolv.conf")
) -> GuestNetwork | None:
    """What a guest behind passt is to use; None on a host without a default route."""
    found = _default_route(routes.read_text())
    if found is None:
        return None
    interface, gateway = found
    for each in psutil.net_if_addrs().get(interface, ()):
        if each.family == socket.AF_INET and each.netmask:
            prefix = ipaddress.IPv4Network(f"0.0.0.0/{each.netmask}").prefixlen
            servers, search = _resolver(resolver, gateway)
            return GuestNetwork(each.address, prefix, gateway, servers, search)
    return None


def _default_route(table: str) -> tuple[str, str] | None:
    """Interface and gateway of the first default route."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000" and int(fields[3], 16) & 2:
            return fields[0], socket.inet_ntoa(int(fields[2], 16).to_bytes(4, "little"))
    return None


def _resolver(path: Path, gateway: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    servers: list[str] = []
    search: tuple[str, ...] = ()
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return (), ()
    for line in lines:
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            try:
                address = ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            # A resolver of the host's own is reached through the gateway.
            server = gateway if address.is_loopback else str(address)
            if server not in servers:
                servers.append(server)
        elif words[:1] == ["search"]:
            search = tuple(words[1:])
    return tuple(servers), search
