"""What a notebook has opened, so that its last cell can close all of it.

A cell may be run again: a VM that is replaced is closed at once, while bare memories and engines stay until the end,
since a hart or a view of an earlier cell may still point into them.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Protocol, TypeVar

from kata_lab.errors import KataLabError


class Closable(Protocol):
    """Anything with a ``close`` that may be called twice."""

    def close(self) -> None: ...


ClosableT = TypeVar("ClosableT", bound=Closable)


class LabError(KataLabError):
    """A cell that was run before the one it builds on, or after its machine was closed."""


class Machines:
    """Owns memories, engines and VMs; a context manager."""

    def __init__(self) -> None:
        self._kept = contextlib.ExitStack()
        self._named: dict[str, Closable] = {}

    def keep(self, opened: ClosableT) -> ClosableT:
        """Own ``opened`` until :meth:`close`, which closes the latest first."""
        self._kept.callback(opened.close)
        return opened

    def replace(self, name: str, opened: ClosableT) -> ClosableT:
        """Own ``opened`` as ``name`` and close what had that name before."""
        before = self._named.pop(name, None)
        self._named[name] = opened
        if before is not None and before is not opened:
            before.close()
        return opened

    def close(self) -> None:
        """Close everything, the latest first; new things can be owned afterwards."""
        with self._kept.pop_all() as rest:
            while self._named:
                rest.callback(self._named.pop(next(iter(self._named))).close)

    def __enter__(self) -> Machines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
