"""The supervisor's firmware: RISC-V Supervisor Binary Interface, carried out by the VMM.

Follows the RISC-V SBI Specification 2.0 (ratified January 2024); chapter numbers are cited at each extension. A guest
kernel calls it with ``ecall`` from S-mode: extension id in a7, function id in a6, arguments in a0..a5; it gets an
error in a0 and a value in a1. Present: BASE, TIME, IPI, RFENCE, HSM, SRST, DBCN. Left out, and so answered
SBI_ERR_NOT_SUPPORTED: the legacy extensions (chapter 5), PMU, SUSP, CPPC, NACL, STA, and the hypervisor fences of
RFENCE, since the hart has no H extension.

Every function is one row of :data:`TABLE`; the trace takes its names from there.

A hart's state (chapter 9)::

            hart_start             thread takes it up
    STOPPED ──────────► START_PENDING ──────────► STARTED ◄────────────┐ an enabled interrupt
       ▲                                           │   │ hart_suspend  │ is pending
       └───────────────────────────────────────────┘   └────────► SUSPENDED
                          hart_stop

A hart that is not plugged in is STOPPED, and hart_start of it is answered SBI_ERR_INVALID_PARAM: 9.1 has that for a
hart which "cannot be started in supervisor mode", and no SBI_ERR_DENIED.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmm.errors import GuestAddressError
from vmm.memory import GuestMemory

XLEN_MASK = (1 << 64) - 1
ALL_HARTS = XLEN_MASK  #: hart_mask_base = -1: every hart, whatever the mask (3.1)
SSIP = 1  #: the supervisor software interrupt, cause 1

SPEC_VERSION = 2 << 24
IMPLEMENTATION_ID = 0x4B41544C  #: "KATL"; not among the ids that chapter 4 assigns
IMPLEMENTATION_VERSION = 1

BASE, TIME, IPI, RFENCE = 0x10, 0x54494D45, 0x735049, 0x52464E43
HSM, SRST, DBCN = 0x48534D, 0x53525354, 0x4442434E

DBCN_CHUNK = 4096
"""At most this many bytes move in one debug-console call; 12.1 lets a call move fewer than it was asked to."""


class SbiError(enum.IntEnum):
    """Error codes (chapter 3)."""

    SUCCESS = 0
    FAILED = -1
    NOT_SUPPORTED = -2
    INVALID_PARAM = -3
    DENIED = -4
    INVALID_ADDRESS = -5
    ALREADY_AVAILABLE = -6
    ALREADY_STARTED = -7
    ALREADY_STOPPED = -8
    NO_SHMEM = -9


class HartState(enum.IntEnum):
    """Hart states (chapter 9). The pending states that a thread passes in no time are never seen."""

    STARTED = 0
    STOPPED = 1
    START_PENDING = 2
    STOP_PENDING = 3
    SUSPENDED = 4
    SUSPEND_PENDING = 5
    RESUME_PENDING = 6


class ResetType(enum.IntEnum):
    """What the guest asks of system_reset (10.1)."""

    SHUTDOWN = 0
    COLD_REBOOT = 1
    WARM_REBOOT = 2


class ResetReason(enum.IntEnum):
    """Why it asks (10.1)."""

    NONE = 0
    SYSTEM_FAILURE = 1


@dataclass(frozen=True, slots=True)
class SbiReturn:
    """What goes into a0 and a1."""

    error: SbiError
    value: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a hart starts or resumes: S-mode, satp 0, interrupts off, a0 = its id, a1 = ``opaque``."""

    address: int
    opaque: int


class SbiHart(Protocol):
    """What the SBI needs of a hart."""

    def set_timer(self, ticks: int) -> None: ...

    def set_interrupt(self, cause: int, level: bool) -> None: ...


class SbiEngine(Protocol):
    """What the SBI needs of the engine: its harts, and fences on behalf of one of them, done when they return."""

    @property
    def harts(self) -> Sequence[SbiHart]: ...

    def remote_fence_i(self, hart_ids: Sequence[int], caller: int) -> None: ...

    def remote_sfence_vma(self, hart_ids: Sequence[int], start: int, size: int, caller: int) -> None: ...


class DebugConsole(Protocol):
    """What DBCN needs of a console: where its bytes go, and input that nobody has read yet, without waiting."""

    def write(self, data: bytes) -> None: ...

    def read(self, limit: int) -> bytes: ...


