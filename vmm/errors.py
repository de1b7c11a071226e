"""Errors of the virtual machine monitor.

::

    VmmError
    ├── ConfigError          a configuration that cannot be carried out
    ├── GuestAddressError    an address range outside guest memory
    ├── BusError             an address at which no device answers
    ├── BootError            a kernel, initrd or device tree that cannot be loaded
    ├── StateError           an action that the VM's present state does not allow
    ├── EngineError          the engine could not be built or is in an impossible state
    └── ConsoleTimeout       the awaited text did not appear on the console

Every message is one sentence: what was wrong, the value, and what would be right.
"""

from __future__ import annotations


class VmmError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(VmmError):
    """A configuration that cannot be carried out."""


class GuestAddressError(VmmError):
    """A guest-physical range that is not wholly inside guest memory."""


class BusError(VmmError):
    """A guest-physical address at which no device answers."""


class BootError(VmmError):
    """A kernel, initrd or device tree that cannot be loaded."""


class StateError(VmmError):
    """An action that the VM's present state does not allow."""


class EngineError(VmmError):
    """The engine could not be built, or reached a state that it must never reach."""


class ConsoleTimeout(VmmError):
    """The awaited text did not appear on the console in time."""
