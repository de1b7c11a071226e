"""Configuration of a virtual machine: frozen, checked when it is made, and strict about names.

A mistyped field is refused with the field that was probably meant, since a setting that is silently ignored is the most
expensive kind of mistake. Only what certainly cannot work is refused here: whether a kernel needs more memory than it
got shows when it is loaded (the image does not fit) or when it boots (its panic is reported).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vmm.errors import ConfigError

MIB = 1 << 20
MAX_VCPUS = 32
MAX_MEMORY_MIB = 1 << 20
MAX_CMDLINE_BYTES = 1023
"""Linux on riscv64 has COMMAND_LINE_SIZE = 1024 bytes for a command line with its final zero; it cuts off the rest."""

DEFAULT_CMDLINE = "console=ttyS0 panic=-1"
CLOCKS = ("real", "deterministic")

_C = TypeVar("_C", "VmConfig", "ConsoleConfig")


def _from_dict(cls: type[_C], what: str, values: Mapping[str, Any]) -> _C:
    names = [each.name for each in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(names)}"
            raise ConfigError(f"{what} has no field {name!r}: {hint}")
    return cls(**values)


def _require_int(name: str, value: object, low: int, high: int, unit: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}, it must be a whole number from {low} to {high}{unit}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}, it must be from {low} to {high}{unit}")


def _require_path(name: str, value: object) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return Path(os.fspath(value))
    raise ConfigError(f"{name} is {value!r}, it must be the path of a file, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleConfig:
    """The guest's console.

    Attributes:
        limit_bytes: how much of its output is kept; what is older is forgotten.
        report_lines: how many of its last lines a crash report quotes.
        milestones: name → regular expression; the first console line that matches is recorded in the VM's trace,
            with the host time and the instructions retired until then.
    """

    limit_bytes: int = 4 * MIB
    report_lines: int = 40
    milestones: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_int("console limit_bytes", self.limit_bytes, 4096, 1 << 30, " bytes")
        _require_int("console report_lines", self.report_lines, 0, 10_000)
        if not isinstance(self.milestones, Mapping) or not all(
            isinstance(part, str) for pair in self.milestones.items() for part in pair
        ):
            raise ConfigError(f"console milestones is {self.milestones!r}, it must map names to regular expressions")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConsoleConfig:
        """Build from plain data; :class:`~vmm.errors.ConfigError` on an unknown field or a bad value."""
        return _from_dict(cls, "a console configuration", values)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """Everything that decides what a VM is before it starts.

    Attributes:
        vcpus: harts, 1 to 32. The deterministic clock needs exactly 1.
        memory_mib: guest RAM in MiB. A stock Debian kernel for riscv64 boots with 80 and panics with 64.
        kernel: path of a RISC-V ``Image`` or ELF file.
        initrd: path of an initial RAM file system, or None.
        cmdline: the kernel's command line.
        clock: ``"real"`` (guest time is host time) or ``"deterministic"`` (guest time comes from retired
            instructions, idle time is skipped, every boot is the same).
        console: see :class:`ConsoleConfig`; plain data is accepted too.
        trace: count and time every exit by kind, device and SBI call from the first instruction on.

    Raises:
        ConfigError: a value that certainly cannot work, in one sentence.
    """

    vcpus: int = 1
    memory_mib: int = 256
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = DEFAULT_CMDLINE
    clock: str = "real"
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    trace: bool = False

    def __post_init__(self) -> None:
        _require_int("vcpus", self.vcpus, 1, MAX_VCPUS)
        _require_int("memory_mib", self.memory_mib, 1, MAX_MEMORY_MIB, " MiB")
        object.__setattr__(self, "kernel", _require_path("kernel", self.kernel))
        object.__setattr__(self, "initrd", _require_path("initrd", self.initrd))
        if not isinstance(self.cmdline, str) or "\0" in self.cmdline or "\n" in self.cmdline:
            raise ConfigError(f"cmdline is {self.cmdline!r}, it must be one line, without zero bytes")
        if (length := len(self.cmdline.encode())) > MAX_CMDLINE_BYTES:
            raise ConfigError(f"cmdline has {length} bytes, Linux keeps at most {MAX_CMDLINE_BYTES}")
        if self.clock not in CLOCKS:
            raise ConfigError(f"clock is {self.clock!r}, it must be 'real' or 'deterministic'")
        if self.clock == "deterministic" and self.vcpus > 1:
            raise ConfigError(
                f"the deterministic clock needs vcpus = 1, not {self.vcpus}, since parallel harts have no one order"
            )
        if isinstance(self.console, Mapping):
            object.__setattr__(self, "console", ConsoleConfig.from_dict(self.console))
        if not isinstance(self.console, ConsoleConfig):
            raise ConfigError(f"console is {self.console!r}, it must be a ConsoleConfig")
        if not isinstance(self.trace, bool):
            raise ConfigError(f"trace is {self.trace!r}, it must be True or False")

    @property
    def memory_bytes(self) -> int:
        """Guest RAM in bytes."""
        return self.memory_mib * MIB

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VmConfig:
        """Build from plain data (a YAML or JSON mapping).

        Raises:
            ConfigError: an unknown field, with the one that was probably meant, or a bad value.
        """
        return _from_dict(cls, "a VM configuration", values)

    def replace(self, **changes: Any) -> VmConfig:
        """A copy with ``changes``, checked like a new one."""
        kept = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return self.from_dict({**kept, **changes})
