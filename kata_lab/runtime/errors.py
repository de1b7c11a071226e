"""Errors of the runtime."""

from __future__ import annotations

from kata_lab.errors import KataLabError


class RuntimeFault(KataLabError):
    """A sandbox, container or process that cannot do what was asked of it."""
