"""The guest's own crun as the referee: what the agent does itself is done once more by crun, in the same guest.

Commands go to the agent's debug console. crun knows containers that it did not make by the record that the agent
writes for it.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.kata_lab.agent.guest import AgentGuest

_READY = b"\x02"
_END = b"\x03"


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it wrote."""

    status: int
    output: str
    errors: str


class Console:
    """A shell in the guest.

    Args:
        guest: with its debug console on.
        connection: to the console.
    """

    def __init__(self, guest: AgentGuest, connection: socket.socket) -> None:
        self._guest = guest
        self._connection = connection
        self._numbers = itertools.count(1)
        self._said = b""
        # The terminal's echo has the octal digits, and never the character itself.
        connection.sendall(b"stty -echo -onlcr; PS1=; printf '\\002'\n")
        self._until(_READY)

    def _until(self, end: bytes) -> bytes:
        while end not in self._said:
            data = self._connection.recv(65536)
            assert data, f"the debug console has ended after {self._said!r}"
            self._said += data
        said, _, self._said = self._said.partition(end)
        return said

    def run(self, command: str) -> Outcome:
        """Run a shell command without a terminal, and with an input that is at its end."""
        place = f"/run/referee{next(self._numbers)}"
        script = (
            f"mkfifo {place}.p {place}.q; cat <{place}.p >{place}.o & cat <{place}.q >{place}.e & "
            f": | {{ {command}; echo $? >{place}.s; }} >{place}.p 2>{place}.q; wait; printf '\\002'; "
            f"for x in s o e; do cat {place}.$x; printf '\\003'; done; rm -f {place}.*\n"
        )
        self._connection.sendall(script.encode())
        self._until(_READY)
        status, output, errors = (self._until(_END) for _ in range(3))
        return Outcome(int(status), output.decode(), errors.decode())

    def write(self, path: str, value: Any) -> None:
        """A file with JSON."""
        data = json.dumps(value).encode()
        self._guest.call("CopyFile", path=path, file_size=len(data), file_mode=0o600, dir_mode=0o755, data=data)

    def exec(self, container_id: str, process: dict[str, Any]) -> Outcome:
        """``crun exec`` in a container."""
        path = f"/run/kata-containers/sandbox/process{next(self._numbers)}.json"
        self.write(path, process)
        return self.run(f"crun --root /run/crun exec --process {path} {container_id}")


@contextmanager
def console(guest: AgentGuest) -> Iterator[Console]:
    """A shell in the guest."""
    with guest.dial(1026) as connection:
        yield Console(guest, connection)
