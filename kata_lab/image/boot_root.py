"""The small initramfs that mounts the disk with an image's root, and starts the init that is there.

It holds our init with MicroPython and the libraries that this needs, taken out of the image itself, and the modules
without which a disk cannot be read: the transport, virtio-blk, the file system, and overlay for directories that are
to be writable. A library is found as ld.so(8) does without a cache or search paths of programs: what an ELF file names
as NEEDED lies in ``/usr/lib/<multiarch>`` or ``/usr/lib`` (System V gABI 4.1, chapter 5). Leaves out disks in parts,
and roots found by label.
"""

from __future__ import annotations

import io
import json

from kata_lab.errors import ImageError
from kata_lab.image.cpio import Initramfs
from kata_lab.image.description import Description
from kata_lab.image.kernel import FINIT_MODULE, KernelPackage
from kata_lab.image.tree import RootTree

MULTIARCH = {"riscv64": "riscv64-linux-gnu", "amd64": "x86_64-linux-gnu"}
INIT = "usr/lib/kata-lab/init"
CONFIGURATION = "etc/kata-lab/init.json"

_MICROPYTHON = "usr/bin/micropython"
_C_LIBRARY = "libc.so.6"  # init opens it by name
_TRANSPORT = ("virtio_mmio", "virtio_blk")
_FILE_SYSTEMS = {"erofs": ("crc32c_generic", "erofs"), "ext4": ("crc32c_generic", "ext4")}  # checksums come first


def boot_root(tree: RootTree, description: Description, kernel: KernelPackage, init: bytes) -> Initramfs:
    """The initramfs for a root that is erofs or ext4.

    Args:
        tree: the root that will be on the disk.
        description: of the image.
        kernel: that has the modules.
        init: our init.

    Raises:
        ImageError: the image has no MicroPython, or lacks a library of it.
    """
    program = tree.read(_MICROPYTHON)
    if program is None:
        problem = "a root on a disk is mounted by the init of Kata Lab, which runs in MicroPython: add 'micropython'"
        raise description.refusal("$.packages", problem)
    small = Initramfs()
    for name in ("dev", "proc", "mnt"):
        small.directory(name)
    small.device("dev/console", "c", 5, 1)
    small.file(_MICROPYTHON, program, 0o755)
    for path, content in _libraries(tree, program, MULTIARCH[description.architecture]).items():
        small.file(path, content, 0o755)
    overlay = ("overlay",) if description.writable else ()
    names = (*_TRANSPORT, *_FILE_SYSTEMS[description.format], *overlay)
    paths = []
    for module in kernel.modules(tuple(name for name in names if name in kernel.loadable)):
        paths.append(f"/{module.name}.ko")
        small.file(f"{module.name}.ko", module.content)
    configuration = {
        "format": "initramfs",
        "modules": paths,
        "finit_module": FINIT_MODULE[description.architecture],
        "root": description.format,
    }
    small.file(CONFIGURATION, json.dumps(configuration, indent=1).encode() + b"\n")
    small.file(INIT, init, 0o755)
    small.symlink("init", f"/{INIT}")
    return small


def _libraries(tree: RootTree, program: bytes, multiarch: str) -> dict[str, bytes]:
    """Path → content of the loader and of every library that a program needs."""
    loader, waiting = _needed(program)
    if loader is None:
        return {}
    found = {loader: _content(tree, (loader,), loader)}
    waiting.append(_C_LIBRARY)
    done = {loader.rpartition("/")[2]}
    while waiting:
        name = waiting.pop()
        if name not in done:
            done.add(name)
            path = f"usr/lib/{multiarch}/{name}"
            found[path] = _content(tree, (path, f"usr/lib/{name}"), name)
            waiting += _needed(found[path])[1]
    return found


def _content(tree: RootTree, paths: tuple[str, ...], name: str) -> bytes:
    for path in paths:
        if (content := tree.read(path)) is not None:
            return content
    raise ImageError(f"the image has MicroPython but not {name}, which that needs: do not exclude the library")


def _needed(content: bytes) -> tuple[str | None, list[str]]:
    """The loader that an ELF file names (None for a static program), and the libraries."""
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    loader: str | None = None
    needed: list[str] = []
    if not content.startswith(b"\x7fELF"):
        return loader, needed
    for segment in ELFFile(io.BytesIO(content)).iter_segments():
        if isinstance(segment, InterpSegment):
            loader = segment.get_interp_name().lstrip("/")
        elif isinstance(segment, DynamicSegment):
            needed = [tag.needed for tag in segment.iter_tags("DT_NEEDED")]
    return loader, needed
