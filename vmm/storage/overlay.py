"""A copy-on-write disk: what was written lies in a file of its own, everything else is read from a backing disk.

The file, little-endian, and sparse::

    0           header     8s magic "KATAOVL\\n" │ u32 version 1 │ u32 cluster size │ u64 size of the disk
                           u64 size of the backing disk │ u64 where the bitmap is │ u64 where the data is
                           u16 format of the backing disk: 0 raw, 1 overlay │ u16 length of its name │ u32 CRC-32
                           then the name; a relative one starts at the overlay's own directory
    bitmap      1 bit for each cluster, lowest bit first: set when the cluster lies here
    data        byte n of the disk is byte data + n, where it lies here

The checksum is that of the header with zero in its place, and of the name. The host's file system is what allots room,
so that there is no table of clusters, and a cluster can be as small as a page: 4 KiB by default, which a guest's file
system writes whole, hence without reading the backing disk first.

**Order.** Data is written before the bit that says so. Bits wait in memory until a flush, which makes data stable
first, then writes the bits, and makes them stable. After a crash the disk is as if it had lost power: what was written
since the last flush is there or is not. A discarded cluster stays here and reads as zeroes; one that lies in the
backing disk stays there.

The backing disk must not change as long as an overlay names it. It is opened to be read, and locked against writers.
Left out: growing, internal snapshots, compression, merging back.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmm.storage.disk import Disk, DiskError
from vmm.storage.raw import SECTOR, RawDisk

MAGIC: Final = b"KATAOVL\n"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQQQHHI")
PAGE: Final = 4096  #: where the bitmap starts, and what is written of it at once
DEFAULT_CLUSTER: Final = 4096
MAX_CLUSTER: Final = 1 << 20
MAX_SIZE: Final = 1 << 42
MAX_DEPTH: Final = 8  #: overlays over overlays

FORMATS: Final = ("raw", "overlay")

_WINDOW: Final = 4096  # clusters


@dataclass(frozen=True, slots=True)
class _Header:
    cluster: int
    size: int
    backing_size: int
    bitmap: int
    data: int
    backing_format: str
    backing_name: str

    def pack(self) -> bytes:
        name = os.fsencode(self.backing_name)
        fields = (
            *(MAGIC, VERSION, self.cluster, self.size, self.backing_size, self.bitmap, self.data),
            *(FORMATS.index(self.backing_format), len(name)),
        )
        checksum = zlib.crc32(HEADER.pack(*fields, 0) + name)
        return HEADER.pack(*fields, checksum) + name

    @staticmethod
    def unpack(data: bytes, path: Path) -> _Header:
        """Read the first page of a file.

        Raises:
            DiskError: it is no overlay, one of another version, or damaged.
        """
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise DiskError(f"{path} starts with {data[:8]!r}, an overlay must start with {MAGIC!r}; is it a raw disk?")
        _, version, cluster, size, backing_size, bitmap, start, kind, name_length, checksum = HEADER.unpack_from(data)
        if version != VERSION:
            raise DiskError(f"{path} is an overlay of version {version}, it must be {VERSION}")
        name = data[HEADER.size : HEADER.size + name_length]
        if zlib.crc32(data[: HEADER.size - 4] + bytes(4) + name) != checksum or len(name) != name_length:
            raise DiskError(
                f"{path} has a damaged header, its checksum must be {checksum:#x}; restore it or make it anew"
            )
        # The checksum is against accidents; these bounds are against everything else.
        bits = -(-size // cluster) if cluster else 0
        if not (
            _is_cluster(cluster)
            and _is_size(size)
            and _is_size(backing_size)
            and kind < len(FORMATS)
            and name
            and b"\0" not in name
            and bitmap == PAGE
            and start == _round_up(bitmap + -(-bits // 8), max(PAGE, cluster))
        ):
            raise DiskError(f"{path} has a header that no overlay of version {VERSION} can have; make it anew")
        return _Header(cluster, size, backing_size, bitmap, start, FORMATS[kind], os.fsdecode(name))


def _is_cluster(value: int) -> bool:
    return DEFAULT_CLUSTER <= value <= MAX_CLUSTER and not value & (value - 1)


def _is_size(value: int) -> bool:
    return 0 < value <= MAX_SIZE and value % SECTOR == 0


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def create_overlay(
    path: Path,
    backing: Path,
    *,
    backing_format: str = "raw",
    size: int | None = None,
    cluster: int = DEFAULT_CLUSTER,
    durable: bool = True,
) -> None:
    """Make an overlay file over a disk, which must not change from now on.

    The file takes two pages of room until something is written. A backing file in the same directory is named without
    it, so that the two can be moved together.

    Args:
        path: the new file.
        backing: the disk beneath.
        backing_format: ``"raw"`` or ``"overlay"``.
        size: bytes of the new disk, by default as many as beneath; what is beyond the backing disk's end reads as zero.
        cluster: bytes that are copied at once, a power of two from 4 KiB to 1 MiB.
        durable: the file is there after a loss of power; a disk that nobody wants afterwards is made faster without.

    Raises:
        DiskError: the file exists or cannot be made, the backing disk cannot be opened, or a value is out of range.
    """
    if not _is_cluster(cluster):
        raise DiskError(f"cluster size {cluster} must be a power of two from {DEFAULT_CLUSTER} to {MAX_CLUSTER}")
    with open_disk(backing, backing_format, read_only=True) as beneath:
        backing_size = beneath.size
    size = backing_size if size is None else size
    if not _is_size(size):
        raise DiskError(f"size {size} of an overlay must be a multiple of {SECTOR} up to {MAX_SIZE} bytes")
    if size < backing_size:
        raise DiskError(f"size {size} of an overlay must be at least {backing_size}, the size of {backing}")
    directory, target = path.resolve().parent, backing.resolve()
    name = target.name if target.parent == directory else str(target)
    bits = -(-size // cluster)
    start = _round_up(PAGE + -(-bits // 8), max(PAGE, cluster))
    header = _Header(cluster, size, backing_size, PAGE, start, backing_format, name).pack()
    if len(header) > PAGE:
        raise DiskError(f"the backing file's name has {len(name)} characters, which must fit into a page")
    try:
        _publish(path, header, start + size, durable)
    except FileExistsError as error:
        raise DiskError(f"{path} exists already, a new overlay must have a name of its own") from error
    except OSError as error:
        raise DiskError(
            f"{path} cannot be made: {error.strerror}; its directory must have room and be writable"
        ) from error


def _publish(path: Path, header: bytes, length: int, durable: bool) -> None:
    """What is half written is never seen: write, sync, then give it its name."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(header)
            file.truncate(length)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    if not durable:
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def open_disk(path: Path, format: str, *, read_only: bool = False) -> Disk:
    """Open a disk of the format that its owner names.

    Args:
        path: a file or a block device.
        format: ``"raw"`` or ``"overlay"``.
        read_only: nothing will be written; others may read it at the same time.

    Raises:
        DiskError: it cannot be opened, is locked by another user, or is not of that format.
    """
    return _open_disk(path, format, read_only, 0)


