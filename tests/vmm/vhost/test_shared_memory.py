"""Guest memory that other processes can map."""

from __future__ import annotations

import mmap
import os

import pytest

from tests.vmm.vhost.conftest import descriptors
from vmm.errors import ConfigError
from vmm.memory import PAGE_SIZE, GuestMemory

BASE = 0x8000_0000
SIZE = 16 * PAGE_SIZE


def test_memory_is_private_unless_it_is_asked_for() -> None:
    with GuestMemory(BASE, SIZE) as memory:
        assert memory.descriptor is None


def test_both_sides_see_what_the_other_writes() -> None:
    with GuestMemory(BASE, SIZE, shared=True) as memory:
        assert memory.descriptor is not None
        with mmap.mmap(memory.descriptor, SIZE) as other:
            memory.write(BASE + 100, b"from here")
            assert other[100:109] == b"from here"
            other[200:210] = b"from there"
            assert memory.read(BASE + 200, 10) == b"from there"


def test_pages_that_are_released_go_back_to_the_host_and_read_as_zeroes_on_both_sides() -> None:
    with GuestMemory(BASE, SIZE, shared=True) as memory:
        assert memory.descriptor is not None
        memory.write(BASE, b"x" * SIZE)
        before = os.fstat(memory.descriptor).st_blocks

        assert memory.release(BASE + PAGE_SIZE, 8 * PAGE_SIZE) == 8 * PAGE_SIZE

        assert os.fstat(memory.descriptor).st_blocks == before - 8 * PAGE_SIZE // 512
        assert memory.read(BASE, PAGE_SIZE + 1) == b"x" * PAGE_SIZE + b"\0"


def test_untouched_memory_takes_none_of_the_host() -> None:
    with GuestMemory(BASE, 1 << 36, shared=True) as memory:
        assert memory.descriptor is not None
        assert os.fstat(memory.descriptor).st_blocks == 0


def test_closing_gives_the_descriptor_back_and_so_does_a_size_that_cannot_be() -> None:
    before = descriptors()
    GuestMemory(BASE, SIZE, shared=True).close()
    with pytest.raises(ConfigError, match="give the machine less"):
        GuestMemory(BASE, 1 << 60, shared=True)

    assert descriptors() == before
