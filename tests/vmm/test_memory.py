"""Guest memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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


@pytest.mark.parametrize(("base", "size"), [(1, 4096), (-4096, 4096), (0, 0), (0, 4095), (0, -4096), (0, 1 << 70)])
def test_impossible_memory_is_refused(base: int, size: int) -> None:
    with pytest.raises(ConfigError):
        GuestMemory(base, size)


def test_closing_twice_is_no_error() -> None:
    memory = GuestMemory(BASE, SIZE)

    memory.close()
    memory.close()