def _open_disk(path: Path, format: str, read_only: bool, depth: int) -> Disk:
    if format == "raw":
        return RawDisk(path, read_only=read_only)
    if format != "overlay":
        raise DiskError(f"format of {path} is {format!r}, it must be one of {', '.join(map(repr, FORMATS))}")
    if depth >= MAX_DEPTH:
        raise DiskError(f"{path} lies under {depth} overlays, there must be less than {MAX_DEPTH}")
    return OverlayDisk(path, read_only=read_only, depth=depth)


class OverlayDisk(Disk):
    """An overlay file and what is beneath it.

    Args:
        depth: how many overlays lie above this one.

    Raises:
        DiskError: it or its backing disk cannot be opened, is locked by another user, or does not fit.
    """

    def __init__(self, path: Path, *, read_only: bool = False, depth: int = 0) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = threading.Lock()  # held while clusters come here
        self._flushing = threading.Lock()  # a flush that finds nothing to do waits for the one that does it
        self._changed: set[int] = set()  # pages of the bitmap that the file does not have yet
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(RawDisk(path, read_only=read_only))
            header = _read_header(self._file)
            self.size, self._cluster, self._data = header.size, header.cluster, header.data
            self._backing_size = header.backing_size
            if self._file.size < header.data + header.size:
                raise DiskError(
                    f"{path} has {self._file.size} bytes, its header says that it must have {header.data + header.size}"
                )
            self._bitmap = bytearray(header.data - header.bitmap)
            self._file.read([memoryview(self._bitmap)], len(self._bitmap), header.bitmap)
            beneath = path.resolve().parent / header.backing_name
            self.backing = opened.enter_context(_open_disk(beneath, header.backing_format, True, depth + 1))
            if self.backing.size < header.backing_size:
                raise DiskError(
                    f"{beneath} has {self.backing.size} bytes, under {path} it must have the {header.backing_size} of"
                    " then: a backing disk must not change"
                )
            self._opened = opened.pop_all()

    @property
    def clusters_here(self) -> int:
        """How many clusters have been written, of :attr:`cluster_size` bytes each."""
        return int.from_bytes(self._bitmap, "little").bit_count()

    @property
    def cluster_size(self) -> int:
        """Bytes that are copied at once."""
        return self._cluster

    def _runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
        """The range in pieces that lie in one place: whether here, offset, and length."""
        cluster, end = self._cluster, offset + length
        number, after = offset // cluster, (end - 1) // cluster + 1
        while number < after:
            # A few at a time: shifting takes as long as the number has bits.
            count = min(after - number, _WINDOW)
            bits = int.from_bytes(self._bitmap[number // 8 : (number + count + 7) // 8], "little") >> number % 8
            while count:
                here = bool(bits & 1)
                # How many equal bits there are from the lowest on: the place of the first different one.
                different = (~bits if here else bits) & ((1 << count) - 1)
                equal = (different & -different).bit_length() - 1 if different else count
                number, count, bits = number + equal, count - equal, bits >> equal
                stop = min(end, number * cluster)
                yield here, offset, stop - offset
                offset = stop

    def _mark(self, first: int, last: int) -> None:
        """Clusters ``first`` up to, without, ``last`` lie here; the lock is held."""
        for number in range(first, last):
            self._bitmap[number // 8] |= 1 << number % 8
        self._changed.update(range(first // 8 // PAGE, (last - 1) // 8 // PAGE + 1))

    def read(self, buffers: Sequence[memoryview], length: int, offset: int) -> None:
        self._read(buffers, length, offset, waiting=True)

    def try_read(self, buffers: Sequence[memoryview], length: int, offset: int) -> bool:
        return self._read(buffers, length, offset, waiting=False)

    def _read(self, buffers: Sequence[memoryview], length: int, offset: int, *, waiting: bool) -> bool:
        for here, start, size in self._runs(offset, length):
            part = buffers if size == length else _slice(buffers, start - offset, size)
            if here:
                disk: Disk = self._file
                start += self._data
            else:
                disk = self.backing
                beneath = min(size, max(self._backing_size - start, 0))
                if beneath < size:
                    for each in _slice(part, beneath, size - beneath):
                        each[:] = bytes(len(each))
                    part, size = _slice(part, 0, beneath), beneath
                if not size:
                    continue
            if waiting:
                disk.read(part, size, start)
            elif not disk.try_read(part, size, start):
                return False
        return True

    def write(self, buffers: Sequence[memoryview], length: int, offset: int, *, stable: bool = False) -> None:
        runs = list(self._runs(offset, length))
        if len(runs) == 1 and runs[0][0]:
            self._file.write(buffers, length, self._data + offset, stable=stable)
        else:
            with self._lock:
                self._bring(offset, length)
                self._file.write(buffers, length, self._data + offset)
                self._mark(offset // self._cluster, -(-(offset + length) // self._cluster))
        if stable:
            self.flush()

    def _bring(self, offset: int, length: int) -> None:
        """Copy the first and the last cluster of a range here where it covers only a part; the lock is held."""
        cluster, end = self._cluster, offset + length
        for start in {offset // cluster * cluster, (end - 1) // cluster * cluster}:
            whole = offset <= start and min(start + cluster, self.size) <= end
            number = start // cluster
            if not whole and not self._bitmap[number // 8] >> number % 8 & 1:
                size = min(cluster, self.size - start)
                copy = memoryview(bytearray(size))
                self._read([copy], size, start, waiting=True)
                self._file.write([copy], size, self._data + start)

    def flush(self) -> None:
        with self._flushing:
            with self._lock:
                changed, self._changed = self._changed, set()
                pages = {page: self._bitmap[page * PAGE : (page + 1) * PAGE] for page in changed}
            try:
                self._file.flush()
                if pages:
                    for page, bits in pages.items():
                        self._file.write([memoryview(bits)], len(bits), PAGE + page * PAGE)
                    self._file.flush()
            except BaseException:
                with self._lock:
                    self._changed |= changed
                raise

    def discard(self, offset: int, length: int) -> None:
        # Where clusters do not lie here, nothing has room yet.
        self._file.discard(self._data + offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        with self._lock:
            self._bring(offset, length)
            self._file.write_zeroes(self._data + offset, length, unmap=unmap)
            self._mark(offset // self._cluster, -(-(offset + length) // self._cluster))

    def refresh(self) -> int:
        return self.size

    def close(self) -> None:
        """Write the bits that are missing, and give the files back.

        Raises:
            OSError: the bits could not be written; the disk is as after a loss of power.
        """
        with self._opened:
            try:
                if self._changed:
                    self.flush()
            finally:
                self._changed = set()


def _read_header(file: RawDisk) -> _Header:
    page = memoryview(bytearray(min(PAGE, file.size)))
    try:
        file.read([page], len(page), 0)
    except OSError as error:
        raise DiskError(f"{file.path} cannot be read: {error.strerror}; an overlay must have a header") from error
    return _Header.unpack(bytes(page), file.path)


def _slice(buffers: Sequence[memoryview], offset: int, length: int) -> list[memoryview]:
    """The bytes from ``offset`` on, ``length`` of them."""
    parts = []
    for each in buffers:
        if offset >= len(each):
            offset -= len(each)
            continue
        if not length:
            break
        part = each[offset : offset + length]
        parts.append(part)
        length -= len(part)
        offset = 0
    return parts