class HartStates:
    """The HSM state of every hart, shared by the threads that run them.

    Args:
        count: harts, with ids 0 to ``count`` - 1. Hart 0 starts, the others wait for hart_start.
        wake: called with a hart's id after it was told to start.
        plugged: how many of them are plugged in, those with the lowest ids; None for all.
    """

    def __init__(self, count: int, wake: Callable[[int], None], plugged: int | None = None) -> None:
        self._lock = threading.Lock()
        self._plugged = [plugged is None or hart < plugged for hart in range(count)]
        self._states = [HartState.STARTED] + [HartState.STOPPED] * (count - 1)
        self._entries: list[Entry | None] = [None] * count
        self._wake = wake

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, hart: int) -> HartState:
        return self._states[hart]

    @property
    def all_stopped(self) -> bool:
        """No hart is left that could start another."""
        with self._lock:
            return all(state is HartState.STOPPED for state in self._states)

    def alone(self, hart: int) -> bool:
        """Whether all other harts are stopped."""
        with self._lock:
            return all(state is HartState.STOPPED for other, state in enumerate(self._states) if other != hart)

    def plug(self, hart: int) -> None:
        """The guest may start this hart from now on."""
        with self._lock:
            self._plugged[hart] = True

    def unplug(self, hart: int) -> bool:
        """The guest may not start this hart any more; False, and nothing changes, if it is not STOPPED."""
        with self._lock:
            stopped = self._states[hart] is HartState.STOPPED
            if stopped:
                self._plugged[hart] = False
            return stopped

    def start(self, hart: int, entry: Entry) -> SbiError:
        """STOPPED → START_PENDING."""
        with self._lock:
            if not self._plugged[hart]:
                return SbiError.INVALID_PARAM
            if self._states[hart] is not HartState.STOPPED:
                return SbiError.ALREADY_AVAILABLE
            self._states[hart] = HartState.START_PENDING
            self._entries[hart] = entry
        self._wake(hart)
        return SbiError.SUCCESS

    def stop(self, hart: int) -> None:
        """STARTED → STOPPED."""
        with self._lock:
            self._states[hart] = HartState.STOPPED

    def suspend(self, hart: int, entry: Entry | None) -> None:
        """STARTED → SUSPENDED; with ``entry`` the hart loses its registers and resumes there."""
        with self._lock:
            self._states[hart] = HartState.SUSPENDED
            self._entries[hart] = entry

    def take_up(self, hart: int) -> Entry | None:
        """START_PENDING or SUSPENDED → STARTED; where to enter, None to go on after the call."""
        with self._lock:
            self._states[hart] = HartState.STARTED
            entry, self._entries[hart] = self._entries[hart], None
            return entry


