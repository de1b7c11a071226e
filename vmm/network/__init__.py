"""The host's side of a network interface: passt's process, a tap interface, or a unix socket.

Each is a :class:`~vmm.network.port.Port`, which :func:`open_port` makes from a configuration; virtio-net uses it
without knowing which one it is.
"""

from __future__ import annotations

from vmm.config import NetworkConfig
from vmm.network.port import Port


def open_port(config: NetworkConfig) -> Port:
    """The port that ``config`` describes; its owner closes it.

    Raises:
        NetworkError: the host does not have what it needs.
    """
    if config.backend == "tap":
        from vmm.network.tap import TapPort

        return TapPort(config)
    if config.backend == "socket":
        from vmm.network.peer import PeerPort

        return PeerPort(config)
    from vmm.network.passt import start_passt

    return start_passt(config)
