"""The guest that boots: Debian's riscv64 kernel and an initramfs with busybox, built from packages and cached.

The kernel is the package's own, unmodified; the initramfs holds a static busybox and ``init.sh`` (beside this module).
A built guest lies in ``<cache>/boot/<recipe>/``, where the recipe is the hash of everything that this module puts in;
a new kernel in the archive does not change it, so that a workshop's machines stay alike until somebody asks for
``refresh``. Follows the kernel's Documentation/arch/riscv/boot-image-header.rst (6.12). Leaves out kernel modules and
the dependencies of packages: the guest is one program on one kernel.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kata_lab.errors import ImageError
from kata_lab.image.store import exclusive, publish, scratch, sha256_of, write_synced
from kata_lab.paths import cache_directory
from kata_lab.progress import ProgressMode

if TYPE_CHECKING:
    from kata_lab.image.apt import Archive, Package
    from kata_lab.image.library import Image
    from vmm.config import BlockConfig

USERLAND_MARKER = "kata-lab: userland is up"
"""The first line that the guest's userland prints."""

EXIT_STATUS = re.compile(r"^kata-lab: exit status (\d+)\s*$", re.MULTILINE)
"""The last line before the guest powers off: the exit status of its command or shell."""

LONGEST_COMMAND_LINE = 1023
"""Bytes of a kernel command line on riscv64 (COMMAND_LINE_SIZE less the final NUL)."""

UNNEEDED_INITCALLS = (
    "jent_mod_init",  # entropy from timing jitter: tested for 200 ms, while the host seeds the guest
    "load_system_certificate_list",  # keys of signed modules
    "bpf_tcp_ca_kfunc_init",  # TCP congestion control written in BPF
    "bpf_dummy_struct_ops_init",
    "init_msg_buckets",  # separate heaps against exploits of the guest's kernel; without them the common one serves
    "init_user_buckets",
    "init_kprobe_trace",  # tracing of the kernel and of block devices
    "init_blk_tracer",
    "slab_sysfs_init",  # /sys/kernel/slab
    "check_unaligned_access_all_cpus",  # measures the speed of misaligned access
)
APPEND = " ".join(
    [
        "console=ttyS0,115200n8r",  # with hardware flow control, so that no byte of a long paste is lost
        "quiet",  # no messages below warnings; before earlycon, which prints from here on
        "earlycon=sbi",  # a panic before there is a console is seen
        "panic=-1",  # a panic resets
        "init_on_alloc=0",  # the kernel does not clear memory for its own use, a sixth of what a packet costs
        "lsm=landlock",  # of the security modules that every system call asks, what a container itself can use
        "psi=0",  # no account of who waited for what at every switch of processes
        "cryptomgr.notests=1",  # no self-tests of every cipher
        f"initcall_blacklist={','.join(UNNEEDED_INITCALLS)}",
    ]
)
"""The kernel command line: nothing that a sandbox never needs."""

_KERNEL_PACKAGE = "linux-image-riscv64"
_BUSYBOX_PACKAGE = "busybox-static"
_FORMAT = 1
_IMAGE_MAGIC = b"RSC\x05"
_IMAGE_MAGIC_OFFSET = 56
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BootGuest:
    """A guest that is ready to boot.

    Args:
        kernel: file of the uncompressed RISC-V Image.
        initrd: file of the initramfs.
        append: kernel command line.
        release: version of the kernel, as ``uname -r`` prints it.
    """

    kernel: Path
    initrd: Path
    append: str = APPEND
    release: str = ""


@dataclass(frozen=True)
class BootSource:
    """What a VM is started with to boot an image.

    Args:
        kernel: file of the kernel.
        initrd: file of the initramfs.
        append: kernel command line.
        disks: that must come before all other devices.
    """

    kernel: Path
    initrd: Path
    append: str
    disks: tuple[BlockConfig, ...] = ()


