"""The block device, a disk (virtio 1.2, section 5.2).

A request is one buffer: a header to read, data, and a status byte to write, in whatever descriptors the driver likes
(2.7.4)::

    to read    u32 type │ u32 reserved │ u64 sector │ data of OUT, or segments of DISCARD and WRITE_ZEROES
    to write   data of IN, or of GET_ID │ u8 status: 0 OK, 1 IOERR, 2 UNSUPP

Sectors have 512 bytes, whatever the block size. What the disk lies in is a :class:`~vmm.storage.Disk`; data goes
between guest memory and its file in one system call, without a copy in between.

Reads that the host has in memory, and writes, are served on the vCPU's thread: they are copies to and from the page
cache, and take less time than handing them over. What may wait for the host's disk, and what is large, is carried out
by a worker thread of the device while the vCPU goes on.

Left out: SIZE_MAX and GEOMETRY (they would say nothing), LIFETIME, SECURE_ERASE, zoned devices.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmm.config import BlockConfig
from vmm.devices.virtio.device import Host, VirtioDevice
from vmm.devices.virtio.queue import Chain, Queue, QueueError
from vmm.storage import Disk, DiskError, open_disk

_log = logging.getLogger(__name__)

# Features (5.2.3).
SEG_MAX: Final = 1 << 2
RO: Final = 1 << 5
BLK_SIZE: Final = 1 << 6
FLUSH: Final = 1 << 9
TOPOLOGY: Final = 1 << 10
CONFIG_WCE: Final = 1 << 11
MQ: Final = 1 << 12
DISCARD: Final = 1 << 13
WRITE_ZEROES: Final = 1 << 14

# Types of requests (5.2.6).
T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13
TYPE_NAMES: Final = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_GET_ID: "serial number",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "write zeroes",
}

OK: Final = 0
IOERR: Final = 1
UNSUPP: Final = 2
LATER: Final = -1  #: no status: the worker will have it

HEADER: Final = struct.Struct("<IIQ")  #: type, reserved, sector
SEGMENT: Final = struct.Struct("<QII")  #: of DISCARD and WRITE_ZEROES: sector, sectors, flags
UNMAP: Final = 1  #: a flag of WRITE_ZEROES segments

#: Configuration space (5.2.4): capacity, size_max, seg_max, geometry (cylinders, heads, sectors), blk_size, topology
#: (physical_block_exp, alignment_offset, min_io_size, opt_io_size), writeback, unused, num_queues,
#: discard (max_sectors, max_seg, sector_alignment), write_zeroes (max_sectors, max_seg, may_unmap), unused.
CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
WRITEBACK_OFFSET: Final = 32

SECTOR: Final = 512
QUEUE_SIZE: Final = 512
MAX_SEGMENTS: Final = QUEUE_SIZE - 2  #: of data, in one request: a chain has room for header and status, too
PHYSICAL_BLOCK_EXPONENT: Final = 3  #: 4 KiB, the page of the host's cache
MAX_DISCARD_SECTORS: Final = 1 << 22
MAX_WRITE_ZEROES_SECTORS: Final = 1 << 17
MAX_DISCARD_RANGES: Final = 64  #: segments in one DISCARD
MAX_WRITE_ZEROES_RANGES: Final = 8  #: and in one WRITE_ZEROES, which may have to write them all
ID_BYTES: Final = 20
LARGE: Final = 4 << 20  #: bytes beyond which the worker moves data; waking it costs more than copying 1 MiB does


@dataclass(slots=True)
class BlockCounters:
    """What the guest asked for, and got."""

    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0
    flushes: int = 0
    discards: int = 0
    errors: int = 0  #: requests that ended with IOERR or UNSUPP
    on_worker: int = 0  #: requests that the worker carried out


class BlockDevice(VirtioDevice):
    """A disk.

    Raises:
        DiskError: the file cannot be opened, is locked by another user, or is not of the format that it shall be.
    """

    DEVICE_ID: ClassVar[int] = 2
    KIND: ClassVar[str] = "blk"

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config.name)
        assert config.path is not None
        self._queue_count = config.queues
        self._id = config.serial.encode("ascii").ljust(ID_BYTES, b"\0")
        self._writeback = True
        self._announce = False
        self.counters = BlockCounters()
        self.disk: Disk = open_disk(config.path, config.format, read_only=config.read_only)
        self._sectors = self.disk.size // SECTOR
        self._worker = _Worker(f"{self.name}-worker", self._collect)

    # What it says of itself.

    @property
    def features(self) -> int:
        features = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE
        if self._queue_count > 1:
            features |= MQ
        return features | (RO if self.disk.read_only else DISCARD | WRITE_ZEROES)

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (QUEUE_SIZE,) * self._queue_count

    @property
    def sectors(self) -> int:
        """How many the driver is told of."""
        return self._sectors

    @property
    def config_space(self) -> bytes:
        alignment = 1 << PHYSICAL_BLOCK_EXPONENT
        return CONFIG.pack(
            *(self._sectors, 0, MAX_SEGMENTS, 0, 0, 0, SECTOR),
            *(PHYSICAL_BLOCK_EXPONENT, 0, alignment, 0),
            *(self._writeback, self._queue_count),
            *(MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES, alignment),
            *(MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_RANGES, 1),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        # 5.2.5: only the cache mode can be written, by a driver that negotiated to do so.
        if self.has(CONFIG_WCE) and offset == WRITEBACK_OFFSET and len(data) == 1:
            wanted = bool(data[0] & 1)
            if self._writeback and not wanted:
                # The driver flushes no more from now on. If this one fails, it reads that the cache is still there.
                self._worker.drain()
                try:
                    self.disk.flush()
                except OSError:
                    wanted = True
                self._give_back()
            self._writeback = wanted

    def update(self) -> int:
        """Look at the disk's file again, which may have grown, and tell the driver; returns the size in bytes.

        Called from any thread.
        """
        with self.lock:
            size = self.disk.refresh()
            if size // SECTOR != self._sectors:
                self._sectors = size // SECTOR
                self.config_changed()
            return size

    # Its life.

    def connect(self, host: Host) -> None:
        super().connect(host)
        self._memory = host.memory

    def activate(self) -> None:
        # 5.2.5.2 and 5.2.6: a driver that cannot flush must not lose what it wrote.
        if not self.has(FLUSH):
            self._writeback = False
        if self._announce:
            self._announce = False
            self.config_changed()

    def deactivate(self) -> None:
        self._worker.drop()
        self._writeback = True

    def pause(self) -> None:
        self._worker.drain()
        self._give_back()

    def save_own(self) -> dict[str, Any]:
        # What a copy of the file must have: an overlay keeps in memory which clusters it has.
        try:
            self.disk.flush()
        except OSError as error:
            raise DiskError(
                f"{self.disk.path} cannot be made stable: {error.strerror}; the state of {self.name} needs that"
            ) from error
        return {"writeback": self._writeback, "sectors": self._sectors}

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self._writeback = bool(own["writeback"])
        self._announce = own["sectors"] != self._sectors

    def close(self) -> None:
        self._worker.close()
        try:
            self.disk.close()
        except OSError as error:
            # Closing goes on with what else the VM has, so that nobody is there to be raised to.
            _log.error(
                "the disk %s could not be closed whole: %s; what the guest wrote since it last flushed may be lost, as"
                " with a loss of power, and its directory must have room and be writable",
                *(self.disk.path, error.strerror),
            )

    # Requests.

    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            self._serve(queue, chain)
        queue.signal()

    def _serve(self, queue: Queue, chain: Chain) -> None:
        if chain.readable_bytes < HEADER.size or not chain.writable_bytes:
            raise QueueError(
                f"a request to {self.name} has {chain.readable_bytes} bytes to read and {chain.writable_bytes} to"
                f" write, it must have a header of {HEADER.size} and a status of 1"
            )
        address, first = chain.readable[0]
        whole = first >= HEADER.size
        kind, _, sector = HEADER.unpack(
            self._memory.view(address, HEADER.size) if whole else chain.read(0, HEADER.size)
        )
        if kind == T_IN:
            length = chain.writable_bytes - 1
            status = self._read(queue, chain, sector, length)
        elif kind == T_OUT:
            length = chain.readable_bytes - HEADER.size
            status = self._write(queue, chain, sector, length)
        elif kind == T_FLUSH:
            length = 0
            status = self._flush(queue, chain)
        elif kind == T_GET_ID:
            length = ID_BYTES
            status = self._get_id(chain)
        elif kind in (T_DISCARD, T_WRITE_ZEROES):
            length = chain.readable_bytes - HEADER.size
            status = self._deallocate(queue, chain, kind, length)
        else:
            length = chain.readable_bytes - HEADER.size
            status = UNSUPP
        if queue.tracing:
            place = f" {length // SECTOR} sectors at {sector}" if kind in (T_IN, T_OUT) else ""
            chain.detail = TYPE_NAMES.get(kind, f"unknown type {kind}") + place
        if status != LATER:
            self._finish(queue, chain, status)

    def _finish(self, queue: Queue, chain: Chain, status: int) -> None:
        """Write the status, which is the last byte (5.2.6), and give the buffer back."""
        if status:
            self.counters.errors += 1
        address, last = chain.writable[-1]
        self._memory.view(address + last - 1, 1)[0] = status
        queue.push(chain, chain.writable_bytes)

    def _inside(self, sector: int, length: int) -> bool:
        return length % SECTOR == 0 and sector <= self._sectors and length // SECTOR <= self._sectors - sector

    def _read(self, queue: Queue, chain: Chain, sector: int, length: int) -> int:
        if not self._inside(sector, length):
            return IOERR
        self.counters.reads += 1
        self.counters.bytes_read += length
        if not length:
            return OK
        offset = sector * SECTOR
        if length < LARGE:
            try:
                if self.disk.try_read(chain.writable_views(0, length), length, offset):
                    return OK
            except OSError:
                return IOERR
        return self._hand_over(queue, chain, lambda: self.disk.read(chain.writable_views(0, length), length, offset))

    def _write(self, queue: Queue, chain: Chain, sector: int, length: int) -> int:
        # 5.2.6.2: a read-only device fails every write.
        if self.disk.read_only or not self._inside(sector, length):
            return IOERR
        self.counters.writes += 1
        self.counters.bytes_written += length
        if not length:
            return OK
        offset, stable = sector * SECTOR, not self._writeback

        def write() -> None:
            self.disk.write(chain.readable_views(HEADER.size, length), length, offset, stable=stable)

        if stable or length >= LARGE:
            return self._hand_over(queue, chain, write)
        try:
            write()
        except OSError:
            return IOERR
        return OK

    def _flush(self, queue: Queue, chain: Chain) -> int:
        self.counters.flushes += 1
        return OK if self.disk.read_only else self._hand_over(queue, chain, self.disk.flush)

    def _get_id(self, chain: Chain) -> int:
        if chain.writable_bytes - 1 < ID_BYTES:
            return IOERR
        chain.write(self._id)
        return OK

    def _deallocate(self, queue: Queue, chain: Chain, kind: int, length: int) -> int:
        """DISCARD and WRITE_ZEROES: everything is checked before anything is done."""
        if not self.has(DISCARD if kind == T_DISCARD else WRITE_ZEROES):
            return IOERR if self.disk.read_only else UNSUPP
        if kind == T_DISCARD:
            limit, most, known = MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES, 0
        else:
            limit, most, known = MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_RANGES, UNMAP
        if not length or length % SEGMENT.size or length > most * SEGMENT.size:
            return IOERR
        ranges = list(SEGMENT.iter_unpack(chain.read(HEADER.size, length)))
        for sector, count, flags in ranges:
            # 5.2.6.2: a flag that the device does not know, and UNMAP in a discard.
            if flags & ~known:
                return UNSUPP
            if count > limit or not self._inside(sector, count * SECTOR):
                return IOERR
        self.counters.discards += 1

        def deallocate() -> None:
            for sector, count, flags in ranges:
                if kind == T_DISCARD and count:
                    self.disk.discard(sector * SECTOR, count * SECTOR)
                elif count:
                    self.disk.write_zeroes(sector * SECTOR, count * SECTOR, unmap=bool(flags & UNMAP))
            if not self._writeback:
                self.disk.flush()

        return self._hand_over(queue, chain, deallocate)

    # The worker.

    def _hand_over(self, queue: Queue, chain: Chain, carry_out: Callable[[], None]) -> int:
        self.counters.on_worker += 1
        self._worker.submit(_Job(queue, chain, carry_out))
        return LATER

    def _collect(self) -> None:
        """On the worker's thread."""
        with self.served():
            self._give_back()

    def _give_back(self) -> None:
        """Give back what the worker has done; the lock is held."""
        queues = []
        for job in self._worker.finished():
            if job.surprise is not None:
                raise job.surprise
            if self.active:
                self._finish(job.queue, job.chain, job.status)
                if job.queue not in queues:
                    queues.append(job.queue)
        for queue in queues:
            queue.signal()


