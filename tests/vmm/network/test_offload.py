"""Checksums that a guest left to the device."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.network.offload import complete_checksum, ones_complement_sum


def plain_sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data + b' ') // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_sum_of_the_example_of_rfc_1071() -> None:
    assert ones_complement_sum(bytearray.fromhex("0001f203f4f5f6f7")) == 0xDDF2


@given(st.binary(max_size=200))
def test_sum_is_that_of_16_bit_words(data: bytes) -> None:
    assert ones_complement_sum(bytearray(data)) == plain_sum(data)


def test_sum_of_a_large_packet_carries() -> None:
    assert ones_complement_sum(bytearray(b"\xff" * 65_535)) == plain_sum(b"\xff" * 65_535)


@given(st.binary(min_size=20, max_size=100), st.integers(0, 0xFFFF))
def test_completed_packet_sums_up_to_all_ones(data: bytes, pseudo_header: int) -> None:
    frame = bytearray(14) + data
    frame[14 + 6 : 14 + 8] = pseudo_header.to_bytes(2, "big")

    complete_checksum(frame, 14, 6)

    assert plain_sum(pseudo_header.to_bytes(2, "big") + frame[14:]) in (0xFFFF, 0)


def test_checksum_outside_the_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="a checksum at 59 is not inside a frame of 60 bytes"):
        complete_checksum(bytearray(60), 50, 9)