class Sbi:
    """Carries out SBI calls for a machine.

    Args:
        engine: the harts and their fences.
        states: the harts' HSM states.
        memory: guest memory, in which addresses that a call names must lie.
        console: where DBCN writes and reads.
        reset: told of a valid system_reset: hart, reset type, reset reason.
    """

    def __init__(
        self,
        engine: SbiEngine,
        states: HartStates,
        memory: GuestMemory,
        console: DebugConsole,
        reset: Callable[[int, ResetType, ResetReason], None],
    ) -> None:
        self._engine = engine
        self._states = states
        self._memory = memory
        self._console = console
        self._reset = reset

    def call(self, hart: int, args: Sequence[int]) -> SbiReturn | None:
        """Carry out the call in ``args`` (a0..a7) of ``hart``.

        Returns:
            What to answer; None when the call does not return now: the hart stopped or suspended itself, or the
            system was reset. :class:`HartStates` says which.
        """
        row = _BY_ID.get((args[7], args[6]))
        if row is None:
            return SbiReturn(SbiError.NOT_SUPPORTED)
        return row.carry_out(self, hart, args)

    # Chapter 4: Base. Its functions never fail.

    def get_spec_version(self, hart: int, args: Sequence[int]) -> SbiReturn:
        return SbiReturn(SbiError.SUCCESS, SPEC_VERSION)

    def get_impl_id(self, hart: int, args: Sequence[int]) -> SbiReturn:
        return SbiReturn(SbiError.SUCCESS, IMPLEMENTATION_ID)

    def get_impl_version(self, hart: int, args: Sequence[int]) -> SbiReturn:
        return SbiReturn(SbiError.SUCCESS, IMPLEMENTATION_VERSION)

    def probe_extension(self, hart: int, args: Sequence[int]) -> SbiReturn:
        return SbiReturn(SbiError.SUCCESS, int(args[0] in _EXTENSIONS))

    def get_machine_id(self, hart: int, args: Sequence[int]) -> SbiReturn:
        """mvendorid, marchid and mimpid: 0 is legal for each, and says that there is no such number."""
        return SbiReturn(SbiError.SUCCESS, 0)

    # Chapter 6: Timer.

    def set_timer(self, hart: int, args: Sequence[int]) -> SbiReturn:
        self._engine.harts[hart].set_timer(args[0])
        return SbiReturn(SbiError.SUCCESS)

    # Chapter 7: Inter-processor interrupts.

    def send_ipi(self, hart: int, args: Sequence[int]) -> SbiReturn:
        targets = self._targets(args[0], args[1])
        if targets is None:
            return SbiReturn(SbiError.INVALID_PARAM)
        for target in targets:
            self._engine.harts[target].set_interrupt(SSIP, True)
        return SbiReturn(SbiError.SUCCESS)

    # Chapter 8: Remote fences.

    def remote_fence_i(self, hart: int, args: Sequence[int]) -> SbiReturn:
        targets = self._targets(args[0], args[1])
        if targets is None:
            return SbiReturn(SbiError.INVALID_PARAM)
        self._engine.remote_fence_i(targets, hart)
        return SbiReturn(SbiError.SUCCESS)

    def remote_sfence_vma(self, hart: int, args: Sequence[int]) -> SbiReturn:
        targets = self._targets(args[0], args[1])
        if targets is None:
            return SbiReturn(SbiError.INVALID_PARAM)
        start, size = args[2], args[3]
        # 8.1: start and size 0, or size -1, mean the whole address space.
        if (start == 0 and size == 0) or size == XLEN_MASK:
            start, size = 0, XLEN_MASK
        elif start + size > XLEN_MASK + 1:
            return SbiReturn(SbiError.INVALID_ADDRESS)
        self._engine.remote_sfence_vma(targets, start, size, hart)
        return SbiReturn(SbiError.SUCCESS)

    def remote_sfence_vma_asid(self, hart: int, args: Sequence[int]) -> SbiReturn:
        # The hart has no ASID bits, so every ASID is every address space: the fence without an ASID does it.
        if args[4] >> 16:
            return SbiReturn(SbiError.INVALID_PARAM)
        return self.remote_sfence_vma(hart, args)

    # Chapter 9: Hart state management.

    def hart_start(self, hart: int, args: Sequence[int]) -> SbiReturn:
        target, address, opaque = args[0], args[1], args[2]
        if target >= len(self._states):
            return SbiReturn(SbiError.INVALID_PARAM)
        if not self._executable(address):
            return SbiReturn(SbiError.INVALID_ADDRESS)
        return SbiReturn(self._states.start(target, Entry(address, opaque)))

    def hart_stop(self, hart: int, args: Sequence[int]) -> None:
        self._states.stop(hart)

    def hart_get_status(self, hart: int, args: Sequence[int]) -> SbiReturn:
        if args[0] >= len(self._states):
            return SbiReturn(SbiError.INVALID_PARAM)
        return SbiReturn(SbiError.SUCCESS, self._states[args[0]])

    def hart_suspend(self, hart: int, args: Sequence[int]) -> SbiReturn | None:
        # 9.4: 0 is the default retentive suspend, 0x80000000 the default non-retentive one; the rest is reserved or
        # specific to a platform, of which this one has none. The type is 32 bits wide.
        suspend_type = args[0] & 0xFFFF_FFFF
        if suspend_type == 0:
            self._states.suspend(hart, None)
            return None
        if suspend_type != 0x8000_0000:
            return SbiReturn(SbiError.INVALID_PARAM)
        if not self._executable(args[1]):
            return SbiReturn(SbiError.INVALID_ADDRESS)
        self._states.suspend(hart, Entry(args[1], args[2]))
        return None

    # Chapter 10: System reset.

    def system_reset(self, hart: int, args: Sequence[int]) -> SbiReturn | None:
        try:
            reset_type, reason = ResetType(args[0] & 0xFFFF_FFFF), ResetReason(args[1] & 0xFFFF_FFFF)
        except ValueError:
            return SbiReturn(SbiError.INVALID_PARAM)
        self._reset(hart, reset_type, reason)
        return None

    # Chapter 12: Debug console.

    def console_write(self, hart: int, args: Sequence[int]) -> SbiReturn:
        length, low, high = args[0], args[1], args[2]
        if not self._is_memory(low, high, length):
            return SbiReturn(SbiError.INVALID_PARAM)
        data = self._memory.read(low, min(length, DBCN_CHUNK)) if length else b""
        self._console.write(data)
        return SbiReturn(SbiError.SUCCESS, len(data))

    def console_read(self, hart: int, args: Sequence[int]) -> SbiReturn:
        length, low, high = args[0], args[1], args[2]
        if not self._is_memory(low, high, length):
            return SbiReturn(SbiError.INVALID_PARAM)
        data = self._console.read(min(length, DBCN_CHUNK)) if length else b""
        if data:
            self._memory.write(low, data)
        return SbiReturn(SbiError.SUCCESS, len(data))

    def console_write_byte(self, hart: int, args: Sequence[int]) -> SbiReturn:
        self._console.write(bytes([args[0] & 0xFF]))
        return SbiReturn(SbiError.SUCCESS)

    def _targets(self, mask: int, base: int) -> tuple[int, ...] | None:
        """The harts of a mask (3.1) that are not stopped, or None if it names one that does not exist."""
        count = len(self._states)
        named = list(range(count))
        if base != ALL_HARTS:
            named = [base + bit for bit in range(mask.bit_length()) if mask >> bit & 1]
            if named and named[-1] >= count:
                return None
        # A stopped hart begins with empty TLBs and no pending interrupt, so there is nothing to do for it.
        return tuple(each for each in named if self._states[each] is not HartState.STOPPED)

    def _executable(self, address: int) -> bool:
        return address in self._memory and address % 2 == 0

    def _is_memory(self, low: int, high: int, length: int) -> bool:
        # The upper half of the address is for machines whose physical addresses are wider than a register.
        if length == 0:
            return True
        try:
            self._memory.view(low, length).release()
        except GuestAddressError:
            return False
        return high == 0