def boot_source(image: Image) -> BootSource:
    """How an image boots.

    Raises:
        ImageError: it is for machines of another architecture.
    """
    architecture = image.manifest["architecture"]
    if architecture != "riscv64":
        raise ImageError(f"the image {image.name!r} is for {architecture}: boot one that is for riscv64")
    if image.initrd == image.root:
        return BootSource(image.kernel, image.initrd, image.append)
    from vmm.config import BlockConfig

    disk = BlockConfig(name="root", path=image.root, read_only=True, serial="kata-lab-root")
    return BootSource(image.kernel, image.initrd, image.append, (disk,))


def build_boot_guest(
    progress: ProgressMode = "auto", mirror: str | None = None, *, keyring: Path | None = None, refresh: bool = False
) -> BootGuest:
    """The boot guest from the cache, built first if need be; needs the network only for what the cache lacks.

    Args:
        progress: how to show downloads.
        mirror: URI of a Debian archive; see find_mirror().
        keyring: keys of that archive; see find_keyring().
        refresh: ask the archive for newer packages, even when a built guest is at hand.

    Raises:
        ImageError: no APT, no network, a package that does not verify or holds no kernel; see apt.Archive.
    """
    init = (Path(__file__).parent / "init.sh").read_bytes()
    place = cache_directory() / "boot" / _recipe(init)
    if not refresh and (guest := _load(place)) is not None:
        return guest
    with exclusive(place.parent):
        if not refresh and (guest := _load(place)) is not None:
            return guest
        _build(place, init, progress, mirror, keyring, refresh)
    guest = _load(place)
    if guest is None:
        raise ImageError(f"the guest built in {place} was changed by somebody else at once: build it again")
    return guest


def append_running(command: str, append: str = APPEND) -> str:
    """The kernel command line that makes the boot guest run a shell command and power off.

    Raises:
        ImageError: the result is longer than the kernel takes.
    """
    if command.isascii() and command.isprintable() and command and '"' not in command:
        line = f'{append} kata.run="{command}"'
    else:
        line = f"{append} kata.run.base64={base64.b64encode(command.encode()).decode()}"
    if len(line) > LONGEST_COMMAND_LINE:
        raise ImageError(
            f"the kernel command line would have {len(line)} bytes: it takes {LONGEST_COMMAND_LINE}, so the command "
            f"must be shorter than {len(command)} bytes or be typed to the console"
        )
    return line


def kernel_image(data: bytes, origin: str) -> bytes:
    """The uncompressed RISC-V Image in `data`, which may be compressed with gzip.

    Raises:
        ImageError: it is something else; `origin` names it in the message.
    """
    if data[:2] == b"\x1f\x8b":
        import gzip
        import zlib

        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ImageError(f"the kernel {origin} is damaged: it cannot be decompressed ({error})") from error
    if data[_IMAGE_MAGIC_OFFSET : _IMAGE_MAGIC_OFFSET + 4] != _IMAGE_MAGIC:
        raise ImageError(
            f"the kernel {origin} is not a RISC-V Image: bytes 56 to 59 are "
            f"{data[_IMAGE_MAGIC_OFFSET : _IMAGE_MAGIC_OFFSET + 4]!r} and should be {_IMAGE_MAGIC!r}"
        )
    return data


