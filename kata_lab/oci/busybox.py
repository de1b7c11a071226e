"""The image ``busybox``, made on this machine out of Debian's package busybox-static for riscv64, or for another
architecture: then it is called ``busybox-amd64``, say.

One layer: the program as ``/bin/busybox``, a link to it for every one of its applets, ``/etc/passwd`` and
``/etc/group``, and the directories of hier(7) that programs expect. The same package gives the same digest. The
applets' names are read out of the program itself, since it is for another machine than this.
"""

from __future__ import annotations

import re
from typing import Final

from kata_lab.errors import ImageError
from kata_lab.oci.image import ARCHITECTURE, ImageHandle, open_image
from kata_lab.oci.library import list_images, writing
from kata_lab.oci.writer import LayerArchive
from kata_lab.progress import ProgressMode

NAME: Final = "busybox"
PACKAGE: Final = "busybox-static"

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSWD: Final = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
nobody:x:65534:65534:nobody:/:/bin/false
"""
_GROUP: Final = """root:x:0:
daemon:x:1:
tty:x:5:
users:x:100:
nogroup:x:65534:
"""
_DIRECTORIES: Final = {
    **dict.fromkeys(("bin", "dev", "etc", "home", "lib", "mnt", "proc", "run", "sbin", "srv", "sys", "usr"), 0o755),
    **dict.fromkeys(("usr/bin", "usr/lib", "usr/sbin", "var", "var/lib", "var/log"), 0o755),
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
_APPLETS = re.compile(rb"((?:[a-z0-9\[_.-]{1,20}\0){150,600})\0")
_RECIPE_ANNOTATION: Final = "kata-lab.busybox.recipe"
_RECIPE: Final = "1"
"""Of what this module puts into the image; an image made by another one is made anew."""


def ensure_busybox(
    progress: ProgressMode = "auto", mirror: str | None = None, architecture: str = ARCHITECTURE
) -> ImageHandle:
    """The image from the local store, made first if need be; needs the network only for what the cache lacks.

    Args:
        progress: how to show the download.
        mirror: URI of a Debian archive; see find_mirror().
        architecture: of the machine that it is for, as Debian names it.

    Raises:
        ImageError: no APT, no network, or a package that does not verify; see apt.Archive.
    """
    name = _name(architecture)
    if any(each.name == f"{name}:latest" for each in list_images()):
        image = open_image(name, architecture)
        if image.manifest.annotations.get(_RECIPE_ANNOTATION, _RECIPE) == _RECIPE:  # ours, or imported by somebody
            return image
        image.close()
    build_busybox(progress, mirror, architecture)
    return open_image(name, architecture)


def _name(architecture: str) -> str:
    return NAME if architecture == ARCHITECTURE else f"{NAME}-{architecture}"


def build_busybox(progress: ProgressMode = "auto", mirror: str | None = None, architecture: str = ARCHITECTURE) -> str:
    """Make the image anew, and give it its name in the local store.

    Returns:
        the digest of its manifest.

    Raises:
        ImageError: as ensure_busybox().
    """
    from kata_lab.image.apt import Archive, PackageGoneError
    from kata_lab.image.deb import DebPackage

    archive = Archive(mirror, architecture=architecture, progress=progress)
    package = archive.find(PACKAGE)
    try:
        file = archive.fetch(package)
    except PackageGoneError:
        archive.update()
        package = archive.find(PACKAGE)
        file = archive.fetch(package)
    with DebPackage(file) as opened:
        program = next(
            (data for _, data in opened.contents(lambda each: each.path in ("bin/busybox", "usr/bin/busybox"))), None
        )
    if program is None:
        raise ImageError(f"the package {file.name} holds no bin/busybox")
    with writing() as writer:
        layer = writer.layer(_layer(program, file.name))
        image = writer.image(
            [layer],
            {"Env": [f"PATH={_PATH}"], "Cmd": ["sh"]},
            architecture=architecture,
            annotations={
                "org.opencontainers.image.title": NAME,
                "org.opencontainers.image.version": package.version,
                _RECIPE_ANNOTATION: _RECIPE,
            },
        )
        writer.tag(image, f"{_name(architecture)}:latest")
    return image.digest


def applets(program: bytes, origin: str = "busybox") -> list[str]:
    """The names of a busybox program's applets, sorted: its longest row of short names between NUL bytes.

    Raises:
        ImageError: it has no such row with ``sh`` and ``uname`` in it; `origin` names it in the message.
    """
    rows = (match[1].split(b"\0")[:-1] for match in _APPLETS.finditer(program))
    names = max((row for row in rows if b"sh" in row and b"uname" in row), key=len, default=[])
    if not names:
        raise ImageError(f"{origin} is no busybox that is understood: it has no list of applets")
    return sorted(name.decode() for name in names)


def _layer(program: bytes, origin: str) -> bytes:
    layer = LayerArchive()
    for path, mode in _DIRECTORIES.items():
        layer.directory(path, mode)
    layer.file("bin/busybox", program, 0o755)
    for name in applets(program, origin):
        if name != "busybox":
            layer.symlink(f"bin/{name}", "busybox")
    layer.file("etc/passwd", _PASSWD.encode())
    layer.file("etc/group", _GROUP.encode())
    return layer.finish()
