"""What tests in a real guest need: an image that boots with devices to a shell.

::

    def test_a_disk_is_there(toolbox: Boot) -> None:
        with toolbox(devices=[BlockConfig(path=disk)]) as (vm, shell):
            assert shell.run("test -b /dev/vda").status == 0
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeAlias

import pytest

from kata_lab.image.build import build_named
from kata_lab.image.library import Image
from kata_lab.shell import GuestShell, boot_image
from vmm.microvm import MicroVm

Boot: TypeAlias = Callable[..., AbstractContextManager[tuple[MicroVm, GuestShell]]]


@pytest.fixture(scope="session")
def toolbox_image() -> Image:
    """The image with tools, built once for all tests."""
    return build_named("toolbox", progress="off")


@pytest.fixture(scope="session")
def toolbox(toolbox_image: Image) -> Boot:
    """Boots the image with tools; takes what kata_lab.shell.boot_image() takes after the image."""
    return partial(boot_image, toolbox_image)
