"""The loader: puts kernel, initial RAM disk and device tree into guest memory and says where the first hart starts.

Kernels are RISC-V ``Image`` files (Linux Documentation/arch/riscv/boot-image-header.rst) and static 64-bit RISC-V ELF
files (System V gABI, chapters 4 and 5, with the RISC-V ELF psABI). Placement follows Linux
Documentation/arch/riscv/boot.rst::

    RAM + text_offset        kernel: image_size bytes, which is more than the file (its .bss)
    next page boundary       initial RAM disk
    next page boundary       device tree

An ELF goes where its program headers say. Files are read straight into guest memory. An Image is expected to find zeros
behind it, as fresh memory holds; the zeros an ELF asks for are written. Left out: compressed kernels, EFI, relocation.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import Final

from vmm.errors import BootError
from vmm.memory import PAGE_SIZE, GuestMemory

KERNEL_ALIGNMENT: Final = 2 * 1024 * 1024
_MIB: Final = 1024 * 1024
_KERNEL_RESERVE: Final = 2 << 20
_FDT_ALLOWANCE: Final = 64 * 1024
_HEAD_SIZE: Final = 1024

# boot-image-header.rst: code0 code1 text_offset image_size flags version res1 res2 magic magic2 res3 (the PE offset)
_IMAGE_HEADER: Final = struct.Struct("<IIQQQIIQ8sII")

# gABI: type machine version entry phoff shoff flags ehsize phentsize phnum shentsize shnum shstrndx, after e_ident
_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
# p_type p_flags p_offset p_vaddr p_paddr p_filesz p_memsz p_align
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _PT_INTERP = 1, 3
_EM_RISCV: Final = 243
_ELF_MACHINES: Final = {
    2: "SPARC",
    3: "x86",
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "S/390",
    40: "ARM",
    43: "64-bit SPARC",
    62: "x86-64",
    183: "AArch64",
    258: "LoongArch",
}

# (offset, magic, what it is, what to do about it)
_FOREIGN: Final = (
    (0, b"\x1f\x8b", "compressed with gzip", "decompress it first with gunzip"),
    (0, b"\xfd7zXZ\x00", "compressed with xz", "decompress it first with xz -d"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it first with zstd -d"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it first with lz4 -d"),
    (0, b"\x02\x21\x4c\x18", "compressed with lz4", "decompress it first with lz4 -d"),
    (0, b"BZh", "compressed with bzip2", "decompress it first with bunzip2"),
    (0, b"\x5d\x00\x00", "compressed with lzma", "decompress it first with xz -d --format=lzma"),
    (0, b"\x89LZO", "compressed with lzop", "decompress it first with lzop -d"),
    (4, b"zimg", "a compressed EFI kernel (zboot)", "use the Image it was made from"),
    (0x202, b"HdrS", "an x86 kernel (bzImage)", "use a kernel built for riscv64"),
    (0x38, b"ARM\x64", "an AArch64 kernel (Image)", "use a kernel built for riscv64"),
    (0x24, b"\x18\x28\x6f\x01", "an ARM kernel (zImage)", "use a kernel built for riscv64"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", "use the Image inside it"),
    (0, b"070701", "a cpio archive", "give it as the initial RAM disk and not as the kernel"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", "use the Image inside it"),
)


@dataclass(frozen=True, slots=True)
class BootEntry:
    """Where things are after loading; all addresses are guest-physical, ranges end at the byte after the last.

    Linux expects the first hart at ``pc`` in S-mode with a0 = its hart number, a1 = ``fdt_address`` and satp = 0.
    """

    pc: int
    fdt_address: int
    fdt_size: int
    kernel: tuple[int, int]
    initrd: tuple[int, int] | None


def load_boot_source(
    memory: GuestMemory,
    kernel: str | os.PathLike[str],
    initrd: str | os.PathLike[str] | None,
    build_fdt: Callable[[tuple[int, int] | None], bytes],
) -> BootEntry:
    """Load everything a kernel needs.

    Args:
        memory: RAM to load into, fresh.
        kernel: path of an Image or ELF file.
        initrd: path of the initial RAM disk, loaded as it is.
        build_fdt: makes the device tree, given start and end of the initial RAM disk.

    Raises:
        BootError: a file that is missing, damaged, not for this machine, or does not fit.
    """
    with _open(kernel, "kernel") as (kernel_file, kernel_size):
        head = kernel_file.read(_HEAD_SIZE)
        loader = _load_elf if head.startswith(b"\x7fELF") else _load_image
        pc, start, end = loader(memory, _Source(os.fspath(kernel), kernel_file, kernel_size, head))
    # Linux reserves its image up to the next 2 MiB (setup_bootmem): what lay there would be lost.
    place = -(-end // _KERNEL_RESERVE) * _KERNEL_RESERVE
    initrd_range = None
    if initrd is not None:
        with _open(initrd, "initial RAM disk") as (initrd_file, size):
            initrd_range = (place, place + size)
            if place + size + _FDT_ALLOWANCE > memory.end:
                needed = place + size + _FDT_ALLOWANCE - memory.base
                raise BootError(
                    f"the initial RAM disk {initrd} of {_mebibytes(size)} does not fit behind the kernel in"
                    f" {_mebibytes(memory.size)} of memory; give the machine at least {_mebibytes(needed)}"
                )
            _fill(memory, place, _Source(os.fspath(initrd), initrd_file, size, b""), 0, size)
            place = _next_page(place + size)
    fdt = build_fdt(initrd_range)
    if place + len(fdt) > memory.end:
        needed = place + len(fdt) - memory.base
        raise BootError(
            f"the device tree of {len(fdt)} bytes does not fit behind the kernel in {_mebibytes(memory.size)} of"
            f" memory; give the machine at least {_mebibytes(needed)}"
        )
    memory.write(place, fdt)
    return BootEntry(pc, place, len(fdt), (start, end), initrd_range)


@dataclass(frozen=True, slots=True)
class _Source:
    path: str
    file: FileIO
    size: int
    head: bytes

    def error(self, problem: str) -> BootError:
        return BootError(f"kernel {self.path} {problem}")


def _load_image(memory: GuestMemory, source: _Source) -> tuple[int, int, int]:
    """Load an Image; returns entry, start and end."""
    if len(source.head) < _IMAGE_HEADER.size or source.head[0x38:0x3C] != b"RSC\x05":
        raise _not_a_kernel(source)
    _, _, text_offset, image_size, flags, _, _, _, _, _, pe_offset = _IMAGE_HEADER.unpack_from(source.head)
    if flags & 1:
        raise source.error("is a big-endian Image; use a little-endian one")
    complete = _pe_end(source.head, pe_offset)
    if source.size < complete:
        raise source.error(f"is truncated: it has {source.size} bytes, its header speaks of {complete}; fetch it again")
    if text_offset % KERNEL_ALIGNMENT or memory.base % KERNEL_ALIGNMENT:
        raise source.error(
            f"wants to start {text_offset:#x} into memory at {memory.base:#x}; both must be multiples of 2 MiB"
        )
    start = memory.base + text_offset
    end = start + max(image_size, source.size)
    _require_room(memory, source, end)
    _fill(memory, start, source, 0, source.size)
    return start, start, end


def _pe_end(head: bytes, pe_offset: int) -> int:
    """Bytes a complete Image has by its PE header (Microsoft PE Format, section table), 0 without one."""
    if head[pe_offset : pe_offset + 4] != b"PE\0\0" or len(head) < pe_offset + 24:
        return 0
    sections = int.from_bytes(head[pe_offset + 6 : pe_offset + 8], "little")
    optional_size = int.from_bytes(head[pe_offset + 20 : pe_offset + 22], "little")
    first = pe_offset + 24 + optional_size
    end = 0
    for at in range(first, min(first + 40 * sections, len(head) - 39), 40):
        size, offset = struct.unpack_from("<II", head, at + 16)
        end = max(end, offset + size)
    return end


def _load_elf(memory: GuestMemory, source: _Source) -> tuple[int, int, int]:
    """Load the segments of an ELF file; returns entry, start and end."""
    if len(source.head) < _ELF_HEADER.size:
        raise source.error(f"is truncated: it has {source.size} bytes, an ELF header alone has {_ELF_HEADER.size}")
    ident, _, machine, _, entry, table, _, _, _, entry_size, count, _, _, _ = _ELF_HEADER.unpack_from(source.head)
    if ident[5] != 1:
        raise source.error("is a big-endian ELF file; use a little-endian one built for riscv64")
    if machine != _EM_RISCV:
        name = _ELF_MACHINES.get(machine, f"machine {machine}")
        raise source.error(f"is an ELF file for {name}; use a kernel built for riscv64")
    if ident[4] != 2:
        raise source.error("is a 32-bit ELF file; use a kernel built for riscv64")
    if count == 0 or entry_size != _PROGRAM_HEADER.size:
        raise source.error(f"has {count} program headers of {entry_size} bytes, so it is not an executable ELF file")
    segments = [
        _PROGRAM_HEADER.unpack(header)
        for header in _slices(_read_exactly(source, table, count * entry_size), entry_size)
    ]
    if any(segment[0] == _PT_INTERP for segment in segments):
        raise source.error("is dynamically linked; link it statically")
    loaded = [segment for segment in segments if segment[0] == _PT_LOAD and segment[6]]
    if not loaded:
        raise source.error("has no segment to load, so it is not an executable ELF file")
    start = min(segment[4] for segment in loaded)
    end = max(segment[4] + segment[6] for segment in loaded)
    if start < memory.base:
        raise source.error(f"is linked to load at {start:#x}; memory begins at {memory.base:#x}")
    _require_room(memory, source, end)
    pc = None
    for _, _, offset, virtual, physical, file_size, memory_size, _ in loaded:
        if file_size > memory_size:
            raise source.error(f"has a segment of {file_size} bytes in the file but only {memory_size} in memory")
        _fill(memory, physical, source, offset, file_size)
        for zeros in range(physical + file_size, physical + memory_size, _MIB):
            memory.write(zeros, bytes(min(_MIB, physical + memory_size - zeros)))
        # The entry is a virtual address; with satp = 0 the hart starts at the physical one.
        if virtual <= entry < virtual + memory_size:
            pc = entry - virtual + physical
    if pc is None:
        raise source.error(f"starts at {entry:#x}, which none of its segments holds")
    return pc, start, end


def _not_a_kernel(source: _Source) -> BootError:
    for offset, magic, what, remedy in _FOREIGN:
        if source.head[offset : offset + len(magic)] == magic:
            return source.error(f"is {what}; {remedy}")
    if source.size < _IMAGE_HEADER.size:
        return source.error(
            f"is truncated: it has {source.size} bytes, an Image's header alone has {_IMAGE_HEADER.size}"
        )
    return source.error(f"starts with {source.head[:4].hex(' ')} and is neither a RISC-V Image nor an ELF file")


def _require_room(memory: GuestMemory, source: _Source, end: int) -> None:
    needed = _next_page(end) + _FDT_ALLOWANCE - memory.base
    if needed > memory.size:
        raise source.error(
            f"does not fit into {_mebibytes(memory.size)} of memory; give the machine at least {_mebibytes(needed)}"
        )


@contextmanager
def _open(path: str | os.PathLike[str], what: str) -> Iterator[tuple[FileIO, int]]:
    """An unbuffered file and its size."""
    try:
        # Without waiting: a pipe that nobody writes to is refused below.
        file = FileIO(os.fspath(path), opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        reason = error.strerror or str(error)
        raise BootError(f"{what} {os.fspath(path)} cannot be read: {reason}; name a file that can") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BootError(f"{what} {os.fspath(path)} is not a regular file; name the file itself")
        if status.st_size == 0:
            raise BootError(f"{what} {os.fspath(path)} is empty; build or fetch it again")
        yield file, status.st_size


def _fill(memory: GuestMemory, address: int, source: _Source, offset: int, length: int) -> None:
    """Read ``length`` bytes of the file from ``offset`` straight into guest memory."""
    with memory.view(address, length) as whole:
        # A damaged header may name an offset that is too large to seek to.
        source.file.seek(min(offset, source.size))
        done = 0
        while done < length:
            with whole[done:] as rest:
                got = source.file.readinto(rest)
            if not got:
                raise BootError(
                    f"{source.path} is truncated: {length} bytes were expected at {offset:#x}, {done} are there"
                )
            done += got
    memory.notify(address, length)


def _read_exactly(source: _Source, offset: int, length: int) -> bytes:
    source.file.seek(min(offset, source.size))
    data = source.file.read(length)
    if len(data) != length:
        raise source.error(f"is truncated: its program headers at {offset:#x} lie beyond its {source.size} bytes")
    return data


def _slices(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _next_page(address: int) -> int:
    return -(-address // PAGE_SIZE) * PAGE_SIZE


def _mebibytes(size: int) -> str:
    """Rounded up, so that what is called enough is enough."""
    return f"{-(-size // _MIB)} MiB" if size >= _MIB else f"{size} bytes"
