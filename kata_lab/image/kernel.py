"""What an image takes out of a kernel package: the kernel, and the modules that it asks for with what they need.

Each module says in its ``.modinfo`` section which others it depends on (Linux 6.12, include/linux/module.h: strings
``depends=a,b``, NUL between them), so that the order of loading comes from the files themselves, not from depmod(8),
which only a maintainer script would run. A module may be compressed with xz; it goes into the image plain, since
unpacking costs a guest about 50 instructions a byte, and without its signature, since checking it costs as much again
(Documentation/admin-guide/module-signing.rst): the image's own hash covers it. What a kernel looks like is in
Documentation/arch/riscv/boot-image-header.rst and Documentation/arch/x86/boot.rst. Leaves out firmware and options.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

from kata_lab.errors import ImageError
from kata_lab.image.boot import kernel_image
from kata_lab.image.deb import DebPackage, PackagedFile
from kata_lab.image.module_symbols import without_unused_labels
from kata_lab.image.spool import Content, Spool, Spooled

FINIT_MODULE = {"riscv64": 273, "amd64": 313}
"""The number of the system call that loads a module, by architecture."""

_X86_MAGIC = b"HdrS"
_X86_MAGIC_OFFSET = 0x202
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_DETAILS = 12
_BUILT_IN = "/modules.builtin"
_MODULE_ENDINGS = (".ko", ".ko.xz", ".ko.gz")


class UnknownModuleError(ImageError):
    """The kernel has no module of this name; `known` are those that it has."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"the kernel has no module {name!r}")
        self.name = name
        self.known = known


@dataclass(frozen=True)
class Module:
    """A module on its way into an image: its path below ``usr/lib/modules/<release>``, and its content, unpacked."""

    name: str
    path: str
    content: Content
    depends: tuple[str, ...]
    aliases: tuple[str, ...] = ()


class KernelPackage:
    """A kernel package, read once: of the hundred megabytes that its modules have, none stay in memory.

    Args:
        package: the ``.deb`` file.
        architecture: as Debian names it.
        spool: where the kernel and its modules are kept; it must stay open for as long as this object is of use.

    Attributes:
        image: the kernel.
        release: its version, as ``uname -r`` prints it.

    Raises:
        ImageError: no kernel in it, or one of another architecture.
    """

    def __init__(self, package: Path, architecture: str, spool: Spool) -> None:
        self._spool = spool
        self._files: dict[str, tuple[str, Spooled]] = {}
        self._built_in: frozenset[str] = frozenset()
        image: Spooled | None = None
        with DebPackage(package) as opened:
            for file, chunks in opened.entries(_is_wanted):
                if file.kind != "file" or not _is_wanted(file):
                    continue
                if file.path.startswith("boot/"):
                    image = spool.add([_kernel(b"".join(chunks), f"{file.path} of {package.name}", architecture)])
                    self.release = file.path.partition("-")[2]
                elif file.path.endswith(_BUILT_IN):
                    lines = b"".join(chunks).decode("utf-8", "replace").split()
                    self._built_in = frozenset(module_name(line) for line in lines)
                else:
                    below = file.path.partition("lib/modules/")[2].partition("/")[2]
                    self._files[module_name(file.path)] = (below, spool.add(chunks))
        if image is None:
            raise ImageError(f"the package {package.name} holds no kernel: a file boot/vmlinuz-<version> was expected")
        self.image = image

    @property
    def loadable(self) -> frozenset[str]:
        """The names of the modules that have a file."""
        return frozenset(self._files)

    @property
    def built_in(self) -> frozenset[str]:
        """The names of the modules that are part of the kernel."""
        return self._built_in

    def modules(self, names: tuple[str, ...]) -> list[Module]:
        """These modules and all that they need, each after what it depends on; what is built in needs no file.

        Raises:
            UnknownModuleError: the kernel has no such module.
            ImageError: a module that cannot be read.
        """
        found: dict[str, Module] = {}

        def visit(name: str) -> None:
            if name in found or name in self._built_in:
                return
            if name not in self._files:
                raise UnknownModuleError(name, sorted((*self._files, *self._built_in)))
            path, packed = self._files[name]
            content = _unpacked(path, packed.read())
            depends, aliases = _modinfo(path, content)
            for needed in depends:
                visit(needed)
            plain = path.removesuffix(".xz").removesuffix(".gz")
            kept = self._spool.add([without_unused_labels(_without_signature(content))])
            found[name] = Module(name, plain, kept, tuple(each for each in depends if each in found), tuple(aliases))

        for name in names:
            visit(name)
        return list(found.values())


