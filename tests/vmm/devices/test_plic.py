"""The PLIC, driven through its registers as a kernel drives it."""

from __future__ import annotations

from functools import partial

import pytest

from vmm.devices.plic import PLIC_SIZE, Plic
from vmm.errors import BusError, ConfigError


class Machine:
    """A PLIC with the state of its outputs, and its registers by name."""

    def __init__(self, sources: int = 96, contexts: int = 2) -> None:
        self.raised = [False] * contexts
        self.changes: list[tuple[int, bool]] = []
        self.plic = Plic(sources, [partial(self._hear, context) for context in range(contexts)])

    def _hear(self, context: int, level: bool) -> None:
        self.raised[context] = level
        self.changes.append((context, level))

    def enable(self, source: int, context: int = 0, priority: int = 1) -> None:
        self.plic.write(4 * source, 4, priority)
        word = 0x2000 + 0x80 * context + 4 * (source // 32)
        self.plic.write(word, 4, self.plic.read(word, 4) | 1 << source % 32)

    def threshold(self, level: int, context: int = 0) -> None:
        self.plic.write(0x20_0000 + 0x1000 * context, 4, level)

    def pending(self, source: int) -> bool:
        return bool(self.plic.read(0x1000 + 4 * (source // 32), 4) >> source % 32 & 1)

    def claim(self, context: int = 0) -> int:
        return self.plic.read(0x20_0004 + 0x1000 * context, 4)

    def complete(self, source: int, context: int = 0) -> None:
        self.plic.write(0x20_0004 + 0x1000 * context, 4, source)


def test_interrupt_goes_from_wire_to_claim_to_completion() -> None:
    machine = Machine()
    machine.enable(10)

    machine.plic.set_input(10, True)
    assert machine.raised == [True, False]
    assert machine.pending(10)
    assert machine.claim() == 10
    assert machine.raised == [False, False]
    assert not machine.pending(10)

    machine.plic.set_input(10, False)
    machine.complete(10)
    assert machine.claim() == 0
    assert machine.changes == [(0, True), (0, False)]


def test_wire_that_stays_high_asks_again_after_completion() -> None:
    machine = Machine()
    machine.enable(3)
    machine.plic.set_input(3, True)
    machine.claim()
    assert machine.raised[0] is False

    machine.complete(3)

    assert machine.raised[0] is True
    assert machine.claim() == 3


def test_wire_in_service_does_not_ask_twice() -> None:
    machine = Machine()
    machine.enable(3)
    machine.plic.set_input(3, True)
    machine.claim()

    machine.plic.set_input(3, False)
    machine.plic.set_input(3, True)

    assert not machine.pending(3)
    assert machine.claim() == 0


def test_request_stays_when_the_wire_falls_before_the_claim() -> None:
    machine = Machine()
    machine.enable(3)

    machine.plic.set_input(3, True)
    machine.plic.set_input(3, False)

    assert machine.raised[0] is True
    assert machine.claim() == 3


def test_highest_priority_is_claimed_first_and_the_lowest_number_among_equals() -> None:
    machine = Machine()
    for source, priority in ((5, 2), (40, 7), (9, 2), (70, 7), (2, 1)):
        machine.enable(source, priority=priority)
        machine.plic.set_input(source, True)

    assert [machine.claim() for _ in range(6)] == [40, 70, 5, 9, 2, 0]


def test_priority_zero_never_interrupts() -> None:
    machine = Machine()
    machine.enable(5, priority=0)

    machine.plic.set_input(5, True)

    assert machine.raised[0] is False
    assert machine.pending(5)
    assert machine.claim() == 0


def test_threshold_masks_the_output_but_not_a_claim() -> None:
    machine = Machine()
    machine.enable(5, priority=3)
    machine.threshold(3)

    machine.plic.set_input(5, True)
    assert machine.raised[0] is False
    machine.threshold(2)
    assert machine.raised[0] is True
    machine.threshold(7)

    assert machine.raised[0] is False
    assert machine.claim() == 5


def test_enabling_a_pending_source_raises_the_output() -> None:
    machine = Machine()
    machine.plic.set_input(64, True)
    assert machine.raised[0] is False

    machine.enable(64)
    assert machine.raised[0] is True
    machine.plic.write(0x2000 + 8, 4, 0)

    assert machine.raised[0] is False


def test_two_harts_see_an_interrupt_and_one_claims_it() -> None:
    machine = Machine()
    machine.enable(7, context=0)
    machine.enable(7, context=1)

    machine.plic.set_input(7, True)
    assert machine.raised == [True, True]

    assert machine.claim(context=1) == 7
    assert machine.raised == [False, False]
    assert machine.claim(context=0) == 0


def test_completion_by_a_context_without_the_source_is_ignored() -> None:
    machine = Machine()
    machine.enable(7, context=0)
    machine.plic.set_input(7, True)
    machine.claim()

    machine.complete(7, context=1)
    machine.complete(8)
    machine.complete(0)
    machine.complete(0xFFFF_FFFF)
    assert machine.claim() == 0
    machine.complete(7)

    assert machine.claim() == 7


def test_source_zero_and_sources_beyond_the_last_cannot_be_enabled() -> None:
    machine = Machine(sources=40)

    for word in range(4):
        machine.plic.write(0x2000 + 4 * word, 4, 0xFFFF_FFFF)
    for source in range(128):
        machine.plic.write(4 * source, 4, 0xFFFF_FFFF)

    assert [machine.plic.read(0x2000 + 4 * word, 4) for word in range(4)] == [0xFFFF_FFFE, 0x1FF, 0, 0]
    assert [machine.plic.read(4 * source, 4) for source in (0, 1, 40, 41)] == [0, 7, 7, 0]


def test_context_that_does_not_exist_reads_zero() -> None:
    machine = Machine(contexts=1)

    machine.threshold(5, context=1)
    machine.plic.write(0x2080, 4, 0xFFFF_FFFF)

    assert machine.plic.read(0x20_1000, 4) == 0
    assert machine.plic.read(0x2080, 4) == 0
    assert machine.claim(context=300) == 0
    assert machine.plic.read(PLIC_SIZE - 4, 4) == 0


@pytest.mark.parametrize(("offset", "width"), [(4, 1), (4, 2), (4, 8), (5, 4), (0x20_0006, 4), (6, 2)])
def test_access_that_is_no_aligned_word_is_refused(offset: int, width: int) -> None:
    plic = Machine().plic

    with pytest.raises(BusError, match=f"read of {width} bytes at its offset {offset:#x}"):
        plic.read(offset, width)
    with pytest.raises(BusError, match="aligned words of 4 bytes"):
        plic.write(offset, width, 1)


@pytest.mark.parametrize("sources", [0, 128, -1])
def test_number_of_sources_is_checked(sources: int) -> None:
    with pytest.raises(ConfigError, match=f"{sources} interrupt sources must have 1 to 127"):
        Plic(sources, [lambda level: None])


def test_plic_without_contexts_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 contexts"):
        Plic(8, [])


@pytest.mark.parametrize("source", [0, 97, -1])
def test_input_that_does_not_exist_is_refused(source: int) -> None:
    with pytest.raises(ConfigError, match=f"source {source} does not exist; this PLIC has 1 to 96"):
        Machine().plic.set_input(source, True)
