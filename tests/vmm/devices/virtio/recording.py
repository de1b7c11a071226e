"""Devices for tests of the contract: one that notes what happens to it, and gives every buffer back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Queue


class RecordingDevice(VirtioDevice):
    """Fills every buffer with a byte, up to 4096 bytes, and notes what its transport asks of it."""

    DEVICE_ID: ClassVar[int] = 42
    KIND: ClassVar[str] = "recording"
    FEATURES = 1 << 5 | 1 << 40
    FILL = b"\xa5"
    LIMIT = 4096

    def __init__(self, queues: int = 2) -> None:
        super().__init__()
        self.events: list[Any] = []
        self.space = bytearray(range(1, 15))
        self.hooks: dict[str, Callable[[], None]] = {}
        self._queue_sizes = (64,) * queues

    @property
    def features(self) -> int:
        return self.FEATURES

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return self._queue_sizes

    @property
    def config_space(self) -> bytes:
        self._happened("read config")
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        self._happened("write config", offset, data)

    def activate(self) -> None:
        self._happened("activate", self.accepted)

    def notify(self, queue: Queue, index: int) -> None:
        self._happened("notify", index)
        for chain in queue.chains():
            chain.read(0, self.LIMIT)
            queue.push(chain, chain.write(self.FILL * min(chain.writable_bytes, self.LIMIT)))
        queue.signal()

    def deactivate(self) -> None:
        self._happened("deactivate")

    def save_own(self) -> dict[str, Any]:
        return {"space": bytes(self.space)}

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self.space = bytearray(own["space"])

    def close(self) -> None:
        self._happened("close")

    def _happened(self, what: str, *details: Any) -> None:
        if what != "read config":
            self.events.append((what, *details) if details else what)
        if what in self.hooks:
            self.hooks[what]()
