"""The memory balloon (virtio 1.2, section 5.5): memory that the guest gives up goes back to the host.

Two ways lead there. The host sets a target (``num_pages``) and the driver fills its balloon: it allocates pages, so
that nobody in the guest can use them, and names them in the inflate queue; when the target sinks it takes pages back
and names them in the deflate queue. Or, with free page reporting, the driver names pages that happen to be free, a few
seconds after they became so, and may use them again as soon as it has the buffer back.

======  ==========  ==========================================================  ========================
queue   name        a buffer holds                                              negotiated with
======  ==========  ==========================================================  ========================
0       inflate     le32 page numbers (of 4096 bytes), to read                  always
1       deflate     le32 page numbers, to read                                  always
next    statistics  {le16 tag, le64 value} × n, to read; kept until asked for   VIRTIO_BALLOON_F_STATS_VQ
next    reporting   free pages themselves, as parts to write                    VIRTIO_BALLOON_F_PAGE_REPORTING
======  ==========  ==========================================================  ========================

Linux numbers the queues that it uses without gaps, the specification's table (5.5.2) has reporting as number 4: both
are served.

A page of the balloon reads as zeroes when the driver takes it back, which it may not rely on (5.5.6.1), and costs
memory once it is written. Pages reported are left alone if the driver wants to find another value than zero in them
(``poison_val``, 5.5.6.6).

A page number outside memory is ignored, for it gives nothing: the specification names no answer to it. A guest that
names pages in use, its kernel or the queues themselves, finds zeroes there, and has harmed itself only.

Left out: free page hinting (VIRTIO_BALLOON_F_FREE_PAGE_HINT), which is for migration; VIRTIO_BALLOON_F_MUST_TELL_HOST,
since a page that is used before it is deflated costs nothing but the count.
"""

from __future__ import annotations

import array
import asyncio
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmm.config import MIB, BalloonConfig
from vmm.devices.virtio.device import Host, VirtioDevice
from vmm.devices.virtio.queue import Chain, Queue, QueueError
from vmm.errors import ConfigError, StateError

STATISTICS: Final = 1 << 1  #: VIRTIO_BALLOON_F_STATS_VQ
DEFLATE_ON_OOM: Final = 1 << 2
PAGE_POISON: Final = 1 << 4
REPORTING: Final = 1 << 5  #: VIRTIO_BALLOON_F_PAGE_REPORTING

PAGE: Final = 4096  #: what page numbers count, whatever the guest's page size is
INFLATE, DEFLATE = 0, 1
SPECIFIED_REPORTING: Final = 4  #: the reporting queue's number in the specification's table

_SPACE: Final = struct.Struct("<IIII")  # num_pages, actual, free_page_hint_cmd_id, poison_val
_ACTUAL: Final = 4
_POISON: Final = 12
_STATISTIC: Final = struct.Struct("<HQ")
_STATISTICS_BYTES: Final = 64 * _STATISTIC.size

#: What a statistic's tag means (5.5.6.4), and those that Linux 6.12 added; sizes are bytes.
TAGS: Final = (
    "swapped_in",
    "swapped_out",
    "major_faults",
    "minor_faults",
    "free",
    "total",
    "available",
    "caches",
    "huge_pages_given",
    "huge_pages_failed",
    "oom_kills",
    "allocation_stalls",
    "background_scanned",
    "direct_scanned",
    "background_reclaimed",
    "direct_reclaimed",
)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the guest says of its memory.

    Attributes:
        at: host seconds (``time.monotonic``) when it said so.
        values: name, one of :data:`TAGS`, → bytes or events since the guest's boot. A guest leaves out what it does not
            count.
    """

    at: float
    values: Mapping[str, int]

    @classmethod
    def parse(cls, data: bytes) -> Statistics:
        """Read the driver's buffer; tags that nobody knows are left out."""
        whole = len(data) // _STATISTIC.size * _STATISTIC.size
        values = {TAGS[tag]: value for tag, value in _STATISTIC.iter_unpack(data[:whole]) if tag < len(TAGS)}
        return cls(time.monotonic(), values)


