"""What a bundle carries besides wheels: guests, the image of containers, the compiled CPU; out of a cache and into one.

::

    images/NAME.tar.gz     an image as ``kata-lab image export`` writes it, the best-known form of it
    locks/NAME.lock.json   which packages it is made of: with it, it counts as built
    boot/RECIPE/           the boot guest: manifest.json  kernel  initrd
    oci/busybox/           an OCI image layout with the image busybox
    code/hart-*.o          the compiled CPU; on another kind of processor it is compiled anew instead

``python -m kata_lab.lab.bundle_content DIRECTORY`` takes them in; whatever is interrupted leaves whole things only.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kata_lab.errors import KataLabError
from kata_lab.image.build import build_named
from kata_lab.image.description import descriptions
from kata_lab.image.library import Library
from kata_lab.image.lock import Lock, lock_path, write_lock
from kata_lab.image.store import exclusive, publish, scratch, synced
from kata_lab.paths import cache_directory
from kata_lab.progress import Progress
from vmm.errors import VmmError

IMAGES: Final = ("lifsea", "toolbox")  #: that the notebooks need
IF_BUILT: Final = ("debian",)  #: large, and for one part of one notebook

_TAG: Final = "busybox:latest"


def prepare(images: Sequence[str] = IMAGES) -> None:
    """Build and compile now what the notebooks would else build and compile when they first need it.

    Raises:
        KataLabError: it cannot be built, or the disk is full.
        VmmError: the CPU cannot be compiled.
    """
    from kata_lab.image.boot import build_boot_guest
    from kata_lab.oci import ensure_busybox
    from vmm.engine.rv64.hart import Rv64Engine

    with Progress("Compiling the hart", total=1) as bar:
        Rv64Engine.prepare(bar.advance_to)
    build_boot_guest()
    for name in images:
        build_named(name)
    ensure_busybox().close()


def gather(directory: Path) -> None:
    """Write what a bundle carries, out of the cache; what the cache lacks is built first.

    Raises:
        KataLabError: it cannot be built, or the disk is full.
        VmmError: the CPU cannot be compiled.
    """
    from kata_lab.image.boot import build_boot_guest
    from vmm.engine.rv64.library import ensure

    library = Library()
    wanted = [*IMAGES, *(name for name in IF_BUILT if name in library.names())]
    prepare(wanted)
    for part in ("images", "locks", "boot", "code"):
        (directory / part).mkdir(parents=True)
    for name in wanted:
        library.export(name, directory / "images" / f"{name}.tar.gz")
        lock = lock_path(descriptions()[name])
        shutil.copyfile(lock, directory / "locks" / lock.name)
    boot = build_boot_guest().kernel.parent
    shutil.copytree(boot, directory / "boot" / boot.name)
    _gather_busybox(directory / "oci" / "busybox")
    code = ensure()
    shutil.copyfile(code, directory / "code" / code.name)


def _gather_busybox(layout: Path) -> None:
    from kata_lab.oci import ensure_busybox
    from kata_lab.oci.blobs import opened_blob
    from kata_lab.oci.writer import ImageWriter

    writer = ImageWriter(layout)
    with ensure_busybox() as handle:
        for each in (*handle.manifest.layers, handle.manifest.config, handle.descriptor):
            with opened_blob(handle.source, each) as reader:
                writer.blob(each.media_type, reader.read())
        writer.tag(replace(handle.descriptor, annotations={}), _TAG)


def take_in(directory: Path) -> None:
    """Put the guests of an unpacked bundle into this user's cache; the CPU is compiled if none fits.

    Raises:
        KataLabError: one is damaged, or the cache cannot be written to.
        VmmError: the CPU cannot be compiled.
    """
    from vmm.engine.rv64.library import ensure

    library = Library()
    known = descriptions()
    for file in sorted((directory / "images").glob("*.tar.gz")):
        library.import_file(file)
    for file in sorted((directory / "locks").glob("*.lock.json")):
        name = file.name.removesuffix(".lock.json")
        if name in known:
            write_lock(lock_path(known[name]), Lock.decode(file.read_bytes(), str(file)))
    for place in sorted((directory / "boot").glob("*/")):
        _take_boot_guest(place)
    if (directory / "oci" / "busybox").is_dir():
        from kata_lab.oci.library import import_image

        import_image(f"oci:{directory / 'oci' / 'busybox'}:{_TAG}", _TAG)
    for file in sorted((directory / "code").glob("hart-*.o")):
        _take_code(file)
    ensure()


def _take_boot_guest(source: Path) -> None:
    place = cache_directory() / "boot" / source.name
    with exclusive(place.parent), scratch(place.parent) as partial:
        new = partial / "new"
        shutil.copytree(source, new)
        for name, written in json.loads((new / "manifest.json").read_bytes())["files"].items():
            os.utime(new / name, ns=(written["mtime_ns"], written["mtime_ns"]))  # else it is hashed at each boot
            synced(new / name)
        publish(new, place)


def _take_code(file: Path) -> None:
    """Its name says for which processor and sources it is; under any other it is not found, and removed in time."""
    directory = cache_directory() / "code"
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{file.name}.{os.getpid()}.part"
    try:
        shutil.copyfile(file, partial)
        publish(partial, directory / file.name)
    finally:
        partial.unlink(missing_ok=True)


def main(directory: str) -> int:
    """Take in; its exit status."""
    try:
        take_in(Path(directory))
    except (KataLabError, VmmError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