def _recipe(init: bytes) -> str:
    """What a built guest depends on, hashed: its packages by name, our own part by content."""
    parts = (str(_FORMAT).encode(), _KERNEL_PACKAGE.encode(), _BUSYBOX_PACKAGE.encode(), init)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _load(place: Path) -> BootGuest | None:
    """The guest that lies in `place`, or None when it is absent or not as it was written."""
    try:
        manifest: dict[str, Any] = json.loads((place / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            return None
        for name, written in manifest["files"].items():
            if not _is_intact(place / name, written):
                return None
        return BootGuest(place / "kernel", place / "initrd", APPEND, manifest["release"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_intact(path: Path, written: dict[str, Any]) -> bool:
    """Size and time are as they were written; a file with another time (a copied cache) is hashed."""
    found = path.stat()
    if found.st_size != written["size"]:
        return False
    return bool(found.st_mtime_ns == written["mtime_ns"] or sha256_of(path) == written["sha256"])


def _build(
    place: Path, init: bytes, progress: ProgressMode, mirror: str | None, keyring: Path | None, refresh: bool
) -> None:
    from kata_lab.image.apt import Archive, PackageGoneError
    from kata_lab.progress import Progress

    archive = Archive(mirror, keyring=keyring, progress=progress)
    if refresh:
        archive.update()
    try:
        packages = _fetch(archive)
    except PackageGoneError:
        archive.update()
        packages = _fetch(archive)
    with Progress("Building the boot guest", total=3, mode=progress) as bar, scratch(place.parent) as partial:
        (kernel_package, kernel_file), (busybox_package, busybox_file) = packages
        kernel, release = _extract_kernel(kernel_file)
        bar.advance(1, "kernel")
        initrd = _initramfs(busybox_file, init)
        bar.advance(1, "initramfs")
        new = partial / place.name
        new.mkdir()
        files: dict[str, dict[str, object]] = {}
        for name, data in (("kernel", kernel), ("initrd", initrd)):
            write_synced(new / name, data)
            files[name] = {
                "size": len(data),
                "mtime_ns": (new / name).stat().st_mtime_ns,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        manifest = {
            "format": _FORMAT,
            "release": release,
            "files": files,
            "packages": [
                {"name": package.name, "version": package.version, "sha256": package.sha256}
                for package in (kernel_package, busybox_package)
            ],
        }
        write_synced(new / _MANIFEST, json.dumps(manifest, indent=1).encode())
        publish(new, place)


def _fetch(archive: Archive) -> tuple[tuple[Package, Path], tuple[Package, Path]]:
    """The real kernel package, which the metapackage depends on, and busybox."""
    metapackage = archive.find(_KERNEL_PACKAGE)
    match = re.search(r"\blinux-image-\d\S*", metapackage.depends)
    if match is None:
        raise ImageError(
            f"the package {_KERNEL_PACKAGE} {metapackage.version} depends on {metapackage.depends!r}: "
            "it should depend on a package linux-image-<version>"
        )
    kernel = archive.find(match[0])
    busybox = archive.find(_BUSYBOX_PACKAGE)
    return (kernel, archive.fetch(kernel)), (busybox, archive.fetch(busybox))


def _extract_kernel(package: Path) -> tuple[bytes, str]:
    """The Image and its release, out of ``boot/vmlinux-<release>`` (riscv64) or ``boot/vmlinuz-<release>``."""
    from kata_lab.image.deb import DebPackage

    with DebPackage(package) as opened:
        for file, content in opened.contents(lambda file: file.path.startswith("boot/vmlinu")):
            return kernel_image(content, f"{file.path} of {package.name}"), file.path.partition("-")[2]
    raise ImageError(f"the package {package.name} holds no kernel: a file boot/vmlinux-<version> was expected")


def _initramfs(busybox: Path, init: bytes) -> bytes:
    from kata_lab.image.cpio import Initramfs
    from kata_lab.image.deb import DebPackage

    with DebPackage(busybox) as package:
        program = next(
            (content for _, content in package.contents(lambda file: file.path in ("bin/busybox", "usr/bin/busybox"))),
            None,
        )
    if program is None:
        raise ImageError(f"the package {busybox.name} holds no bin/busybox")
    root = Initramfs()
    for directory in ("dev", "proc", "sys", "root", "run", "etc"):
        root.directory(directory)
    root.directory("tmp", 0o1777)
    root.device("dev/console", "c", 5, 1)
    root.file("init", init, 0o755)
    root.file("bin/busybox", program, 0o755)
    return root.pack()
