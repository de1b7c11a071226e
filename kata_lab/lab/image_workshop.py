"""A place where a notebook builds images of its own, which are gone when it is closed.

Locks are kept in a temporary directory. Names begin with ``lab-``, so that no image of the learner is replaced.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Final

from kata_lab.image.build import SERVICES_MARKER, BuildOptions, build_image
from kata_lab.image.description import parse_description
from kata_lab.image.library import Image, Library
from kata_lab.lab.machines import LabError
from vmm.config import VmConfig
from vmm.microvm import MicroVm

PREFIX: Final = "lab-"


class Workshop:
    """Builds images from plain data and owns them; close it in the end."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kata-lab-workshop-")
        self._built: set[str] = set()

    def build(self, data: dict[str, Any]) -> Image:
        """Build an image, or find that it is built already.

        Raises:
            ImageError: what :func:`kata_lab.image.description.parse_description` or
                :func:`kata_lab.image.build.build_image` refuses.
            LabError: its name does not begin with ``lab-``.
        """
        description = parse_description(data, "this description")
        if not description.name.startswith(PREFIX):
            raise LabError(f"the image is called {description.name!r}: in this notebook, names begin with {PREFIX!r}")
        lock = Path(self._directory.name) / f"{description.name}.lock.json"
        self._built.add(description.name)
        return build_image(description, BuildOptions(lock=lock))

    def close(self) -> None:
        """Remove the images that were built here, and their locks."""
        library = Library()
        for name in self._built & set(library.names()):
            library.remove(name)
        self._built.clear()
        self._directory.cleanup()


def seconds_to_services(image: Image, memory_mib: int, timeout: float = 170.0) -> float:
    """Boot an image in a machine of one hart, and pull the plug; seconds from the start until its services are up.

    Raises:
        ConsoleTimeout: they were not up in time.
    """
    config = VmConfig(kernel=image.kernel, initrd=image.root, cmdline=image.append, memory_mib=memory_mib)
    with MicroVm(config) as vm:
        began = time.monotonic()
        vm.start()
        vm.console.expect(SERVICES_MARKER, timeout=timeout)
        return time.monotonic() - began
