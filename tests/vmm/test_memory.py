"""Guest memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import Rv64Engine
from vmm.engine.rv64.instructions import BY_NAME
from vmm.errors import ConfigError, GuestAddressError
from vmm.memory import GuestMemory

BASE = 0x8000_0000
SIZE = 0x4000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(BASE, SIZE) as made:
        yield made


def test_what_is_written_is_read_back(memory: GuestMemory) -> None:
    memory.write(BASE + 5, b"hello")
    memory.write_int(BASE + 0x100, 8, 0x1122_3344_5566_7788)

    assert memory.read(BASE + 4, 7) == b"\0hello\0"
    assert memory.read_int(BASE + 0x100, 4) == 0x5566_7788


@pytest.mark.parametrize(
    ("address", "length"),
    [(BASE - 1, 1), (BASE + SIZE, 1), (BASE + SIZE - 1, 2), (0, SIZE), (BASE, SIZE + 1), (BASE, -1)],
)
def test_range_outside_memory_is_refused(memory: GuestMemory, address: int, length: int) -> None:
    with pytest.raises(GuestAddressError, match="is not inside memory 0x80000000"):
        memory.read(address, length)
    with pytest.raises(GuestAddressError):
        memory.view(address, length)


def test_notice_of_a_write_outside_memory_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(GuestAddressError):
        memory.notify(BASE, SIZE + 1)


def test_last_byte_belongs_to_memory(memory: GuestMemory) -> None:
    memory.write(BASE + SIZE - 1, b"z")

    assert memory.read(BASE + SIZE - 1, 1) == b"z"
    assert BASE + SIZE - 1 in memory
    assert BASE + SIZE not in memory


def test_listeners_hear_of_writes_until_they_leave(memory: GuestMemory) -> None:
    heard: list[tuple[int, int]] = []

    def listen(address: int, length: int) -> None:
        heard.append((address, length))

    memory.subscribe(listen)
    memory.write(BASE, b"abc")
    with memory.view(BASE + 8, 2) as view:
        view[:] = b"xy"
    memory.notify(BASE + 8, 2)
    memory.unsubscribe(listen)
    memory.write(BASE, b"d")

    assert heard == [(BASE, 3), (BASE + 8, 2)]
    assert memory.read(BASE + 8, 2) == b"xy"


def test_listener_with_marks_hears_of_marked_pages_alone(memory: GuestMemory) -> None:
    heard: list[tuple[int, int]] = []
    marks = bytearray(SIZE // 4096)
    marks[1] = 1
    memory.subscribe(lambda address, length: heard.append((address, length)), marks=marks)

    memory.write(BASE + 0xFFE, b"ab")
    memory.write(BASE + 0x2000, b"ab")
    assert heard == []
    memory.write(BASE + 0xFFF, b"ab")
    memory.write(BASE + 0x1FFF, b"abc")
    memory.notify(BASE, SIZE)

    assert heard == [(BASE + 0xFFF, 2), (BASE + 0x1FFF, 3), (BASE, SIZE)]


def test_listeners_hear_of_parts_as_far_as_they_were_written(memory: GuestMemory) -> None:
    heard: list[tuple[int, int]] = []
    memory.subscribe(lambda address, length: heard.append((address, length)))

    memory.notify_parts([(BASE + 8, 4), (BASE + 0x1000, 4), (BASE + 0x2000, 4)], 6)

    assert heard == [(BASE + 8, 4), (BASE + 0x1000, 2)]


@pytest.mark.parametrize("part", [(BASE - 1, 4), (BASE + SIZE - 3, 4)])
def test_parts_outside_memory_are_refused(memory: GuestMemory, part: tuple[int, int]) -> None:
    memory.subscribe(lambda address, length: None, marks=bytearray(SIZE // 4096))

    with pytest.raises(GuestAddressError):
        memory.notify_parts([(BASE, 4), part], 8)
    with pytest.raises(GuestAddressError):
        memory.views([(BASE, 4), part])


@pytest.mark.parametrize(("base", "size"), [(1, 4096), (-4096, 4096), (0, 0), (0, 4095), (0, -4096), (0, 1 << 70)])
def test_impossible_memory_is_refused(base: int, size: int) -> None:
    with pytest.raises(ConfigError):
        GuestMemory(base, size)


def test_closing_twice_is_no_error() -> None:
    memory = GuestMemory(BASE, SIZE)

    memory.close()
    memory.close()


def test_released_pages_read_as_zeroes_and_views_of_them_stay(memory: GuestMemory) -> None:
    memory.write(BASE, b"x" * SIZE)
    with memory.view(BASE, SIZE) as view:
        released = memory.release(BASE + 0x1000, 0x2000)

        assert released == 0x2000
        assert bytes(view) == b"x" * 0x1000 + bytes(0x2000) + b"x" * 0x1000
        view[0x1000] = 7
    assert memory.read(BASE + 0x1000, 1) == b"\7"


def test_release_keeps_what_is_not_a_whole_page(memory: GuestMemory) -> None:
    memory.write(BASE, b"x" * SIZE)

    assert memory.release(BASE + 1, 0x1FFE) == 0
    assert memory.release(BASE + 0x800, 0x2000) == 0x1000
    assert memory.read(BASE, SIZE) == b"x" * 0x1000 + bytes(0x1000) + b"x" * 0x2000


def test_release_outside_memory_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(GuestAddressError):
        memory.release(BASE + 0x3000, 0x2000)


def test_listeners_hear_of_released_pages(memory: GuestMemory) -> None:
    written: list[tuple[int, int]] = []
    released: list[tuple[int, int]] = []

    def hear_all(address: int, length: int) -> None:
        written.append((address, length))

    def hear_written(address: int, length: int) -> None:
        raise AssertionError("nothing was written")

    def hear_released(address: int, length: int) -> None:
        released.append((address, length))

    memory.subscribe(hear_written, hear_released)
    memory.subscribe(hear_all)
    memory.release(BASE + 0x10, 0x1FF0)
    memory.unsubscribe(hear_written)
    memory.release(BASE + 0x3000, 0x1000)

    assert released == [(BASE + 0x1000, 0x1000)]
    assert written == [(BASE + 0x1000, 0x1000), (BASE + 0x3000, 0x1000)]


def test_code_in_released_pages_is_not_executed_any_more(memory: GuestMemory) -> None:
    def add(value: int) -> bytes:
        return BY_NAME["addi"].encode(rd=6, rs1=6, imm=value).to_bytes(4, "little") * 8

    page = BASE + 0x2000
    with Rv64Engine(memory, clock="deterministic") as engine:
        hart = engine.harts[0]
        memory.write(page, add(1))
        hart.reset(page)
        assert hart.run(8).reason is ExitReason.BUDGET
        assert hart.x[6] == 8
        memory.release(page, 0x1000)
        memory.view(page, 32)[:] = add(3)  # nobody is told, so that only what was forgotten is decoded anew
        hart.reset(page)
        hart.run(8)

        assert hart.x[6] == 24
