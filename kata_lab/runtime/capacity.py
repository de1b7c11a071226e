"""How large a running sandbox is, and what is plugged into it: vCPUs, memory and devices that come and go.

A sandbox has what its configuration says, or what :meth:`Capacity.resize` said since: its floor. Where its maxima
allow more, it follows the limits of its containers (:mod:`kata_lab.resource.sizing`): it grows before a container
comes, since that container may need it at once, and shrinks after one has gone. What cannot be given fails the
container; what cannot be taken back stays, and is tried again the next time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from kata_lab.errors import KataLabError
from kata_lab.hypervisor.base import Hypervisor
from kata_lab.resource.sizing import SandboxSize, size_for
from kata_lab.runtime.completion import completed
from kata_lab.runtime.errors import RuntimeFault
from vmm.config import DeviceConfig


class Capacity:
    """Of one sandbox. Changes are made one after the other.

    Args:
        size: what it begins with, its floor.
        most: what it may have at most.
        hypervisor: who runs its VM.
        log: of the sandbox.
    """

    def __init__(
        self,
        size: SandboxSize,
        most: SandboxSize,
        hypervisor: Hypervisor,
        log: logging.Logger | logging.LoggerAdapter[Any],
    ) -> None:
        self._floor = self._size = size
        self.most = most
        self._hypervisor = hypervisor
        self._log = log
        self._order = asyncio.Lock()
        self.plugged: dict[str, DeviceConfig] = {}

    @property
    def size(self) -> SandboxSize:
        """What it has now."""
        return self._size

    async def resize(
        self, vcpus: int | None, memory_mib: int | None, specs: Iterable[Mapping[str, Any]]
    ) -> SandboxSize:
        """Have another floor; see :meth:`kata_lab.runtime.sandbox.Sandbox.resize`."""
        floor = SandboxSize(
            self._floor.vcpus if vcpus is None else _checked("vcpus", vcpus, self.most.vcpus),
            self._floor.memory_mib if memory_mib is None else _checked("memory_mib", memory_mib, self.most.memory_mib),
        )
        return await completed(self._change(floor, specs))

    async def admit(self, specs: Iterable[Mapping[str, Any]]) -> None:
        """Grow, if that is needed for containers with these configurations.

        Raises:
            RuntimeFault: the guest cannot be given it; it is as before.
        """
        if self._size != self.most:
            await self._follow(specs, shrink=False)

    async def settle(self, specs: Iterable[Mapping[str, Any]]) -> None:
        """Be as large as is needed for these containers. What the guest does not give up stays."""
        if self._floor != self.most:
            try:
                await self._follow(specs, shrink=True)
            except KataLabError as error:
                self._log.warning("not resized", extra={"reason": str(error)})

    async def _follow(self, specs: Iterable[Mapping[str, Any]], *, shrink: bool) -> None:
        async with self._order:
            wanted = self._wanted(self._floor, specs)
            if not shrink:
                wanted = _larger(wanted, self._size)
            await self._apply(wanted)

    async def _change(self, floor: SandboxSize, specs: Iterable[Mapping[str, Any]]) -> SandboxSize:
        async with self._order:
            await self._apply(self._wanted(floor, specs))
            self._floor = floor
            return self._size

    def _wanted(self, floor: SandboxSize, specs: Iterable[Mapping[str, Any]]) -> SandboxSize:
        wanted = _larger(size_for(specs), floor)
        return SandboxSize(min(wanted.vcpus, self.most.vcpus), min(wanted.memory_mib, self.most.memory_mib))

    async def _apply(self, wanted: SandboxSize) -> None:
        """Change what differs, all of it or nothing."""
        before = self._size
        if wanted == before:
            return
        try:
            await self._set(wanted)
        except KataLabError as error:
            # Whatever the first half did; where that cannot be undone, the size says what there is.
            with contextlib.suppress(KataLabError):
                await self._set(before)
            raise RuntimeFault(
                f"the sandbox cannot have {wanted.vcpus} vCPUs and {wanted.memory_mib} MiB: {error}"
            ) from error
        self._log.info("resized", extra={"vcpus": wanted.vcpus, "memory_mib": wanted.memory_mib})

    async def _set(self, wanted: SandboxSize) -> None:
        if wanted.vcpus != self._size.vcpus:
            vcpus = await self._hypervisor.resize_vcpu(wanted.vcpus)
            self._size = SandboxSize(vcpus, self._size.memory_mib)
        if wanted.memory_mib != self._size.memory_mib:
            memory_mib = await self._hypervisor.resize_memory(wanted.memory_mib)
            self._size = SandboxSize(self._size.vcpus, memory_mib)

    async def add_device(self, device: DeviceConfig) -> str:
        """See :meth:`kata_lab.runtime.sandbox.Sandbox.add_device`."""
        return await completed(self._plug(device))

    async def _plug(self, device: DeviceConfig) -> str:
        name = await self._hypervisor.add_device(device)
        self.plugged[name] = device
        return name

    async def remove_device(self, name: str) -> None:
        """See :meth:`kata_lab.runtime.sandbox.Sandbox.remove_device`."""
        if name not in self.plugged:
            known = ", ".join(self.plugged) or "none"
            raise RuntimeFault(f"no device {name!r} was plugged into the sandbox while it ran; there is {known}")
        await completed(self._unplug(name))

    async def _unplug(self, name: str) -> None:
        await self._hypervisor.remove_device(name)
        self.plugged.pop(name, None)


def _larger(one: SandboxSize, other: SandboxSize) -> SandboxSize:
    return SandboxSize(max(one.vcpus, other.vcpus), max(one.memory_mib, other.memory_mib))


def _checked(name: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RuntimeFault(f"{name} is {value!r}, it must be a whole number from 1 to the sandbox's max_{name}, {most}")
    return value
