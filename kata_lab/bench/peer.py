"""The peer of the benchmarks: ``qemu-system-riscv64`` with its translator TCG, on the same kernel and the same loops.

The peer gets what our machine has and nothing that it can be told to leave out: as many harts, as much memory, the
serial port as its console, no network, no VGA. Its CPU is told to leave out the extensions that our hart has not
(bit manipulation, hypervisor, Sv57), so that both run the same code of the kernel. What cannot be left out is OpenSBI,
which QEMU's S-mode needs as ours needs the VMM, and a PCIe host bridge.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kata_lab.errors import KataLabError

PROGRAM = "qemu-system-riscv64"
CPU = "rv64,zba=off,zbb=off,zbc=off,zbs=off,h=off"


class PeerError(KataLabError):
    """The peer is not there, or does not do its part."""


def install_advice() -> str:
    """What to install to get the peer, for a person."""
    return "install the package qemu-system-misc (Debian 12, Ubuntu 24.04) or qemu-system-riscv (Debian 13 and later)"


@dataclass(frozen=True, slots=True)
class Peer:
    """An installed QEMU."""

    program: Path
    version: str

    @classmethod
    def find(cls, name: str = PROGRAM) -> Peer:
        """The QEMU of this machine.

        Raises:
            PeerError: there is none, or it does not run.
        """
        found = shutil.which(name)
        if found is None:
            raise PeerError(f"this machine has no {name} to measure against: {install_advice()}")
        told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        if told.returncode or not told.stdout:
            raise PeerError(f"{found} --version failed with status {told.returncode}: {install_advice()}")
        return cls(Path(found), told.stdout.splitlines()[0].removeprefix("QEMU emulator version ").strip())

    def boot_command(self, kernel: Path, initrd: Path, cmdline: str, memory_mib: int, harts: int = 1) -> Sequence[str]:
        """The command that boots a kernel with its console on standard input and output."""
        return (
            *self._machine(memory_mib, harts),
            *("-bios", "default", "-kernel", os.fspath(kernel), "-initrd", os.fspath(initrd), "-append", cmdline),
        )

    def program_command(self, program: Path, harts: int) -> Sequence[str]:
        """The command that runs a raw program on bare harts, from the beginning of RAM."""
        return *self._machine(64, harts), "-bios", "none", "-kernel", os.fspath(program)

    def _machine(self, memory_mib: int, harts: int) -> Sequence[str]:
        return (
            *(os.fspath(self.program), "-M", "virt", "-cpu", CPU, "-accel", "tcg,thread=multi"),
            *("-smp", str(harts), "-m", f"{memory_mib}M", "-nographic", "-net", "none", "-monitor", "none"),
        )