@dataclass(slots=True)
class _Job:
    """A request that the worker carries out.

    ``carry_out`` makes its views of guest memory itself and lets go of them, so that between two jobs none is held.
    """

    queue: Queue
    chain: Chain
    carry_out: Callable[[], None]
    status: int = OK
    surprise: Exception | None = None


class _Worker:
    """A thread that carries jobs out, one after another; it starts with the first.

    It never takes the device's lock before a job's work is over, so that who holds the lock can wait for it.

    Args:
        name: of the thread.
        collect: called on the thread after each job.
    """

    def __init__(self, name: str, collect: Callable[[], None]) -> None:
        self._name = name
        self._collect = collect
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._done: deque[_Job] = deque()
        self._busy = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, job: _Job) -> None:
        with self._changed:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finished(self) -> list[_Job]:
        """The jobs that have been done since the last time."""
        with self._changed:
            done = list(self._done)
            self._done.clear()
            return done

    def drain(self) -> None:
        """Have every job done. The thread may be waiting for the lock that the caller holds, to give back what it has
        done: the caller carries out itself what has not begun."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._changed.wait_for(lambda: not self._busy)
                    return
                job = self._waiting.popleft()
            self._carry_out(job)

    def drop(self) -> None:
        """Forget every job; one that is being carried out is waited for."""
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._busy)
            self._done.clear()

    def close(self) -> None:
        """Drop what waits, and end the thread; the device's lock is not held."""
        with self._changed:
            self._waiting.clear()
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._busy = True
            self._carry_out(job)
            del job
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            self._collect()

    def _carry_out(self, job: _Job) -> None:
        try:
            job.carry_out()
        except OSError:
            job.status = IOERR
        except Exception as error:
            job.surprise = error
        with self._changed:
            self._done.append(job)
