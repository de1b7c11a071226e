"""What tests of several packages need: a guest that boots, and the programs that serve as referees."""

from __future__ import annotations

import faulthandler
import shutil
import sys
from collections.abc import Callable

import pytest

from kata_lab.image.boot import BootGuest, build_boot_guest

PACKAGE_OF = {
    "dtc": "device-tree-compiler",
    "qemu-system-riscv64": "qemu-system-misc, or qemu-system-riscv since Debian 13",
    "qemu-riscv64-static": "qemu-user-static",
}

END_SECONDS = 60.0  # that the process may take to end after its last test


def pytest_unconfigure() -> None:
    """A thread that a failed test left behind does not keep the process for ever: it is shown, and the process ends."""
    faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=sys.__stderr__)


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
