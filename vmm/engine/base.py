"""The contract between an engine and the VMM: KVM_RUN's, for every engine.

A vCPU executes guest code until something needs the VMM and returns an :class:`Exit`. A read exit is completed by
``complete_read(value)`` before the next ``run()``; an SBI exit by ``complete_sbi(error, value)``.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class ExitReason(enum.IntEnum):
    """Why guest code stopped."""

    MMIO_READ = 1  #: a load from an address that is not memory: ``address``, ``width``
    MMIO_WRITE = 2  #: a store to an address that is not memory: ``address``, ``width``, ``value``
    SBI_CALL = 3  #: an ecall from S-mode: ``args`` holds a0..a7
    HALTED = 4  #: a WFI with no interrupt pending
    INTERRUPTED = 5  #: somebody asked the vCPU to come back
    BUDGET = 6  #: the given number of instructions has been retired
    SHUTDOWN = 7  #: the guest ended itself
    INTERNAL_ERROR = 8  #: a state that the engine must never reach
    STUCK = 9  #: the trap vector cannot be fetched, so that every fault leads to the next
    ENDLESS = 10  #: a jump to itself with interrupts off, which only another hart can end


class Exit(NamedTuple):
    """One return from guest code. ``width`` is in bytes; ``address`` is guest-physical."""

    reason: ExitReason
    address: int = 0
    width: int = 0
    value: int = 0
    args: tuple[int, ...] = ()
