"""The time line of hotplugs, asked of a VMM in a process of its own: what :attr:`vmm.MicroVm.hotplugs` is in the same.

All times are of the host's monotonic clock, which its processes have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.actions import VmmAction
from vmm.hotplug import HotplugRecord


@dataclass(frozen=True, slots=True)
class Hotplugs:
    """What was hot-plugged, oldest first."""

    records: tuple[HotplugRecord, ...]


@dataclass(frozen=True, slots=True)
class ReadHotplugs(VmmAction[Hotplugs]):
    """Ask for it at once, without waiting for the actions before."""
