"""What tests of several packages need: a guest that boots, and the programs that serve as referees."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from kata_lab.image.boot import BootGuest, build_boot_guest

PACKAGE_OF = {
    "dtc": "device-tree-compiler",
    "qemu-system-riscv64": "qemu-system-misc, or qemu-system-riscv since Debian 13",
    "qemu-riscv64-static": "qemu-user-static",
}


@pytest.fixture(scope="session")
def boot_guest() -> BootGuest:
    """The default guest, built once for all tests."""
    return build_boot_guest(progress="off")


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Finds a program; without it the test fails and says what to install, since a skipped referee judges nothing."""

    def find(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            pytest.fail(f"the program {name} is not installed: install the Debian package {PACKAGE_OF[name]}")
        return found

    return find