class BalloonDevice(VirtioDevice):
    """Takes memory back from a guest that is willing."""

    DEVICE_ID: ClassVar[int] = 5
    KIND: ClassVar[str] = "balloon"

    def __init__(self, config: BalloonConfig) -> None:
        super().__init__(config.name)
        self._config = config
        self._target = config.target_mib * MIB // PAGE
        self._actual = 0
        self._poison = 0
        self._paused = False
        self._services: dict[int, Callable[[Queue], None]] = {}
        self._statistics_queue: Queue | None = None
        self._held: Chain | None = None
        self._asked = False
        self._waiting: list[Future[Statistics]] = []
        self._timer: asyncio.TimerHandle | None = None
        #: Called, on any thread, after :attr:`actual_mib` changed.
        self.changed: Callable[[], None] = lambda: None
        #: What the guest said last of its memory, or None.
        self.statistics: Statistics | None = None
        #: Bytes given back to the host through the balloon; a page counts every time that it is.
        self.inflated_bytes = 0
        #: Bytes given back because the guest reported them to be free.
        self.reported_bytes = 0
        #: Page numbers outside memory that the driver named.
        self.ignored_pages = 0

    # What the host does with it, from any thread.

    @property
    def target_mib(self) -> int:
        """MiB that the guest shall give up."""
        return self._target * PAGE // MIB

    @property
    def actual_mib(self) -> int:
        """MiB that the guest says it has given up, at most its memory; it comes closer to the target bit by bit."""
        most = self._host.memory.size if self._host is not None else 0
        return min(self._actual * PAGE, most) // MIB

    def set_target(self, mib: int) -> None:
        """Ask the guest to give up ``mib`` MiB in all; it does so as far as it can, and in its own time.

        Raises:
            ConfigError: less than nothing, or more than its memory.
        """
        most = self._host.memory.size // MIB if self._host is not None else None
        if isinstance(mib, bool) or not isinstance(mib, int) or mib < 0 or (most is not None and mib > most):
            limit = f"from 0 to {most}, the guest's memory" if most is not None else "0 or more"
            raise ConfigError(f"the target of {self.name} is {mib} MiB, it must be a whole number {limit}")
        with self.lock:
            self._target = mib * MIB // PAGE
            self.config_changed()

    def request_statistics(self) -> Future[Statistics]:
        """Ask the guest for fresh statistics; in asyncio, await ``asyncio.wrap_future`` of what is returned.

        While the VM is paused the question waits.

        Raises:
            StateError: no driver is there, or none that knows statistics.
        """
        with self.lock:
            if not self.active or self._statistics_queue is None:
                raise StateError(f"{self.name} has no statistics yet, since no driver that sends them has started")
            future: Future[Statistics] = Future()
            future.set_running_or_notify_cancel()
            self._waiting.append(future)
            self._ask()
            return future

    # A virtio device.

    @property
    def features(self) -> int:
        # PAGE_POISON goes with reporting: a driver that poisons its free pages reports none without it.
        return (
            STATISTICS
            | (DEFLATE_ON_OOM if self._config.deflate_on_oom else 0)
            | (REPORTING | PAGE_POISON if self._config.free_page_reporting else 0)
        )

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (128,) * (SPECIFIED_REPORTING + 1 if self._config.free_page_reporting else 3)

    @property
    def config_space(self) -> bytes:
        return _SPACE.pack(self._target, self._actual, 0, self._poison)

    def write_config(self, offset: int, data: bytes) -> None:
        space = bytearray(self.config_space)
        space[offset : offset + len(data)] = data
        # 5.5.4: the driver writes these two.
        self._actual = int.from_bytes(space[_ACTUAL : _ACTUAL + 4], "little")
        if self._config.free_page_reporting:
            self._poison = int.from_bytes(space[_POISON : _POISON + 4], "little")
        self.changed()

    def connect(self, host: Host) -> None:
        if self._config.target_mib * MIB > host.memory.size:
            raise ConfigError(
                f"the target of {self.name} is {self._config.target_mib} MiB, it must be at most the guest's memory,"
                f" {host.memory.size // MIB} MiB"
            )
        super().connect(host)

    def activate(self) -> None:
        services: list[Callable[[Queue], None]] = [self._inflate, self._deflate]
        if self.has(STATISTICS):
            self._statistics_queue = self.queues[len(services)]
            services.append(self._take_statistics)
        if self.has(REPORTING):
            services.append(self._report)
        self._services = dict(enumerate(services))
        if self.has(REPORTING):
            self._services[SPECIFIED_REPORTING] = self._report
        if self._statistics_queue is not None and self._config.statistics_seconds:
            self.host.loop.call_soon_threadsafe(self._set_timer)

    def notify(self, queue: Queue, index: int) -> None:
        if index in self._services:
            self._services[index](queue)

    def deactivate(self) -> None:
        self._services = {}
        self._statistics_queue = self._held = None
        self._asked = False
        self._actual = self._poison = 0
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_exception(StateError(f"{self.name} got no statistics, since its driver was reset"))

    def pause(self) -> None:
        self._paused = True
        if self._held is not None and self._statistics_queue is not None:
            self._statistics_queue.rewind()
            self._held = None

    def resume(self) -> None:
        self._paused = False
        if self._waiting and self.active:
            with self.served():
                self._ask()

    def close(self) -> None:
        with self.lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_exception(StateError(f"{self.name} got no statistics, since its VM has ended"))

    def save_own(self) -> dict[str, Any]:
        return {
            "target": self._target,
            "actual": self._actual,
            "poison": self._poison,
            "inflated_bytes": self.inflated_bytes,
            "reported_bytes": self.reported_bytes,
            "ignored_pages": self.ignored_pages,
        }

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self._target, self._actual, self._poison = (int(own[name]) for name in ("target", "actual", "poison"))
        self.inflated_bytes, self.reported_bytes = int(own["inflated_bytes"]), int(own["reported_bytes"])
        self.ignored_pages = int(own["ignored_pages"])

    # Inflate and deflate (5.5.6.1).

    def _inflate(self, queue: Queue) -> None:
        for chain in queue.chains():
            released = 0
            for address, length in self._runs(self._page_numbers(chain)):
                released += self.host.memory.release(address, length)
            self.inflated_bytes += released
            chain.detail = f"{released >> 10} KiB given back"
            queue.push(chain, 0)
        queue.signal()

    def _deflate(self, queue: Queue) -> None:
        # Pages come back by being touched; there is nothing to do but to say that they may be.
        for chain in queue.chains():
            chain.detail = f"{len(self._page_numbers(chain)) * PAGE >> 10} KiB taken back"
            queue.push(chain, 0)
        queue.signal()

    def _page_numbers(self, chain: Chain) -> array.array[int]:
        numbers = array.array("I")
        length = chain.readable_bytes
        if chain.writable_bytes or length % numbers.itemsize or length > self.host.memory.size // PAGE * 4:
            raise QueueError(
                f"a buffer of {self.name} has {length} bytes to read and {chain.writable_bytes} to write, it must hold"
                " page numbers of 4 bytes to read, at most as many as memory has pages"
            )
        numbers.frombytes(chain.read())
        return numbers

    def _runs(self, numbers: array.array[int]) -> Iterator[tuple[int, int]]:
        """Ranges of memory, address and length, made of the pages that are neighbours; each page once."""
        memory = self.host.memory
        first, end = memory.base // PAGE, memory.end // PAGE
        start = stop = 0
        for number in sorted(numbers):
            if not first <= number < end:
                self.ignored_pages += 1
            elif number == stop:
                stop += 1
            elif number > stop or not stop:
                if stop:
                    yield start * PAGE, (stop - start) * PAGE
                start, stop = number, number + 1
        if stop:
            yield start * PAGE, (stop - start) * PAGE

    # Free page reporting (5.5.6.7).

    def _report(self, queue: Queue) -> None:
        wanted = self.has(PAGE_POISON) and self._poison
        for chain in queue.chains():
            released = 0
            if not wanted:
                for address, length in chain.writable:
                    released += self.host.memory.release(address, length)
            self.reported_bytes += released
            chain.detail = f"{released >> 10} of {chain.writable_bytes >> 10} KiB reported free given back"
            queue.push(chain, 0)
        queue.signal()

    # Statistics (5.5.6.4): the driver leaves a buffer with us; giving it back asks for a fresh one.

    def _take_statistics(self, queue: Queue) -> None:
        for chain in queue.chains():
            if self._held is not None:
                queue.push(self._held, 0)
            self._held = chain
            if self._asked:
                self._asked = False
                self._answer(Statistics.parse(chain.read(0, _STATISTICS_BYTES)))
            elif self._waiting:
                # The buffer that the driver begins with, which need not hold anything.
                queue.push(chain, 0)
                self._held, self._asked = None, True
        queue.signal()

    def _answer(self, statistics: Statistics) -> None:
        self.statistics = statistics
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_result(statistics)

    def _ask(self) -> None:
        queue = self._statistics_queue
        if queue is None or self._asked or self._paused:
            return
        # After a pause the buffer is still in the queue.
        chain = self._held or queue.pop()
        if chain is not None:
            self._held, self._asked = None, True
            queue.push(chain, 0)
            self._take_statistics(queue)

    def _set_timer(self) -> None:
        with self.lock:
            if self._timer is None and self.active:
                self._timer = self.host.loop.call_later(self._config.statistics_seconds, self._tick)

    def _tick(self) -> None:
        with self.served():
            self._timer = None
            if self.active:
                self._ask()
                self._set_timer()
