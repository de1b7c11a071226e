"""The loader: placement by Linux's rules, and every refusal in one sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.board.loader import BootEntry, load_boot_source
from vmm.board.riscv_virt import RAM_BASE, Chosen, RiscvVirtBoard
from vmm.console import Console
from vmm.errors import BootError
from vmm.memory import GuestMemory

MIB = 1 << 20
FDT = b"device tree"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(RAM_BASE, 16 * MIB) as made:
        yield made


def image(body: bytes = b"code", image_size: int = 0, text_offset: int = 2 * MIB, flags: int = 0, pe: int = 0) -> bytes:
    header = struct.pack(
        "<IIQQQIIQ8sII", 0, 0, text_offset, image_size, flags, 2, 0, 0, b"RISCV\0\0\0", 0x0543_5352, pe
    )
    return header + body


def image_with_section(end: int) -> bytes:
    """An Image that is also a PE file with one section, whose data ends at ``end``."""
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x5064, 1, 0, 0, 0, 0, 0)
    section = b".text\0\0\0" + struct.pack("<IIIIIIHHI", 0, 0, 0x100, end - 0x100, 0, 0, 0, 0, 0)
    return image(coff + section, pe=64).ljust(0x100, b"\0")


def elf(
    segments: list[tuple[int, int, bytes, int]],
    entry: int,
    machine: int = 243,
    elf_class: int = 2,
    data: int = 1,
    kind: int = 1,
) -> bytes:
    """An ELF file of (virtual, physical, content, size in memory) segments."""
    at = 64 + 56 * len(segments)
    headers, contents = b"", b""
    for virtual, physical, content, size in segments:
        headers += struct.pack("<IIQQQQQQ", kind, 7, at + len(contents), virtual, physical, len(content), size, 4096)
        contents += content
    ident = b"\x7fELF" + bytes([elf_class, data, 1]) + bytes(9)
    fields = (ident, 2, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return struct.pack("<16sHHIQQQIHHHHHH", *fields) + headers + contents


Load = Callable[..., BootEntry]


@pytest.fixture
def load(memory: GuestMemory, tmp_path: Path) -> Load:
    """Loads a kernel, and perhaps an initial RAM disk, from their bytes."""

    def load_bytes(kernel: bytes, initrd: bytes | None = None, fdt: bytes = FDT) -> BootEntry:
        kernel_path, initrd_path = tmp_path / "kernel", tmp_path / "initrd"
        kernel_path.write_bytes(kernel)
        if initrd is not None:
            initrd_path.write_bytes(initrd)
        return load_boot_source(memory, kernel_path, None if initrd is None else initrd_path, lambda _: fdt)

    return load_bytes


def test_image_is_placed_at_its_text_offset(memory: GuestMemory, load: Load) -> None:
    kernel = image(b"\x13\x00\x00\x00" * 1000, image_size=3 * MIB)

    entry = load(kernel)

    assert entry.pc == RAM_BASE + 2 * MIB
    assert entry.kernel == (entry.pc, entry.pc + 3 * MIB)
    assert memory.read(entry.pc, len(kernel)) == kernel
    assert entry.initrd is None


def test_initrd_and_fdt_follow_what_linux_reserves_for_itself(memory: GuestMemory, load: Load) -> None:
    entry = load(image(image_size=MIB + 1), b"initrd" * 1000)

    assert entry.initrd == (RAM_BASE + 4 * MIB, RAM_BASE + 4 * MIB + 6000)
    assert entry.fdt_address == RAM_BASE + 4 * MIB + 2 * 4096
    assert entry.fdt_size == len(FDT)
    assert memory.read(entry.initrd[0], 6000) == b"initrd" * 1000
    assert memory.read(entry.fdt_address, len(FDT)) == FDT


def test_device_tree_is_told_where_the_initrd_is(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(image())
    (tmp_path / "initrd").write_bytes(b"x" * 10)
    told: list[tuple[int, int] | None] = []

    def build(initrd: tuple[int, int] | None) -> bytes:
        told.append(initrd)
        return FDT

    entry = load_boot_source(memory, tmp_path / "kernel", str(tmp_path / "initrd"), build)

    assert told == [entry.initrd]
    assert entry.initrd is not None
    assert entry.initrd[1] - entry.initrd[0] == 10


def test_file_longer_than_its_image_size_is_loaded_whole(memory: GuestMemory, load: Load) -> None:
    kernel = image(b"x" * 10_000, image_size=100)

    entry = load(kernel, b"initrd")

    assert entry.kernel[1] - entry.kernel[0] == len(kernel)
    assert memory.read(entry.pc, len(kernel)) == kernel


def test_listeners_of_memory_hear_of_everything_loaded(memory: GuestMemory, load: Load) -> None:
    heard: list[tuple[int, int]] = []
    memory.subscribe(lambda address, length: heard.append((address, length)))
    kernel = image()

    entry = load(kernel, b"initrd")

    assert entry.initrd is not None
    assert heard == [(entry.pc, len(kernel)), (entry.initrd[0], 6), (entry.fdt_address, len(FDT))]


def test_loading_keeps_no_view_of_memory(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(image())
    (tmp_path / "cut").write_bytes(elf([(RAM_BASE, RAM_BASE, b"x" * 100, 100)], RAM_BASE)[:-1])
    with GuestMemory(RAM_BASE, 16 * MIB) as memory:
        load_boot_source(memory, tmp_path / "kernel", None, lambda _: FDT)
        with pytest.raises(BootError):
            load_boot_source(memory, tmp_path / "cut", None, lambda _: FDT)


def test_elf_goes_where_its_headers_say(memory: GuestMemory, load: Load) -> None:
    virtual, physical = 0xFFFF_FFFF_8000_0000, RAM_BASE + 0x1000
    memory.write(physical, b"\xff" * 0x100)
    kernel = elf([(virtual, physical, b"text", 0x10), (0x5000, RAM_BASE + 0x5000, b"data", 4)], virtual + 2)

    entry = load(kernel)

    assert entry.pc == physical + 2
    assert entry.kernel == (physical, RAM_BASE + 0x5004)
    assert memory.read(physical, 0x11) == b"text" + bytes(12) + b"\xff"
    assert memory.read(RAM_BASE + 0x5000, 4) == b"data"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (b"\x1f\x8b\x08" + bytes(100), "is compressed with gzip; decompress it first with gunzip"),
        (b"\xfd7zXZ\0" + bytes(100), "is compressed with xz; decompress it first with xz -d"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "is compressed with zstd; decompress it first with zstd -d"),
        (b"\x04\x22\x4d\x18" + bytes(100), "is compressed with lz4; decompress it first with lz4 -d"),
        (b"\x02\x21\x4c\x18" + bytes(100), "is compressed with lz4"),
        (b"MZ\0\0zimg" + bytes(100), "is a compressed EFI kernel"),
        (
            bytes(0x1FE) + b"\x55\xaa\0\0HdrS" + bytes(100),
            r"is an x86 kernel \(bzImage\); use a kernel built for riscv64",
        ),
        (bytes(0x38) + b"ARM\x64" + bytes(100), "is an AArch64 kernel"),
        (b"070701" + bytes(100), "is a cpio archive; give it as the initial RAM disk"),
        (b"#!/bin/sh\n" + bytes(100), "starts with 23 21 2f 62 and is neither a RISC-V Image nor an ELF file"),
        (b"short", "is truncated: it has 5 bytes, an Image's header alone has 64"),
        (image(flags=1), "is a big-endian Image"),
        (
            image(text_offset=0x80000),
            "wants to start 0x80000 into memory at 0x80000000; both must be multiples of 2 MiB",
        ),
        (image_with_section(0x5000), "is truncated: it has 256 bytes, its header speaks of 20480"),
        (elf([], 0, machine=62), "is an ELF file for x86-64; use a kernel built for riscv64"),
        (elf([], 0, machine=183), "is an ELF file for AArch64"),
        (elf([], 0, machine=999), "is an ELF file for machine 999"),
        (elf([], 0, elf_class=1), "is a 32-bit ELF file"),
        (elf([], 0, data=2), "is a big-endian ELF file"),
        (elf([], 0), "has 0 program headers"),
        (elf([(RAM_BASE, RAM_BASE, b"", 0)], RAM_BASE), "has no segment to load"),
        (elf([(0, 0, b"x", 1)], 0), "is linked to load at 0x0; memory begins at 0x80000000"),
        (elf([(0, RAM_BASE, b"x", 1)], 5), "starts at 0x5, which none of its segments holds"),
        (elf([(0, RAM_BASE, b"xy", 1)], 0), "has a segment of 2 bytes in the file but only 1 in memory"),
        (elf([(0, RAM_BASE, b"xyz", 3)], 0)[:-1], "is truncated: 3 bytes were expected at 0x78, 2 are there"),
        (elf([(0, RAM_BASE, b"x", 1)], 0)[:80], "is truncated: its program headers at 0x40 lie beyond its 80 bytes"),
        (b"\x7fELF", "is truncated: it has 4 bytes"),
        (elf([(0, RAM_BASE, b"x", 1)], 0, kind=3), "is dynamically linked; link it statically"),
    ],
)
def test_kernel_that_cannot_be_booted_is_refused(load: Load, kernel: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message):
        load(kernel)


def test_complete_pe_image_is_accepted(load: Load) -> None:
    assert load(image_with_section(0x5000).ljust(0x5000, b"\0")).pc == RAM_BASE + 2 * MIB


def test_missing_files_are_named(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(image())

    with pytest.raises(BootError, match=r"kernel .*nowhere cannot be read: No such file or directory"):
        load_boot_source(memory, tmp_path / "nowhere", None, lambda _: FDT)
    with pytest.raises(BootError, match=r"initial RAM disk .*nowhere cannot be read: No such file"):
        load_boot_source(memory, tmp_path / "kernel", tmp_path / "nowhere", lambda _: FDT)


def test_directories_devices_pipes_and_empty_files_are_refused(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(BootError, match="Is a directory"):
        load_boot_source(memory, tmp_path, None, lambda _: FDT)
    with pytest.raises(BootError, match="/dev/null is not a regular file"):
        load_boot_source(memory, "/dev/null", None, lambda _: FDT)
    with pytest.raises(BootError, match="pipe is not a regular file"):
        load_boot_source(memory, tmp_path / "pipe", None, lambda _: FDT)
    with pytest.raises(BootError, match="empty is empty"):
        load_boot_source(memory, tmp_path / "empty", None, lambda _: FDT)


def test_memory_too_small_for_the_kernel_is_refused_with_the_least_that_would_do(load: Load) -> None:
    with pytest.raises(BootError, match="does not fit into 16 MiB of memory; give the machine at least 33 MiB"):
        load(image(image_size=30 * MIB))
    with pytest.raises(BootError, match="at least 33 MiB"):
        load(elf([(0, RAM_BASE + 2 * MIB, b"x", 30 * MIB)], 0))


def test_initrd_that_does_not_fit_is_refused_with_the_least_that_would_do(load: Load) -> None:
    with pytest.raises(BootError, match=r"initrd of 12 MiB does not fit .* in 16 MiB of memory; .* at least 17 MiB"):
        load(image(image_size=2 * MIB), bytes(12 * MIB))


def test_the_least_that_would_do_does(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(image(image_size=2 * MIB))
    (tmp_path / "initrd").write_bytes(bytes(12 * MIB))

    with GuestMemory(RAM_BASE, 17 * MIB) as memory:
        board = RiscvVirtBoard(memory, Console(), [lambda level: None] * 8)
        entry = load_boot_source(
            memory, tmp_path / "kernel", tmp_path / "initrd", lambda initrd: board.build_fdt(Chosen(initrd=initrd))
        )

    assert entry.fdt_address + entry.fdt_size <= RAM_BASE + 17 * MIB


def test_device_tree_that_does_not_fit_is_refused(load: Load) -> None:
    with pytest.raises(BootError, match=r"device tree of 16777216 bytes does not fit .* at least 20 MiB"):
        load(image(), fdt=bytes(16 * MIB))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.sampled_from(["image", "elf", "noise"]), st.data())
def test_damaged_kernel_is_loaded_or_refused(load: Load, kind: str, data: st.DataObject) -> None:
    segments = [(0x1000, RAM_BASE, b"text", 100), (0x2000, RAM_BASE + 0x2000, b"data", 8)]
    whole = {
        "image": image_with_section(0x100),
        "elf": elf(segments, 0x1000),
        "noise": data.draw(st.binary(min_size=1)),
    }
    kernel = bytearray(whole[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        kernel[data.draw(st.integers(0, len(kernel) - 1))] = data.draw(st.integers(0, 255))

    try:
        entry = load(bytes(kernel[: data.draw(st.integers(1, len(kernel)))]))
    except BootError:
        return

    assert RAM_BASE <= entry.kernel[0] <= entry.pc < entry.kernel[1] <= entry.fdt_address
