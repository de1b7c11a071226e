"""The entropy device (virtio 1.2, section 5.4): it fills what the driver offers with the host's random numbers.

One queue; every buffer is writable and is filled wholly, up to 64 KiB. With a limit, a buffer gets the bytes that have
been earned, and waits while there are none: up to a second's worth is saved up.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from vmm.config import EntropyConfig
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Queue, QueueError

MAX_REQUEST: Final = 1 << 16  #: bytes given for one buffer; the driver asks again for more


class EntropyDevice(VirtioDevice):
    """A source of random numbers."""

    DEVICE_ID: ClassVar[int] = 4
    KIND: ClassVar[str] = "rng"

    def __init__(self, config: EntropyConfig) -> None:
        super().__init__(config.name)
        self._rate = config.bytes_per_second
        self._saved = float(self._rate)
        self._saved_at = time.monotonic()
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        #: Random bytes given to the guest.
        self.bytes_given = 0

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (64,)

    def notify(self, queue: Queue, index: int) -> None:
        if self._paused:
            return
        for chain in queue.chains():
            if not chain.writable_bytes or chain.readable_bytes:
                raise QueueError(f"a buffer of {self.name} must be one to write, this one has parts to read or none")
            length = min(chain.writable_bytes, MAX_REQUEST)
            if self._rate and (length := self._earned(length)) == 0:
                queue.rewind()
                self._wait(queue)
                break
            chain.write(os.urandom(length))
            chain.detail = f"{length} random bytes"
            queue.push(chain, length)
            self.bytes_given += length
        queue.signal()

    def _earned(self, wanted: int) -> int:
        now = time.monotonic()
        self._saved = min(self._saved + (now - self._saved_at) * self._rate, self._rate)
        self._saved_at = now
        given = min(wanted, int(self._saved))
        self._saved -= given
        return given

    def _wait(self, queue: Queue) -> None:
        loop = self.host.loop
        loop.call_soon_threadsafe(self._set_timer, queue)

    def _set_timer(self, queue: Queue) -> None:
        with self.served():
            if self.active and self._timer is None:
                self._timer = self.host.loop.call_later(max(1 / self._rate, 0.01), self._resume, queue)

    def _resume(self, queue: Queue) -> None:
        with self.served():
            self._timer = None
            if self.active:
                self.notify(queue, 0)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self.active:
            with self.served():
                self.notify(self.queues[0], 0)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def save_own(self) -> dict[str, Any]:
        return {"bytes_given": self.bytes_given}

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self.bytes_given = int(own["bytes_given"])
