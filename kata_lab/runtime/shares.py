"""What a sandbox shows of the host in the guest's shared directory, and how many need it."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from pathlib import Path

from kata_lab.hypervisor.base import Hypervisor
from kata_lab.resource.rootfs import SHARED
from kata_lab.runtime.completion import completed
from kata_lab.runtime.errors import RuntimeFault


@dataclass(slots=True)
class _Shared:
    name: str
    path: Path
    how: tuple[bool, bool]
    users: int = 0


class ShareTable:
    """The shared directory of one sandbox (:class:`kata_lab.resource.rootfs.Shares`).

    Args:
        hypervisor: whose VM has it.
    """

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._shares: dict[str, _Shared] = {}
        self._numbers = itertools.count(1)
        self._order = asyncio.Lock()
        #: The VM is gone, and with it everything that it was shown.
        self.over = False

    def __len__(self) -> int:
        return len(self._shares)

    async def share(self, name: str, path: Path, read_only: bool, override_stat: bool = False) -> str:
        """Make a directory or file of the host appear; returns its path in the guest.

        Raises:
            RuntimeFault: the name stands for something else.
            HypervisorError: there is nothing at ``path``, or it cannot be shared.
        """
        return await completed(self._share(name, path, (read_only, override_stat)))

    async def _share(self, name: str, path: Path, how: tuple[bool, bool]) -> str:
        async with self._order:
            shared = self._shares.get(name)
            if shared is None:
                # The guest may still remember a name that was used before, and what it led to.
                shared = _Shared(f"{name}.{next(self._numbers)}", path, how)
                await self._hypervisor.add_share(shared.name, path, *how)
                self._shares[name] = shared
            elif (shared.path, shared.how) != (path, how):
                raise RuntimeFault(f"the sandbox shares {str(shared.path)!r} as {name!r} already, in another way")
            shared.users += 1
        return f"{SHARED}/{shared.name}"

    async def unshare(self, name: str) -> None:
        """Undo one :meth:`share`."""
        await completed(self._unshare(name))

    async def _unshare(self, name: str) -> None:
        async with self._order:
            shared = self._shares[name]
            shared.users -= 1
            if not shared.users:
                del self._shares[name]
                if not self.over:
                    await self._hypervisor.remove_share(shared.name)
