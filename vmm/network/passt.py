"""User-mode networking through passt, a program that needs no permissions (its manual: passt(1)).

passt translates between Ethernet frames on a socket and ordinary sockets of the host: the guest gets the host's
addresses by DHCP, NDP and DHCPv6, and connections to its gateway end at the host itself. The VMM starts one passt per
interface and hands it one end of a pair of sockets; it serves this one connection and leaves when that is closed, hence
also when the VMM is killed. Started as root, it becomes ``nobody``. It shuts itself into namespaces of its own, so a
container without user namespaces cannot have it; and before version 2024_11 it wants a default route, so a host without
any network cannot either.

passt trusts the connection, and so may we: it looks at no checksum of a TCP or UDP packet from the guest (its
checksum.c has functions to set one and none to verify it), takes segments as long as an IP packet can be, and
the checksums that it sends belong to data that the host's kernel has verified. So nobody sums up anything.

What it gets wrong about TCP, and what is done about that, is in :mod:`vmm.network.passt_tcp`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from vmm.config import NetworkConfig
from vmm.network.offload import CSUM, DATA_VALID, GUEST_CSUM, HEADER, HOST_ECN, HOST_TSO4, HOST_TSO6
from vmm.network.passt_tcp import ANSWER_BYTES, MAX_ANSWERS, TcpAttendant
from vmm.network.port import Frame, Inbox, NetworkError
from vmm.network.stream import LIKED_MTU, SEND_BUFFER, StreamPort

PROGRAM: Final = "passt"
FEATURES: Final = CSUM | GUEST_CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN

_NOISE: Final = re.compile("syslog|as root")
_START_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 2.0
_VERIFIED: Final = HEADER.pack(DATA_VALID, 0, 0, 0, 0, 0, 0)[:10]


class PasstPort(StreamPort):
    """The connection to a passt of its own.

    Args:
        connection: our end.
        process: the passt that has the other end.
        errors: descriptor of the file to which it writes what it has to say; both belong to the port from now on.
        mtu: bytes of the largest packet.
    """

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes], errors: int, mtu: int) -> None:
        super().__init__(connection, mtu, FEATURES, completes_checksums=False)
        self.process = process
        self._errors = errors
        self._attendant = TcpAttendant()
        # Behind what is read from passt there is room for frames that are made here.
        self._spare = len(self._inbox.buffer)
        self._inbox.buffer = memoryview(bytearray(self._spare + MAX_ANSWERS * (HEADER.size + ANSWER_BYTES)))

    def send(self, pair: int, frames: Sequence[Frame]) -> None:
        super().send(pair, [each for frame in frames for each in self._attendant.passed_on(frame)])

    def receive(self, inbox: Inbox) -> bool:
        received = super().receive(inbox)
        if received and self._attendant.answers:
            room = self._spare
            for number, (begin, end) in enumerate(inbox.frames):
                answer = self._attendant.replaced(inbox.buffer[begin + HEADER.size : end])
                if answer is not None:
                    inbox.frames[number] = room, room + HEADER.size + len(answer)
                    inbox.buffer[room + HEADER.size : room + HEADER.size + len(answer)] = answer
                    room += HEADER.size + ANSWER_BYTES
        return received

    def accept(self, features: int) -> None:
        # 5.1.6.4.1: no flags for a driver without GUEST_CSUM.
        self.header = _VERIFIED if features & GUEST_CSUM else bytes(10)

    def close(self) -> None:
        super().close()
        if self._errors >= 0:
            _end(self.process)
            os.close(self._errors)
            self._errors = -1


def start_passt(config: NetworkConfig) -> PasstPort:
    """Start passt, and return when it serves.

    Raises:
        NetworkError: passt is not installed, or ended with an error; a host port to forward is taken or not allowed.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise NetworkError(
            f"the program {PROGRAM} is not installed, which the network backend 'passt' starts; install the package"
            " 'passt', or choose the backend 'tap' or 'socket'"
        )
    check_forwards(config.forwards)
    mtu = config.mtu or LIKED_MTU
    with contextlib.ExitStack() as opened:
        ours, theirs = socket.socketpair()
        opened.enter_context(ours)
        errors = os.memfd_create("passt-errors")
        opened.callback(os.close, errors)
        with theirs, _pipe() as (ready, report):
            # What does not fit is dropped by passt, and costs TCP a retransmission.
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            arguments = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno()), "--mtu", str(mtu)]
            # It writes its process id when it is about to serve, the only sign of that which it gives.
            arguments += ["--pid", "/proc/self/fd/1", *forward_arguments(config.forwards)]
            try:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=report,
                    stderr=errors,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C at the terminal is for the VMM
                )
            except OSError as error:
                raise NetworkError(f"{program} cannot be started: {error.strerror or error}") from error
            opened.callback(_end, process)
            report.close()
            theirs.close()
            if not select.select([ready], [], [], _START_SECONDS)[0] or not ready.read(1):
                _end(process)
                said = _last_words(errors) or f"nothing, and ended with status {process.returncode}"
                raise NetworkError(f"passt, which serves the network, did not start; it said: {said}")
        opened.pop_all()
        return PasstPort(ours, process, errors, mtu)


def forward_arguments(forwards: Iterable[str]) -> list[str]:
    """``tcp 8080:80`` as passt's options."""
    arguments = []
    for forward in forwards:
        protocol, ports = forward.split()
        arguments += [f"--{protocol}-ports", ports]
    return arguments


def check_forwards(forwards: Iterable[str]) -> None:
    """Try the host ports, since passt is silent about one that it does not get.

    Raises:
        NetworkError: a port is taken, or not allowed.
    """
    for forward in forwards:
        protocol, ports = forward.split()
        stream = protocol == "tcp"
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as trial:
            # Of a TCP port only a listener is in the way, not a connection that has ended.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, stream)
            try:
                trial.bind(("", int(ports.split(":")[0])))
            except OSError as error:
                raise NetworkError(
                    f"the host port of the forward {forward!r} cannot be used: {error.strerror}; choose another one"
                ) from error


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    """The two ends of a pipe that a process under another user can open by name, too."""
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as reading, open(write, "wb", buffering=0) as writing:
        os.fchmod(write, 0o666)
        yield reading, writing


def _last_words(errors: int) -> str:
    """The last three things that passt said, without its complaints of having no system log and of being root."""
    text = os.pread(errors, 4096, max(os.fstat(errors).st_size - 4096, 0)).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    return "; ".join(lines[-3:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a passt whose connection is closed, and make sure."""
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
