"""The commands of ``kata-lab``, one module each."""

from __future__ import annotations

from kata_lab.errors import KataLabError


class UsageError(KataLabError):
    """What was asked for cannot work as it was asked for; the process exits with 2."""
