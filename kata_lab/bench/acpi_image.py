"""The guest of the ACPI comparison: Debian's amd64 kernel, our init, and a program that follows the kernel's events.

Built by the builder of all images, from a description that is made here. The drivers are loaded at boot, so that what
is measured is hotplug and not the loading of modules; the kernel itself brings memory online, as movable, so that it
can be taken away again (Documentation/admin-guide/kernel-parameters.txt, ``memhp_default_state``; Linux 6.12).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import kata_lab
from kata_lab.image.boot import UNNEEDED_INITCALLS
from kata_lab.paths import cache_directory

if TYPE_CHECKING:
    from kata_lab.image.library import Image
    from kata_lab.progress import ProgressMode

NAME: Final = "acpi"
_WATCHER: Final = "/usr/lib/kata-lab/uevents.py"
_COMMAND_LINE: Final = " ".join(
    [
        "console=ttyS0",
        "quiet",
        "panic=-1",  # a panic resets, and QEMU is told to end then
        "cryptomgr.notests=1",
        "memhp_default_state=online_movable",
        f"initcall_blacklist={','.join(UNNEEDED_INITCALLS)}",
    ]
)


def acpi_image(progress: ProgressMode = "auto") -> Image:
    """The guest from the cache, built first if need be.

    Raises:
        ImageError: it cannot be built; see kata_lab.image.build.
    """
    from kata_lab.image.build import BuildOptions, build_image
    from kata_lab.image.description import parse_description

    lock = cache_directory() / "locks" / f"{NAME}.lock.json"
    return build_image(parse_description(_description(), NAME), BuildOptions(lock=lock, progress=progress))


def _description() -> dict[str, Any]:
    watcher = Path(kata_lab.__file__).parent / "guest" / "uevents.py"
    return {
        "name": NAME,
        "summary": "A guest for hotplug through ACPI and PCI, to compare with",
        "base": {"distribution": "debian", "suite": "trixie", "architecture": "amd64"},
        "kernel": {
            "package": "linux-image-amd64",
            "modules": ["virtio_pci", "virtio_blk", "virtiofs"],
            "command_line": _COMMAND_LINE,
        },
        "packages": ["micropython"],
        "exclude": {
            "packages": ["gcc-14-base"],
            "paths": ["/usr/share/**", "/usr/lib/*/*.a", "/usr/lib/*/gconv/**", "/etc/ld.so.conf.d/**"],
        },
        "files": {_WATCHER: {"text": watcher.read_text("utf-8")}},
        "users": [{"name": "root", "uid": 0, "home": "/root", "shell": "/bin/sh"}],
        "services": [{"name": "uevents", "command": ["/usr/bin/micropython", _WATCHER]}],
    }