Handler = Callable[[Sbi, int, Sequence[int]], SbiReturn | None]


@dataclass(frozen=True, slots=True)
class SbiFunction:
    """One function of the interface: how it is called, what the trace names it, what carries it out."""

    extension: int
    function: int
    name: str
    carry_out: Handler


TABLE: tuple[SbiFunction, ...] = (
    SbiFunction(BASE, 0, "base.get_spec_version", Sbi.get_spec_version),
    SbiFunction(BASE, 1, "base.get_impl_id", Sbi.get_impl_id),
    SbiFunction(BASE, 2, "base.get_impl_version", Sbi.get_impl_version),
    SbiFunction(BASE, 3, "base.probe_extension", Sbi.probe_extension),
    SbiFunction(BASE, 4, "base.get_mvendorid", Sbi.get_machine_id),
    SbiFunction(BASE, 5, "base.get_marchid", Sbi.get_machine_id),
    SbiFunction(BASE, 6, "base.get_mimpid", Sbi.get_machine_id),
    SbiFunction(TIME, 0, "time.set_timer", Sbi.set_timer),
    SbiFunction(IPI, 0, "ipi.send_ipi", Sbi.send_ipi),
    SbiFunction(RFENCE, 0, "rfence.remote_fence_i", Sbi.remote_fence_i),
    SbiFunction(RFENCE, 1, "rfence.remote_sfence_vma", Sbi.remote_sfence_vma),
    SbiFunction(RFENCE, 2, "rfence.remote_sfence_vma_asid", Sbi.remote_sfence_vma_asid),
    SbiFunction(HSM, 0, "hsm.hart_start", Sbi.hart_start),
    SbiFunction(HSM, 1, "hsm.hart_stop", Sbi.hart_stop),
    SbiFunction(HSM, 2, "hsm.hart_get_status", Sbi.hart_get_status),
    SbiFunction(HSM, 3, "hsm.hart_suspend", Sbi.hart_suspend),
    SbiFunction(SRST, 0, "srst.system_reset", Sbi.system_reset),
    SbiFunction(DBCN, 0, "dbcn.console_write", Sbi.console_write),
    SbiFunction(DBCN, 1, "dbcn.console_read", Sbi.console_read),
    SbiFunction(DBCN, 2, "dbcn.console_write_byte", Sbi.console_write_byte),
)

_BY_ID = {(row.extension, row.function): row for row in TABLE}
_EXTENSIONS = frozenset(row.extension for row in TABLE)


def call_name(args: Sequence[int]) -> str:
    """The name of the call in ``args`` (a0..a7), such as ``time.set_timer``; its numbers if it is not in the table."""
    row = _BY_ID.get((args[7], args[6]))
    return row.name if row is not None else f"unknown.{args[7]:#x}.{args[6]}"
