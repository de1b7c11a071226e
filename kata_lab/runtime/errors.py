"""Errors of the runtime."""

from __future__ import annotations

from kata_lab.errors import KataLabError


class RuntimeFault(KataLabError):
    """A sandbox, container or process that cannot do what was asked of it."""


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first in a group of tasks; the others follow from it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
