"""Frames of the device manager, byte for byte."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.upcall import (
    FRAME_SIZE,
    ApicCpus,
    Cpus,
    Direction,
    Frame,
    FrameError,
    FrameType,
    LastCpu,
    Memory,
    Mmio,
)

REQUEST, REPLY = Direction.REQUEST, Direction.REPLY
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


def padded(text: str) -> bytes:
    """A frame that begins with these hexadecimal bytes."""
    return bytes.fromhex(text).ljust(1024, b"\0")


GOLDEN = {
    "connect": (Frame(FrameType.CONNECT, None, 0), padded("00014d44 00000000 00000000 00000000 00000000")),
    "add cpu": (Frame(FrameType.ADD_CPU, Cpus(3)), padded("00014d44 01000000 01000000 00000000 03")),
    "del cpu": (Frame(FrameType.DEL_CPU, Cpus(255)), padded("00014d44 01000000 02000000 00000000 ff")),
    "add cpu of a pc": (
        Frame(FrameType.ADD_CPU, ApicCpus(2, 0x14, bytes([5, 6]).ljust(256, b"\0"))),
        padded("00014d44 02010000 01000000 00000000 02 14 0506"),
    ),
    "a cpu came up": (
        Frame(FrameType.ADD_CPU, LastCpu(0x01020304), 0),
        padded("00014d44 04000000 01000000 00000000 00000000 04030201"),
    ),
    "no cpu came up": (
        Frame(FrameType.ADD_CPU, None, -errno.ENODEV),
        padded("00014d44 00000000 01000000 00000000 edffffff"),
    ),
    "add mmio": (
        Frame(FrameType.ADD_MMIO, Mmio(0x1_1000_2000, 0x1000, 7)),
        padded("00014d44 18000000 05000000 00000000 0020001001000000 0010000000000000 07000000 00000000"),
    ),
    "mmio is gone": (
        Frame(FrameType.DEL_MMIO, None, 0),
        padded("00014d44 00000000 06000000 00000000 00000000"),
    ),
    "add mem": (
        Frame(FrameType.ADD_MEM, Memory(1 << 32, 1 << 27)),
        padded("00014d44 10000000 03000000 00000000 0000000001000000 0000000800000000"),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_frame_is_these_bytes_and_back(name: str) -> None:
    frame, data = GOLDEN[name]
    assert frame.encode() == data
    assert Frame.decode(data, frame.direction) == frame


def bodies(direction: Direction) -> st.SearchStrategy[Frame]:
    """Frames of one direction that are right."""
    cpus: st.SearchStrategy[Any] = st.builds(Cpus, st.integers(0, 255)) | st.builds(
        ApicCpus, st.integers(0, 255), st.integers(0, 255), st.binary(min_size=256, max_size=256)
    )
    memory, mmio, last = st.builds(Memory, U64, U64), st.builds(Mmio, U64, U64, U32), st.builds(LastCpu, U32)
    cpu_types = st.sampled_from([FrameType.ADD_CPU, FrameType.DEL_CPU])
    if direction is REPLY:
        failed = st.builds(Frame, st.sampled_from(FrameType), st.none(), st.integers(-4095, -1))
        plain = st.sampled_from([each for each in FrameType if each not in (FrameType.ADD_CPU, FrameType.DEL_CPU)])
        return failed | st.builds(Frame, cpu_types, last, st.just(0)) | st.builds(Frame, plain, st.none(), st.just(0))
    return (
        st.builds(Frame, cpu_types, cpus)
        | st.builds(Frame, st.sampled_from([FrameType.ADD_MEM, FrameType.DEL_MEM]), memory)
        | st.builds(Frame, st.sampled_from([FrameType.ADD_MMIO, FrameType.DEL_MMIO]), mmio)
        | st.builds(Frame, st.sampled_from([FrameType.CONNECT, FrameType.ADD_PCI, FrameType.DEL_PCI]))
    )


@given(bodies(REQUEST) | bodies(REPLY))
def test_every_frame_comes_back(frame: Frame) -> None:
    data = frame.encode()
    assert len(data) == FRAME_SIZE
    assert Frame.decode(data, frame.direction) == frame


@given(bodies(REQUEST) | bodies(REPLY), st.integers(0, 1023), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_means_something_else(frame: Frame, place: int, value: int) -> None:
    data = bytearray(frame.encode())
    data[place] = value
    try:
        found = Frame.decode(data, frame.direction)
    except FrameError:
        assert place < 20
    else:
        assert Frame.decode(found.encode(), found.direction) == found


@given(st.binary(max_size=FRAME_SIZE), st.sampled_from(Direction), st.booleans())
def test_any_bytes_are_a_frame_or_refused(data: bytes, direction: Direction, magic: bool) -> None:
    whole = (bytes.fromhex("00014d44") + data if magic else data)[:FRAME_SIZE].ljust(FRAME_SIZE, b"\0")
    try:
        found = Frame.decode(whole, direction)
    except FrameError:
        return
    assert Frame.decode(found.encode(), direction) == found


def test_what_lies_behind_the_body_does_not_matter() -> None:
    data = bytearray(GOLDEN["a cpu came up"][1])
    data[24:] = b"\xff" * 1000
    assert Frame.decode(data, REPLY) == GOLDEN["a cpu came up"][0]


@pytest.mark.parametrize("size", [0, 16, 1023, 1025])
def test_a_frame_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FrameError, match=rf"a frame of {size} bytes must have 1024"):
        Frame.decode(bytes(size), REPLY)


@pytest.mark.parametrize(
    ("name", "place", "word", "message"),
    [
        ("connect", 0, 0x444D0101, "begins with magic 0x444d0101, it must be 0x444d0100"),
        ("connect", 8, 9, "has type 9, it must be one of 0 to 8"),
        ("connect", 12, 1, "has flags 0x1, they must be 0"),
        ("connect", 16, 1, "has result 1, it must be 0 or a negative errno"),
        ("connect", 16, 0x80000000, "has result -2147483648, it must be 0 or a negative errno"),
        ("connect", 4, 4, "CONNECT from the guest has msg_size 4, it must be 0"),
        ("a cpu came up", 4, 0, "ADD_CPU from the guest has msg_size 0, it must be 4"),
        ("a cpu came up", 4, 0xFFFFFFFF, "ADD_CPU from the guest has msg_size 4294967295, it must be 4"),
        ("mmio is gone", 4, 24, "DEL_MMIO from the guest has msg_size 24, it must be 0"),
        ("add cpu", 4, 2, "ADD_CPU to the guest has msg_size 2, it must be 1 or 258"),
        ("add mmio", 4, 20, "ADD_MMIO to the guest has msg_size 20, it must be 24"),
    ],
)
def test_a_wrong_word_is_named(name: str, place: int, word: int, message: str) -> None:
    frame, data = GOLDEN[name]
    wrong = bytearray(data)
    struct.pack_into("<I", wrong, place, word)
    with pytest.raises(FrameError, match=message):
        Frame.decode(wrong, frame.direction)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame(FrameType.ADD_CPU, Cpus(256)), "ADD_CPU count=256 does not fit its frame"),
        (Frame(FrameType.ADD_MMIO, Mmio(-1, 0, 0)), "ADD_MMIO base=-0x1 size=0x0 irq=0 does not fit its frame"),
        (Frame(FrameType.ADD_MMIO, Memory(0, 0)), "it must be Mmio"),
        (Frame(FrameType.ADD_MMIO, Mmio(0, 0, 0), 0), "it must be none"),
        (Frame(FrameType.ADD_CPU), "ADD_CPU to the guest has msg_size 0, it must be 1 or 258"),
        (Frame(FrameType.CONNECT, None, 1 << 31), "CONNECT → errno -2147483648 does not fit its frame"),
    ],
)
def test_a_frame_that_cannot_be_is_not_made(frame: Frame, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        frame.encode()


def test_frames_are_described_in_a_few_words() -> None:
    assert {name: frame.describe() for name, (frame, _) in GOLDEN.items() if "pc" not in name} == {
        "connect": "CONNECT → 0",
        "add cpu": "ADD_CPU count=3",
        "del cpu": "DEL_CPU count=255",
        "a cpu came up": "ADD_CPU → 0, index=16909060",
        "no cpu came up": "ADD_CPU → ENODEV",
        "add mmio": "ADD_MMIO base=0x110002000 size=0x1000 irq=7",
        "mmio is gone": "DEL_MMIO → 0",
        "add mem": "ADD_MEM base=0x100000000 size=0x8000000",
    }
