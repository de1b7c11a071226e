"""The QMP connection to a QEMU (docs/interop/qmp-spec.rst, QEMU 7.2), and what travels on it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from kata_lab.hypervisor.base import HypervisorError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

LONGEST_REQUEST: Final = 60.0  #: seconds that QEMU may take to answer; it is long only on a machine that is very busy
DRAIN_SECONDS: Final = 2.0  #: for the last words of a QEMU that has ended

Event = Mapping[str, Any]

# What the library complains of is raised, too.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


def require_library() -> None:
    """See whether this Python has the library.

    Raises:
        HypervisorError: it has not.
    """
    if importlib.util.find_spec("qemu") is None or importlib.util.find_spec("qemu.qmp") is None:
        raise HypervisorError("this Python has no qemu.qmp to talk to QEMU with: pip install kata-lab[bench]")


class QemuControl:
    """A connection.

    Args:
        client: that is connected.
    """

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, connection: socket.socket, event: Callable[[Event], object]) -> QemuControl:
        """Greet QEMU at the other end of a socket, which belongs to the connection from now on.

        Args:
            connection: the socket.
            event: called with every event, in their order.

        Raises:
            HypervisorError: it does not answer.
        """
        from qemu.qmp import EventListener, QMPClient, QMPError

        def note(message: Event) -> bool:
            event(message)
            return False  # the listener keeps none

        client = QMPClient("kata-lab")
        client.register_listener(EventListener(event_filter=note))
        try:
            async with asyncio.timeout(LONGEST_REQUEST):
                await client.connect(connection)
        except TimeoutError:
            raise HypervisorError(f"QEMU did not answer within {LONGEST_REQUEST:g} s") from None
        except QMPError as error:
            raise HypervisorError(f"QEMU does not answer: {error}") from error
        return cls(client)

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have QEMU carry out a command; what it returns.

        Raises:
            HypervisorError: it refuses, is gone, or does not answer.
        """
        from qemu.qmp import ExecuteError, QMPError

        try:
            async with asyncio.timeout(LONGEST_REQUEST):
                return await self._client.execute(name, dict(arguments or {}))
        except TimeoutError:
            raise HypervisorError(f"QEMU did not answer {name} within {LONGEST_REQUEST:g} s") from None
        except ExecuteError as error:
            raise HypervisorError(f"QEMU refuses {name}: {str(error).rstrip('.')}") from error
        except QMPError as error:
            raise HypervisorError(f"QEMU was asked for {name} and is gone") from error

    async def drained(self) -> None:
        """Of a QEMU that has ended: wait until all that it said was heard."""
        from qemu.qmp import Runstate

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()

    async def close(self) -> None:
        """End the connection. A second time is nothing."""
        from qemu.qmp import QMPError

        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
