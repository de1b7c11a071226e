"""The SBI, call by call: error codes, hart masks, hart states and the debug console's bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from vmm.memory import GuestMemory
from vmm.sbi import (
    BASE,
    DBCN,
    HSM,
    IPI,
    RFENCE,
    SRST,
    TABLE,
    TIME,
    Entry,
    HartState,
    HartStates,
    ResetReason,
    ResetType,
    Sbi,
    SbiError,
    SbiReturn,
    call_name,
)

RAM = 0x8000_0000
ALL = (1 << 64) - 1
HARTS = 4


@dataclass
class RecordedHart:
    timer: int | None = None
    software_interrupt: bool = False

    def set_timer(self, ticks: int) -> None:
        self.timer = ticks

    def set_interrupt(self, cause: int, level: bool) -> None:
        assert cause == 1
        self.software_interrupt = level


@dataclass
class RecordedEngine:
    harts: tuple[RecordedHart, ...] = field(default_factory=lambda: tuple(RecordedHart() for _ in range(HARTS)))
    fences: list[tuple[object, ...]] = field(default_factory=list)

    def remote_fence_i(self, hart_ids: Sequence[int], caller: int) -> None:
        self.fences.append(("fence.i", tuple(hart_ids), caller))

    def remote_sfence_vma(self, hart_ids: Sequence[int], start: int, size: int, caller: int) -> None:
        self.fences.append(("sfence.vma", tuple(hart_ids), start, size, caller))


@dataclass
class RecordedConsole:
    output: bytearray = field(default_factory=bytearray)
    input: bytearray = field(default_factory=bytearray)

    def write(self, data: bytes) -> None:
        self.output += data

    def read(self, limit: int) -> bytes:
        taken = bytes(self.input[:limit])
        del self.input[:limit]
        return taken


class Firmware:
    """An SBI over a machine that records what reaches it; harts 0 to 2 run, hart 3 is stopped."""

    def __init__(self, memory: GuestMemory) -> None:
        self.engine = RecordedEngine()
        self.console = RecordedConsole()
        self.memory = memory
        self.woken: list[int] = []
        self.resets: list[tuple[int, ResetType, ResetReason]] = []
        self.states = HartStates(HARTS, self.woken.append)
        for hart in (1, 2):
            self.states.start(hart, Entry(RAM, 0))
            self.states.take_up(hart)
        self.woken.clear()
        self.sbi = Sbi(self.engine, self.states, memory, self.console, lambda *arguments: self.resets.append(arguments))

    def call(self, extension: int, function: int, *arguments: int, hart: int = 0) -> SbiReturn | None:
        return self.sbi.call(hart, (*arguments, *[0] * (6 - len(arguments)), function, extension))

    def error(self, extension: int, function: int, *arguments: int, hart: int = 0) -> SbiError:
        answer = self.call(extension, function, *arguments, hart=hart)
        assert answer is not None
        return answer.error


@pytest.fixture
def firmware() -> Iterator[Firmware]:
    with GuestMemory(RAM, 0x10_0000) as memory:
        yield Firmware(memory)


def test_base_names_specification_2_0(firmware: Firmware) -> None:
    assert firmware.call(BASE, 0) == SbiReturn(SbiError.SUCCESS, 0x0200_0000)


@pytest.mark.parametrize("extension", sorted({row.extension for row in TABLE}))
def test_probe_finds_what_is_there(firmware: Firmware, extension: int) -> None:
    assert firmware.call(BASE, 3, extension) == SbiReturn(SbiError.SUCCESS, 1)


@pytest.mark.parametrize("extension", [0, 1, 4, 8, 0x504D55, 0x53555350, 0x1_0000_0010])
def test_legacy_and_absent_extensions_are_not_supported(firmware: Firmware, extension: int) -> None:
    assert firmware.call(BASE, 3, extension) == SbiReturn(SbiError.SUCCESS, 0)
    assert firmware.error(extension, 0) == SbiError.NOT_SUPPORTED


@pytest.mark.parametrize(("extension", "function"), [(BASE, 7), (TIME, 1), (RFENCE, 3), (RFENCE, 6), (HSM, 4)])
def test_an_unknown_function_is_not_supported(firmware: Firmware, extension: int, function: int) -> None:
    assert firmware.error(extension, function) == SbiError.NOT_SUPPORTED


def test_machine_ids_are_zero(firmware: Firmware) -> None:
    assert {firmware.call(BASE, function) for function in (4, 5, 6)} == {SbiReturn(SbiError.SUCCESS, 0)}


def test_set_timer_sets_the_callers_timer(firmware: Firmware) -> None:
    assert firmware.error(TIME, 0, 12345, hart=2) == SbiError.SUCCESS
    assert [hart.timer for hart in firmware.engine.harts] == [None, None, 12345, None]


@pytest.mark.parametrize(
    ("mask", "base", "reached"),
    [
        (0b101, 0, [0, 2]),
        (0b11, 1, [1, 2]),
        (0, ALL, [0, 1, 2]),
        (0, 0, []),
        (0, 999, []),
        (0b1000, 0, []),
    ],
)
def test_an_ipi_reaches_the_harts_of_the_mask_that_are_not_stopped(
    firmware: Firmware, mask: int, base: int, reached: list[int]
) -> None:
    assert firmware.error(IPI, 0, mask, base) == SbiError.SUCCESS
    assert [number for number, hart in enumerate(firmware.engine.harts) if hart.software_interrupt] == reached


@pytest.mark.parametrize(("mask", "base"), [(0b10000, 0), (0b1001, 1), (1, 4), (2, ALL - 1)])
def test_a_mask_that_names_a_missing_hart_reaches_none(firmware: Firmware, mask: int, base: int) -> None:
    assert firmware.error(IPI, 0, mask, base) == SbiError.INVALID_PARAM
    assert firmware.error(RFENCE, 0, mask, base) == SbiError.INVALID_PARAM
    assert firmware.error(RFENCE, 1, mask, base, 0, 0) == SbiError.INVALID_PARAM
    assert not any(hart.software_interrupt for hart in firmware.engine.harts)
    assert firmware.engine.fences == []


def test_fences_reach_the_engine_with_their_range(firmware: Firmware) -> None:
    firmware.call(RFENCE, 0, 0b11, 0, hart=1)
    firmware.call(RFENCE, 1, 0, ALL, 0x4000, 0x2000)
    firmware.call(RFENCE, 2, 0b100, 0, 0x4000, 0x1000, 0)

    assert firmware.engine.fences == [
        ("fence.i", (0, 1), 1),
        ("sfence.vma", (0, 1, 2), 0x4000, 0x2000, 0),
        ("sfence.vma", (2,), 0x4000, 0x1000, 0),
    ]


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, ALL), (0x1000, ALL)])
def test_a_fence_without_bounds_covers_the_whole_address_space(firmware: Firmware, start: int, size: int) -> None:
    firmware.call(RFENCE, 1, 1, 0, start, size)

    assert firmware.engine.fences == [("sfence.vma", (0,), 0, ALL, 0)]


def test_a_fence_that_wraps_is_an_invalid_address(firmware: Firmware) -> None:
    assert firmware.error(RFENCE, 1, 1, 0, ALL - 0xFFF, 0x2000) == SbiError.INVALID_ADDRESS


def test_a_hart_is_started_once(firmware: Firmware) -> None:
    assert firmware.error(HSM, 0, 3, RAM + 0x100, 77) == SbiError.SUCCESS
    assert firmware.woken == [3]
    assert firmware.call(HSM, 2, 3) == SbiReturn(SbiError.SUCCESS, HartState.START_PENDING)
    assert firmware.error(HSM, 0, 3, RAM, 0) == SbiError.ALREADY_AVAILABLE
    assert firmware.states.take_up(3) == Entry(RAM + 0x100, 77)
    assert firmware.call(HSM, 2, 3) == SbiReturn(SbiError.SUCCESS, HartState.STARTED)
    assert firmware.error(HSM, 0, 3, RAM, 0) == SbiError.ALREADY_AVAILABLE


@pytest.mark.parametrize(
    ("hart", "address", "error"),
    [
        (4, RAM, SbiError.INVALID_PARAM),
        (ALL, RAM, SbiError.INVALID_PARAM),
        (3, 0x1000_0000, SbiError.INVALID_ADDRESS),
        (3, RAM + 1, SbiError.INVALID_ADDRESS),
        (3, RAM + 0x10_0000, SbiError.INVALID_ADDRESS),
    ],
)
def test_a_start_that_cannot_work_is_refused(firmware: Firmware, hart: int, address: int, error: SbiError) -> None:
    assert firmware.error(HSM, 0, hart, address, 0) == error
    assert firmware.states[3] is HartState.STOPPED


def test_the_status_of_a_missing_hart_is_refused(firmware: Firmware) -> None:
    assert firmware.error(HSM, 2, HARTS) == SbiError.INVALID_PARAM


def test_a_hart_that_stops_itself_does_not_return(firmware: Firmware) -> None:
    assert firmware.call(HSM, 1, hart=2) is None
    assert firmware.states[2] is HartState.STOPPED


def test_suspend_comes_in_two_kinds(firmware: Firmware) -> None:
    assert firmware.call(HSM, 3, 0, hart=1) is None
    assert firmware.call(HSM, 3, 0x8000_0000, RAM + 8, 5, hart=2) is None
    assert firmware.states[1] is firmware.states[2] is HartState.SUSPENDED
    assert firmware.states.take_up(1) is None
    assert firmware.states.take_up(2) == Entry(RAM + 8, 5)


@pytest.mark.parametrize("kind", [1, 0x0FFF_FFFF, 0x1000_0000, 0x8000_0001, 0x9000_0000])
def test_a_reserved_or_foreign_suspend_type_is_refused(firmware: Firmware, kind: int) -> None:
    assert firmware.error(HSM, 3, kind, RAM) == SbiError.INVALID_PARAM


def test_a_non_retentive_suspend_needs_a_place_to_resume(firmware: Firmware) -> None:
    assert firmware.error(HSM, 3, 0x8000_0000, 0x1000) == SbiError.INVALID_ADDRESS
    assert firmware.states[0] is HartState.STARTED


def test_a_suspend_type_is_32_bits_wide(firmware: Firmware) -> None:
    assert firmware.call(HSM, 3, 0xFFFF_FFFF_8000_0000, RAM) is None


def test_a_reset_is_passed_on(firmware: Firmware) -> None:
    assert firmware.call(SRST, 0, 2, 1, hart=1) is None
    assert firmware.resets == [(1, ResetType.WARM_REBOOT, ResetReason.SYSTEM_FAILURE)]


@pytest.mark.parametrize(("kind", "reason"), [(3, 0), (0xF000_0000, 0), (0, 2), (0, 0xE000_0000)])
def test_a_reserved_or_foreign_reset_is_refused(firmware: Firmware, kind: int, reason: int) -> None:
    assert firmware.error(SRST, 0, kind, reason) == SbiError.INVALID_PARAM
    assert firmware.resets == []


def test_the_debug_console_prints_guest_memory(firmware: Firmware) -> None:
    firmware.memory.write(RAM + 0x10, b"hello")

    assert firmware.call(DBCN, 0, 5, RAM + 0x10, 0) == SbiReturn(SbiError.SUCCESS, 5)
    assert firmware.call(DBCN, 2, 0x121) == SbiReturn(SbiError.SUCCESS, 0)
    assert firmware.console.output == b"hello!"


def test_a_long_write_is_partial(firmware: Firmware) -> None:
    answer = firmware.call(DBCN, 0, 0x10_0000, RAM, 0)

    assert answer is not None
    assert 0 < answer.value == len(firmware.console.output) < 0x10_0000


def test_the_debug_console_reads_what_was_typed(firmware: Firmware) -> None:
    firmware.console.input += b"abc"

    assert firmware.call(DBCN, 1, 2, RAM, 0) == SbiReturn(SbiError.SUCCESS, 2)
    assert firmware.call(DBCN, 1, 8, RAM + 2, 0) == SbiReturn(SbiError.SUCCESS, 1)
    assert firmware.call(DBCN, 1, 8, RAM, 0) == SbiReturn(SbiError.SUCCESS, 0)
    assert firmware.memory.read(RAM, 3) == b"abc"


@pytest.mark.parametrize("function", [0, 1])
@pytest.mark.parametrize(
    ("length", "low", "high"),
    [(1, RAM - 1, 0), (2, RAM + 0xF_FFFF, 0), (ALL, RAM, 0), (1, RAM, 1), (1, 0x1000_0000, 0)],
)
def test_debug_console_ranges_outside_memory_are_refused(
    firmware: Firmware, function: int, length: int, low: int, high: int
) -> None:
    firmware.console.input += b"secret"

    assert firmware.error(DBCN, function, length, low, high) == SbiError.INVALID_PARAM
    assert firmware.console.output == b""
    assert firmware.console.input == b"secret"


def test_calls_have_names() -> None:
    assert call_name((0, 0, 0, 0, 0, 0, 0, TIME)) == "time.set_timer"
    assert call_name((0, 0, 0, 0, 0, 0, 9, 0x1234)) == "unknown.0x1234.9"


def test_a_hart_that_is_unplugged_cannot_be_started_until_it_is_plugged_in() -> None:
    woken: list[int] = []
    states = HartStates(3, woken.append, plugged=1)
    entry = Entry(RAM, 0)

    assert states.start(2, entry) is SbiError.INVALID_PARAM
    states.plug(2)
    assert states.start(2, entry) is SbiError.SUCCESS
    assert woken == [2]
    assert not states.unplug(2)
    states.take_up(2)
    assert not states.unplug(2)
    states.stop(2)
    assert states.unplug(2)
    assert states.start(2, entry) is SbiError.INVALID_PARAM
