"""A guest whose device manager is a thread of the test: it does what a real one does, or what the test makes it do.

Its harts run a small program; what a kernel would do when the device manager asks for it (start and stop harts, bind a
driver) is done here, through the SBI's hart states and the bus.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.vmm.guest_program import HEADER_BYTES, TEXT, Program
from vmm import MicroVm, VmConfig
from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.device import VsockDevice
from vmm.sbi import HSM, Entry, HartState
from vmm.upcall import FRAME_SIZE, Cpus, Direction, Frame, FrameType, LastCpu, Mmio

SECONDARY = TEXT + HEADER_BYTES + 4
MAILBOX = 0x8070_0000  #: a word for each hart, by which it is told to stop
STATUS, CONFIG_SPACE = 0x070, 0x100


def program() -> Program:
    """Hart 0 counts; the others print C if they begin clean, else D, and wait for being told to stop."""
    made = Program().put("jal", rd="zero", imm="main").label("secondary")
    made.put("csrrs", rd="t3", csr="sscratch", rs1="zero").put("or", rd="t3", rs1="t3", rs2="s5")
    made.put("addi", rd="s1", rs1="a0", imm=0).put("sltu", rd="t3", rs1="zero", rs2="t3")
    made.put("addi", rd="a0", rs1="t3", imm=ord("C")).ecall_with_registers(0x4442434E, 2)
    made.put("addi", rd="s5", rs1="zero", imm=5).put("csrrw", rd="zero", csr="sscratch", rs1="s5")
    made.load_immediate("t0", MAILBOX).put("slli", rd="t1", rs1="s1", imm=3)
    made.put("add", rd="t0", rs1="t0", rs2="t1").label("poll").put("ld", rd="t2", rs1="t0", imm=0)
    made.put("beq", rs1="t2", rs2="zero", imm="poll").ecall(HSM, 1)
    return made.label("main").forever()


#: What a device manager does with a request: the bytes that it answers with, None to close the connection.
Behaviour = Callable[["FakeGuest", Frame], bytes | None]


class FakeVsock(VsockDevice):
    """A vsock device at whose port 219 the test listens."""

    def __init__(self, guest: FakeGuest) -> None:
        super().__init__(VsockConfig(name="agent"))
        self._guest = guest

    def dial(self, port: int) -> Future[socket.socket]:
        assert port == 219
        ours, theirs = socket.socketpair()
        self._guest.serve(theirs)
        found: Future[socket.socket] = Future()
        found.set_result(ours)
        return found


class FakeGuest:
    """A VM, its kernel and its device manager.

    Attributes:
        behaviours: what becomes of the next requests; all others are carried out.
        requests: those that came.
        busy: bases of slots whose device is in use.
    """

    def __init__(self, directory: Path, made: Program | None = None, **settings: Any) -> None:
        kernel = (made or program()).write(directory / "Image")
        config = {"kernel": kernel, "memory_mib": 8, "vcpus": 1, "max_vcpus": 4, **settings}
        self.behaviours: deque[Behaviour] = deque()
        self.requests: list[Frame] = []
        self.busy: set[int] = set()
        self.asked = threading.Event()
        self.released = threading.Event()
        self._serving = threading.Lock()  # one connection at a time, as the real one
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self.vm = MicroVm(VmConfig(**config), [FakeVsock(self)])

    def serve(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        self._threads.append(threading.Thread(target=self._live, args=(connection,), name="device-manager"))
        self._threads[-1].start()

    def close(self) -> None:
        self.released.set()
        self.vm.close()
        for each in self._sockets:
            each.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _live(self, connection: socket.socket) -> None:
        with self._serving, connection:
            try:
                if connection.recv(1) != b"d":
                    return
                connection.sendall(Frame(FrameType.CONNECT, None, 0).encode())
                while data := connection.recv(FRAME_SIZE, socket.MSG_WAITALL):
                    request = Frame.decode(data, Direction.REQUEST)
                    self.requests.append(request)
                    behaviour = self.behaviours.popleft() if self.behaviours else obey
                    self.asked.set()
                    answer = behaviour(self, request)
                    if answer is None:
                        return
                    connection.sendall(answer)
            except OSError:
                pass  # the VMM hung up, or the test is over

    # The kernel.

    @property
    def online(self) -> list[int]:
        states = self.vm.machine.states
        return [hart for hart in range(len(states)) if states[hart] is not HartState.STOPPED]

    def carry_out(self, request: Frame) -> Frame:
        """What a device manager does; its reply."""
        if isinstance(request.body, Cpus):
            return self._cpus(request.type, request.body.count)
        assert isinstance(request.body, Mmio)
        base = request.body.base
        if request.type is FrameType.ADD_MMIO:
            if not self.vm.machine.board.bus.read(base + 8, 4):
                return Frame(request.type, None, -errno.ENODEV)
            self.bind(base)
        elif base in self.busy:
            return Frame(request.type, None, -errno.EBUSY)
        else:
            self.vm.machine.board.bus.write(base + STATUS, 4, 0)
        return Frame(request.type, None, 0)

    def _cpus(self, kind: FrameType, count: int) -> Frame:
        states, memory = self.vm.machine.states, self.vm.machine.memory
        adding = kind is FrameType.ADD_CPU
        if adding:
            chosen = [hart for hart in range(len(states)) if hart not in self.online][:count]
        else:
            chosen = self.online[-count:]
        for hart in chosen:
            memory.write_int(MAILBOX + 8 * hart, 8, 0 if adding else 1)
            if adding and states.start(hart, Entry(SECONDARY, 0)):
                return Frame(kind, None, -errno.EINVAL)
        return Frame(kind, LastCpu(chosen[-1] if adding else chosen[0]), 0)

    def bind(self, base: int) -> None:
        """A driver that accepts VERSION_1 and uses no queue."""
        bus = self.vm.machine.board.bus
        for offset, value in ((STATUS, 1), (STATUS, 3), (0x024, 1), (0x020, 1), (STATUS, 11), (STATUS, 15)):
            bus.write(base + offset, 4, value)


def obey(guest: FakeGuest, request: Frame) -> bytes | None:
    return guest.carry_out(request).encode()


def refuse(number: int) -> Behaviour:
    return lambda guest, request: Frame(request.type, None, -number).encode()


def lie(guest: FakeGuest, request: Frame) -> bytes | None:
    """Say that it is done, and do nothing."""
    body = LastCpu(1) if isinstance(request.body, Cpus) else None
    return Frame(request.type, body, 0).encode()


def die(guest: FakeGuest, request: Frame) -> bytes | None:
    return None


def hang(guest: FakeGuest, request: Frame) -> bytes | None:
    guest.released.wait(60)
    return None


def answer(data: bytes) -> Behaviour:
    return lambda guest, request: data


def wrong_type(guest: FakeGuest, request: Frame) -> bytes | None:
    return Frame(FrameType.DEL_PCI, None, 0).encode()


def twice(guest: FakeGuest, request: Frame) -> bytes | None:
    return 2 * guest.carry_out(request).encode()


def after_doing_it(behaviour: Behaviour) -> Behaviour:
    """Carry the request out, and then misbehave."""

    def both(guest: FakeGuest, request: Frame) -> bytes | None:
        guest.carry_out(request)
        return behaviour(guest, request)

    return both


@contextmanager
def running(directory: Path, made: Program | None = None, **settings: Any) -> Iterator[FakeGuest]:
    """A guest that runs; ``made`` is its program, if it is another one."""
    guest = FakeGuest(directory, made, **settings)
    try:
        guest.vm.start()
        yield guest
    finally:
        guest.close()