def dependency_file(modules: list[Module]) -> bytes:
    """What modprobe(8) reads as ``modules.dep``: each module with everything it needs, the nearest first."""
    by_name = {module.name: module for module in modules}
    lines = []
    for module in modules:
        needed: list[str] = []
        for name in module.depends:
            needed += [by_name[name].path, *_all_needed(by_name, name)]
        # What two others need comes after both: who loads from the end begins with it.
        once = reversed(dict.fromkeys(reversed(needed)))
        lines.append(f"{module.path}:{''.join(f' {path}' for path in once)}\n")
    return "".join(lines).encode()


def alias_file(modules: list[Module]) -> bytes:
    """What modprobe(8) reads as ``modules.alias``: the names by which the kernel itself asks for a module."""
    return "".join(f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases).encode()


def _all_needed(modules: dict[str, Module], name: str) -> list[str]:
    paths = []
    for each in modules[name].depends:
        paths += [modules[each].path, *_all_needed(modules, each)]
    return paths


def _is_wanted(file: PackagedFile) -> bool:
    if file.path.startswith(("boot/vmlinux-", "boot/vmlinuz-")):
        return True
    return is_module(file.path) or ("lib/modules/" in file.path and file.path.endswith(_BUILT_IN))


def is_module(path: str) -> bool:
    """Whether a path in a package is that of a module."""
    return "lib/modules/" in path and path.endswith(_MODULE_ENDINGS)


def module_name(path: str) -> str:
    """The name of the module with this path; the kernel takes ``-`` and ``_`` for the same."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _unpacked(path: str, data: bytes) -> bytes:
    try:
        if path.endswith(".xz"):
            return lzma.decompress(data)
        return gzip.decompress(data) if path.endswith(".gz") else data
    except (lzma.LZMAError, OSError, EOFError, zlib.error) as error:
        raise ImageError(f"the module {path} is damaged: it cannot be decompressed ({error})") from error


def _modinfo(path: str, content: bytes) -> tuple[list[str], list[str]]:
    """The modules that one depends on, and its aliases."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(content)).get_section_by_name(".modinfo")
        strings = section.data().decode("utf-8", "replace").split("\0") if section is not None else []
    except ELFError as error:
        raise ImageError(f"the module {path} is damaged: it is no ELF file ({error})") from error
    depends = next((text.removeprefix("depends=") for text in strings if text.startswith("depends=")), "")
    aliases = [text.removeprefix("alias=") for text in strings if text.startswith("alias=")]
    return [name.replace("-", "_") for name in depends.split(",") if name], aliases


def _without_signature(content: bytes) -> bytes:
    """A module without what was appended: a signature, its details (12 bytes, the last 4 its length), a magic text."""
    if not content.endswith(_SIGNATURE_MAGIC):
        return content
    end = len(content) - len(_SIGNATURE_MAGIC)
    length = int.from_bytes(content[end - 4 : end], "big")
    return content[: end - _SIGNATURE_DETAILS - length]


def _kernel(data: bytes, origin: str, architecture: str) -> bytes:
    """The kernel that a boot loader would load, once it is certain that it is one."""
    if architecture == "riscv64":
        return kernel_image(data, origin)
    found = data[_X86_MAGIC_OFFSET : _X86_MAGIC_OFFSET + 4]
    if found != _X86_MAGIC:
        raise ImageError(
            f"the kernel {origin} is not an x86 bzImage: bytes 514 to 517 are {found!r} and should be {_X86_MAGIC!r}"
        )
    return data
