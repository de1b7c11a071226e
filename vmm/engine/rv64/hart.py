"""The face of the RISC-V engine: a machine of harts over guest memory, each run from a thread of its own.

    with GuestMemory(0x8000_0000, 1 << 20) as memory, Rv64Engine(memory) as engine:
        hart = engine.harts[0]
        memory.write(0x8000_0000, program)
        hart.reset(pc=0x8000_0000)
        print(hart.run(budget=10), hart.x[10])

Time: with the ``real`` clock the guest's time is the host's monotonic clock, counted from the engine's making; with
``deterministic`` every retired instruction is one nanosecond and idling skips to the next timer deadline.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from types import TracebackType
from typing import ClassVar

from vmm.engine.base import Exit, ExitReason
from vmm.engine.rv64 import library
from vmm.engine.rv64.layout import (
    ACCESS_LOAD,
    CLOCK_DETERMINISTIC,
    CLOCK_REAL,
    PENDING_DONE,
    PENDING_FAULT,
    PENDING_NONE,
    REQUEST_FLUSH,
    REQUEST_RETURN,
    SHADOW_STRIDE,
    SSIP,
    STIP,
    STOP_OPERATION,
    Machine,
)
from vmm.engine.rv64.layout import Hart as At
from vmm.engine.rv64.registers import CSR_NUMBERS
from vmm.errors import ConfigError, EngineError
from vmm.memory import PAGE_SIZE, GuestMemory

MASK64 = (1 << 64) - 1
TIMEBASE_HZ = 10_000_000
MAX_HARTS = 32
UNLIMITED = (1 << 63) - 1

# Words of a hart's state that every exit touches.
_PENDING, _EXIT_KIND, _BUDGET_END, _LIMIT = At.PENDING >> 3, At.EXIT_KIND >> 3, At.BUDGET_END >> 3, At.LIMIT >> 3
_EXIT_ADDRESS, _EXIT_WIDTH, _EXIT_VALUE = At.EXIT_ADDRESS >> 3, At.EXIT_WIDTH >> 3, At.EXIT_VALUE >> 3
_LAST_MMIO = int(ExitReason.MMIO_WRITE)
_new_exit = tuple.__new__  # without the steps of a named tuple's own constructor
_REASONS = (ExitReason.INTERNAL_ERROR, *ExitReason)  # by number; nothing ends with 0
EXACT_SPAN = 1 << 14  #: so close to the end of a budget, instructions are executed one by one
NANOSECONDS = 1_000_000_000
_MAP_NORESERVE = 0x4000


class Zeroed:
    """Host memory that is all zeros until it is written, given back by ``close``.

    Attributes:
        map: the mapping itself.
        address: where it is.
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.map = mmap.mmap(-1, (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE, flags=flags)
        anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(anchor)
        del anchor

    def __getitem__(self, part: slice) -> bytes:
        return self.map[part]

    def __setitem__(self, part: slice, data: bytes) -> None:
        self.map[part] = data

    def clear(self, start: int, end: int, written: bool) -> None:
        """Make bytes ``start`` to ``end`` zeros again, which hold at least one whole page of the host: those take no
        memory any more. What is at the edges is left alone if it is known to be zeros, not ``written``."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        self.map.madvise(mmap.MADV_DONTNEED, first, last - first)
        if written:
            self.map[start:first] = bytes(first - start)
            self.map[last:end] = bytes(end - last)

    def close(self) -> None:
        """Unmap; nothing may use the address any more."""
        self.map.close()


def _raw_words(address: int, count: int) -> memoryview:
    """64-bit words at a host address, as signed integers, which is the quickest way to reach them."""
    return memoryview((ctypes.c_int64 * count).from_address(address)).cast("B").cast("q")


class Words:
    """64-bit words at a host address, as unsigned integers: registers and fields of a state."""

    def __init__(self, address: int, count: int) -> None:
        self._words = (ctypes.c_int64 * count).from_address(address)

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: int) -> int:
        return self._words[index] & MASK64

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value

    def __iter__(self) -> Iterator[int]:
        return (word & MASK64 for word in self._words)


class Gone:
    """What stands for registers and compiled functions once their memory has been given back."""

    def __getitem__(self, index: object) -> int:
        raise EngineError("the engine is closed; its harts can be looked at and run only before close()")

    def __setitem__(self, index: object, value: object) -> None:
        self[index]

    def __call__(self, *values: object) -> int:
        return self[values]


class IntegerRegisters(Words):
    """x0..x31; writes to x0 have no effect."""

    def __setitem__(self, index: int, value: int) -> None:
        if index % 32:
            super().__setitem__(index, value)


class CsrFile(MutableMapping[str, int]):
    """The CSRs of a hart by name, as S-mode sees them."""

    def __init__(self, hart: Hart) -> None:
        self._hart = hart

    def __getitem__(self, name: str) -> int:
        return self._hart._access_csr(CSR_NUMBERS[name])

    def __setitem__(self, name: str, value: int) -> None:
        self._hart._access_csr(CSR_NUMBERS[name], value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"the CSR {name} cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(CSR_NUMBERS)

    def __len__(self) -> int:
        return len(CSR_NUMBERS)


class Hart:
    """One RISC-V hart: registers, and ``run``. Made by :class:`Rv64Engine`.

    Methods that say so may be called from any thread; all others only while the hart is not running.
    """

    def __init__(self, engine: Rv64Engine, number: int, address: int) -> None:
        self.id = number
        self.memory = engine.memory
        self._engine = engine
        self._address = address
        self._state: Words | Gone = Words(address, At.SIZE // 8)
        self._raw: memoryview | Gone = _raw_words(address, At.SIZE // 8)
        self._enter_code = engine.bind_run(address)
        self._wake = threading.Event()
        self.x: Words | Gone = IntegerRegisters(address + At.X, 32)
        self.f: Words | Gone = Words(address + At.F, 32)
        self.csr = CsrFile(self)
        self._set(At.ID, number)
        self._set(At.MACHINE, engine.machine_address)
        self._set(At.STOP, STOP_OPERATION)
        self.reset(0)

    def _get(self, offset: int) -> int:
        return self._state[offset >> 3]

    def _set(self, offset: int, value: int) -> None:
        self._state[offset >> 3] = value

    @property
    def pc(self) -> int:
        """Address of the next instruction."""
        return self._get(At.PC)

    @pc.setter
    def pc(self, value: int) -> None:
        self._set(At.PC, value & ~1)
        self._set(At.PENDING, PENDING_NONE)

    @property
    def privilege(self) -> int:
        """0 in U-mode, 1 in S-mode."""
        return self._get(At.PRIVILEGE)

    @privilege.setter
    def privilege(self, value: int) -> None:
        if value not in (0, 1):
            raise ConfigError(f"privilege {value} is not one of this hart's: 0 is U-mode, 1 is S-mode")
        self._set(At.PRIVILEGE, value)
        self._engine.call_select_tlbs(self._address)

    @property
    def instructions(self) -> int:
        """Instructions retired since the engine was made."""
        return self._get(At.RETIRED)

    @property
    def traps(self) -> int:
        """Traps taken: exceptions and interrupts."""
        return self._get(At.TRAPS)

    def watch(self) -> None:
        """From now on, leave guest code with ENDLESS when it jumps to itself with interrupts off."""
        self._set(At.WATCHED, 1)

    def reset(self, pc: int, a0: int = 0, a1: int = 0) -> None:
        """The state in which SBI starts a hart: S-mode, translation and interrupts off, hart number and argument in a0
        and a1 (SBI specification 2.0, 9.1). Other registers are zero."""
        for index in range(33):
            self._set(At.X + 8 * index, 0)
        for index in range(32):
            self._set(At.F + 8 * index, 0)
        for offset in range(At.STATUS, At.LAST_TRAP, 8):
            if offset not in (
                At.SIP,
                At.WATCHED,
                At.SCRATCH_USED,
            ):  # a record in the scratch page must still be found and dropped
                self._set(offset, 0)
        self._set(At.STRADDLES, 0)
        self._set(At.STIMECMP, MASK64)
        self._set(At.LAST_TRAP, 1)
        self._set(At.SCOUNTEREN, 7)
        self._set(At.PRIVILEGE, 1)
        self._engine.call_post(self._address, At.SIP, 0, SSIP | STIP)
        self._engine.call_flush_tlb(self._address)
        self._engine.call_select_tlbs(self._address)
        self.pc = pc
        self.x[10] = a0
        self.x[11] = a1

    def run(self, budget: int | None = None) -> Exit:
        """Execute until something needs the VMM, or exactly ``budget`` instructions have been retired.

        The GIL is free meanwhile. A read exit wants ``complete_read``, an SBI exit ``complete_sbi``; a write is done
        unless ``bus_fault`` says otherwise.

        Raises:
            ConfigError: a negative budget.
        """
        # A device's driver comes here several times for each request, hence no more steps than needed.
        raw = self._raw
        if raw[_EXIT_KIND] and raw[_PENDING] == PENDING_NONE and raw[_EXIT_KIND] <= _LAST_MMIO:
            raw[_PENDING] = PENDING_DONE
        raw[_EXIT_KIND] = 0
        if budget is None:
            raw[_BUDGET_END] = UNLIMITED
            raw[_LIMIT] = 0
            reason = self._enter_code()
            if reason <= _LAST_MMIO:
                access = raw[_EXIT_ADDRESS] & MASK64, raw[_EXIT_WIDTH], raw[_EXIT_VALUE] & MASK64
                return _new_exit(Exit, (_REASONS[reason], *access, ()))
            return self._other_exit(reason)
        if budget < 0:
            raise ConfigError(f"a budget of {budget} instructions cannot be run; it must be 0 or more")
        end = self.instructions + budget
        if budget > EXACT_SPAN:
            found = self._enter(end - EXACT_SPAN)
            if found.reason is not ExitReason.BUDGET:
                return found
        self._set(At.STEPPING, 1)
        try:
            return self._enter(end)
        finally:
            self._set(At.STEPPING, 0)

    def step(self) -> Exit:
        """Execute one instruction."""
        return self.run(1)

    def _enter(self, end: int) -> Exit:
        raw = self._raw
        raw[_BUDGET_END] = end
        raw[_LIMIT] = 0
        reason = self._enter_code()
        if reason <= _LAST_MMIO:
            return Exit(_REASONS[reason], raw[_EXIT_ADDRESS] & MASK64, raw[_EXIT_WIDTH], raw[_EXIT_VALUE] & MASK64)
        return self._other_exit(reason)

    def _other_exit(self, reason: int) -> Exit:
        if reason == ExitReason.HALTED:
            # WFI is over when whatever ends it is looked at: an interrupt returns behind it.
            self._skip(4)
            return Exit(ExitReason.HALTED)
        if reason == ExitReason.SBI_CALL:
            return Exit(ExitReason.SBI_CALL, args=tuple(self.x[index] for index in range(10, 18)))
        return Exit(_REASONS[reason])

    def _skip(self, length: int) -> None:
        self._set(At.PC, self.pc + length)
        self._set(At.RETIRED, self.instructions + 1)

    def complete_read(self, value: int) -> None:
        """The answer to an MMIO_READ exit."""
        raw = self._raw
        raw[_EXIT_VALUE] = _signed(value & (1 << 8 * raw[_EXIT_WIDTH]) - 1)
        raw[_PENDING] = PENDING_DONE

    def bus_fault(self) -> None:
        """No device answers the access that led to the last exit: the guest gets a load or store access fault."""
        self._set(At.EXIT_VALUE, 7 if self._get(At.EXIT_KIND) == ExitReason.MMIO_WRITE else 5)
        self._set(At.PENDING, PENDING_FAULT)

    def complete_sbi(self, error: int, value: int) -> None:
        """The answer to an SBI_CALL exit: a0 and a1."""
        self.x[10] = error
        self.x[11] = value
        self._skip(4)

    def set_interrupt(self, cause: int, level: bool) -> None:
        """Raise or lower an interrupt: 1 software, 9 external (5, timer, follows stimecmp). From any thread."""
        bit = 1 << cause
        self._engine.call_post(self._address, At.SIP, bit if level else 0, 0 if level else bit)
        if level:
            self._wake.set()

    def interrupt(self) -> None:
        """Make ``run`` or ``wait`` return soon, with INTERRUPTED. From any thread."""
        self._engine.call_post(self._address, At.REQUESTS, REQUEST_RETURN, 0)
        self._wake.set()

    def set_timer(self, deadline: int) -> None:
        """Set stimecmp, in ticks of the timebase."""
        self._access_csr(CSR_NUMBERS["stimecmp"], deadline)

    @property
    def interrupt_waiting(self) -> bool:
        """Whether an enabled interrupt is pending, whatever sstatus.SIE says: what ends a WFI."""
        self._engine.call_update_timer(self._address, self.instructions)
        return bool(self._get(At.SIP) & self._get(At.SIE))

    def wait(self, timeout: float | None = None) -> bool:
        """Block until an enabled interrupt is pending, the timer is due or ``interrupt`` was called; False if
        ``timeout`` seconds passed first. With the deterministic clock, time jumps to the timer's deadline instead."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._wake.clear()
            if self._get(At.REQUESTS) & REQUEST_RETURN:
                self._engine.call_post(self._address, At.REQUESTS, 0, REQUEST_RETURN)
                return True
            if self.interrupt_waiting:
                return True
            pause = self._until_timer()
            if pause is not None and self._engine.deterministic:
                self._engine.skip(pause)
                continue
            left = None if pause is None else pause / NANOSECONDS
            if end is not None:
                rest = end - time.monotonic()
                if rest <= 0:
                    return False
                left = rest if left is None else min(left, rest)
            self._wake.wait(None if left is None else min(left, threading.TIMEOUT_MAX))

    def _until_timer(self) -> int | None:
        """Nanoseconds until an enabled timer is due; None if none is."""
        deadline = self._get(At.STIMECMP)
        if not self._get(At.SIE) & STIP or deadline >= 1 << 55:
            return None
        return max(0, deadline * self._engine.tick - self._engine.nanoseconds(self))

    def translate(self, address: int) -> int | None:
        """Physical address that a load from a virtual address would reach, or None. Sets A bits like a load."""
        saved = [self._get(offset) for offset in (At.FAULT, At.CAUSE, At.TVAL)]
        found = self._engine.call_translate(self._address, _signed(address), ACCESS_LOAD)
        for offset, value in zip((At.FAULT, At.CAUSE, At.TVAL), saved, strict=True):
            self._set(offset, value)
        return None if found == -1 else found

    def instruction_at(self, address: int) -> int | None:
        """The 2- or 4-byte instruction word at a virtual address, None where memory cannot be read."""
        word = 0
        for offset in (0, 2):
            physical = self.translate(address + offset)
            if physical is None or physical not in self.memory:
                return None
            word |= self.memory.read_int(physical, 2) << 8 * offset
            if word & 3 != 3:
                break
        return word

    def _access_csr(self, number: int, value: int | None = None) -> int:
        """Read, or write and return the old value, with S-mode's rights and FS on."""
        saved = {offset: self._get(offset) for offset in (At.PRIVILEGE, At.FS, At.SERIALISE)}
        self._set(At.PRIVILEGE, 1)
        if number <= 3:
            self._set(At.FS, saved[At.FS] or 1)
        old = self._engine.call_read_csr(self._address, number, self.instructions) & MASK64
        if value is not None:
            self._engine.call_write_csr(self._address, number, _signed(value), self.instructions)
        self._set(At.PRIVILEGE, saved[At.PRIVILEGE])
        self._set(At.SERIALISE, saved[At.SERIALISE])
        if number <= 3:
            self._set(At.FS, saved[At.FS])
        self._engine.call_select_tlbs(self._address)
        self._set(At.FAULT, 0)
        return old

    def forget(self) -> None:
        """Let go of the memory that holds this hart's state: from here on every use is an error."""
        gone = Gone()
        self._state = self._raw = self.x = self.f = gone
        self._enter_code = gone


def _signed(value: int) -> int:
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


class Rv64Engine:
    """Harts over guest memory.

    Args:
        memory: RAM. Host-side writes to it are noticed, so that code may be loaded or patched at any time.
        harts: 1..32.
        clock: ``real`` or ``deterministic`` (one hart only).
        timebase_hz: ticks of the time CSR per second; divides 10⁹.

    Raises:
        ConfigError: an impossible number of harts, clock or timebase.
        EngineError: the hart cannot be compiled or loaded.
    """

    def __init__(
        self, memory: GuestMemory, harts: int = 1, clock: str = "real", timebase_hz: int = TIMEBASE_HZ
    ) -> None:
        if not 1 <= harts <= MAX_HARTS:
            raise ConfigError(f"{harts} harts cannot be made; the number must be 1 to {MAX_HARTS}")
        if clock not in ("real", "deterministic"):
            raise ConfigError(f"there is no clock {clock!r}; choose 'real' or 'deterministic'")
        if clock == "deterministic" and harts > 1:
            raise ConfigError(f"the deterministic clock needs 1 hart, not {harts}: several harts run in no fixed order")
        if timebase_hz <= 0 or NANOSECONDS % timebase_hz:
            raise ConfigError(f"a timebase of {timebase_hz} Hz is not a whole number of nanoseconds; 10000000 is")
        self.memory = memory
        self.tick = NANOSECONDS // timebase_hz
        self.deterministic = clock == "deterministic"
        self._held_at: int | None = None  # guest time in nanoseconds while the real clock is held
        self._fence_lock = threading.Lock()
        self._bind(library.load())
        self._mappings: list[Zeroed] = []
        self.harts: tuple[Hart, ...] = ()
        try:
            self._map(harts)
        except OSError as error:
            self.close()
            raise EngineError(f"the host cannot map what {harts} harts need: {error}") from error
        self.harts = tuple(Hart(self, number, self._states + number * At.SIZE) for number in range(harts))
        memory.subscribe(self._memory_written, self._memory_released, self._code.map)

    @staticmethod
    def prepare(progress: library.ProgressCallback | None = None) -> None:
        """Compile the hart if no compiled one is in the cache, and load it."""
        library.load(progress)

    #: Entry points that harts call, and their numbers of arguments.
    CALLS: ClassVar[dict[str, int]] = {
        "call_run": 1,
        "call_post": 4,
        "call_translate": 3,
        "call_flush_tlb": 1,
        "call_select_tlbs": 1,
        "call_read_csr": 3,
        "call_write_csr": 4,
        "call_update_timer": 2,
        "call_overwrite_range": 3,
    }
    call_run: Callable[..., int]
    bind_run: Callable[[int], Callable[[], int]]
    call_post: Callable[..., int]
    call_translate: Callable[..., int]
    call_flush_tlb: Callable[..., int]
    call_select_tlbs: Callable[..., int]
    call_read_csr: Callable[..., int]
    call_write_csr: Callable[..., int]
    call_update_timer: Callable[..., int]
    call_overwrite_range: Callable[..., int]

    def _bind(self, code: library.Library) -> None:
        for name, arguments in self.CALLS.items():
            entry = name.removeprefix("call_")
            setattr(self, name, code.bind(entry, arguments, releases_gil=entry == "run"))
        self.bind_run = lambda address: code.bind_to("run", address)

    def _map(self, harts: int) -> None:
        pages = self.memory.size // PAGE_SIZE
        for size in (Machine.SIZE, harts * At.SIZE, pages * SHADOW_STRIDE, pages):
            self._mappings.append(Zeroed(size))
        machine, states, shadow, code = (mapping.address for mapping in self._mappings)
        self._shadow, self._code = self._mappings[2:]
        self.machine_address = machine
        self._states = states
        self._machine: Words | Gone = Words(machine, Machine.SIZE // 8)
        for offset, value in (
            (Machine.RAM_BASE, self.memory.base),
            (Machine.RAM_SIZE, self.memory.size),
            (Machine.RAM_HOST, self.memory.host_address),
            (Machine.SHADOW, shadow),
            (Machine.CODE, code),
            (Machine.HARTS, harts),
            (Machine.HART_STATES, states),
            (Machine.CLOCK, CLOCK_DETERMINISTIC if self.deterministic else CLOCK_REAL),
            (Machine.ORIGIN, 0 if self.deterministic else time.monotonic_ns()),
            (Machine.TICK, self.tick),
        ):
            self._machine[offset // 8] = value

    def _memory_written(self, address: int, length: int) -> None:
        """A device or a loader wrote to pages of which one is marked: it may have records."""
        self.call_overwrite_range(self.machine_address, address, length)

    def _memory_released(self, address: int, length: int) -> None:
        """Whole pages went back to the host: so does their shadow, which takes four times as much.

        As in ``overwrite_code``, the flag goes first: a hart that decodes meanwhile sets it again, behind its record.
        """
        first, end = ((place - self.memory.base) // PAGE_SIZE for place in (address, address + length))
        has_records = bool(self._code[first:end].strip(b"\0"))
        if has_records:
            self._code[first:end] = bytes(end - first)
        self._shadow.clear(first * SHADOW_STRIDE, end * SHADOW_STRIDE, has_records)

    def nanoseconds(self, hart: Hart | None = None) -> int:
        """Guest time."""
        if (held := self._held_at) is not None:
            return held
        origin = _signed(self._machine[Machine.ORIGIN // 8])
        if self.deterministic:
            return (hart or self.harts[0]).instructions - origin
        return time.monotonic_ns() - origin

    def time(self) -> int:
        """Guest time in ticks of the timebase."""
        return self.nanoseconds() // self.tick

    def hold_clock(self) -> None:
        """Guest time stands still from now on. No hart may run meanwhile: the real clock that code of the guest reads
        goes on. (The deterministic clock moves with the harts alone.)"""
        if not self.deterministic:
            self._held_at = self.nanoseconds()

    def release_clock(self) -> None:
        """Guest time goes on from where it was held."""
        if (held := self._held_at) is not None:
            self._machine[Machine.ORIGIN // 8] = time.monotonic_ns() - held
            self._held_at = None

    def skip(self, nanoseconds: int) -> None:
        """Put guest time forward."""
        self._machine[Machine.ORIGIN // 8] = _signed(self._machine[Machine.ORIGIN // 8]) - nanoseconds

    def remote_fence_i(self, hart_ids: Iterable[int], caller: int | None = None) -> None:
        """FENCE.I on other harts. Records of code that was stored to are dropped for all harts at once, so that what is
        left is to make the stores of harts in guest code known, as FENCE.I on the caller does."""
        self._fence(hart_ids, caller)

    def remote_sfence_vma(
        self, hart_ids: Iterable[int], start: int = 0, size: int = MASK64, caller: int | None = None
    ) -> None:
        """SFENCE.VMA on other harts; returns when all have done it. Every translation is dropped, whatever the
        range."""
        self._fence(hart_ids, caller)

    def _fence(self, hart_ids: Iterable[int], caller: int | None) -> None:
        waiting = []
        for number in hart_ids:
            hart = self.harts[number]
            if number == caller:
                self.call_flush_tlb(hart._address)
                continue
            with self._fence_lock:
                asked = hart._get(At.FLUSHES_ASKED) + 1
                hart._set(At.FLUSHES_ASKED, asked)
            self.call_post(hart._address, At.REQUESTS, REQUEST_FLUSH, 0)
            waiting.append((hart, asked))
        for hart, asked in waiting:
            # A hart outside guest code does it before it executes anything.
            while hart._get(At.INSIDE) and hart._get(At.FLUSHES_DONE) < asked:
                time.sleep(0)

    def close(self) -> None:
        """Give the harts' memory back. No hart may be running."""
        if not self._mappings:
            return
        if self.harts:
            self.memory.unsubscribe(self._memory_written)
        for hart in self.harts:
            hart.forget()
        gone = Gone()
        self._machine = gone
        for name in self.CALLS:
            setattr(self, name, gone)
        for mapping in self._mappings:
            mapping.close()
        self._mappings = []

    def __enter__(self) -> Rv64Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
