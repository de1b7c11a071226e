"""Which modules a kernel has, known before its package is fetched, so that a wrong name costs no download.

What is known, in this order:

1. The list of exactly this kernel package (by its hash): written to the cache whenever a kernel is unpacked, and beside
   this module (``kernels/<architecture>.modules``, copied from a cache) for the kernel that Debian had at that time.
2. A name that the kernel beside this module has is taken for good: the next kernel will have it, too.
3. Any other name is looked for in the archive's index Contents, which names the files of this kernel package.

When the archive has no Contents, or an older one without this package, nothing is refused here; nor is it when the
package is in the cache already. The package itself has the last word in every case, when it is unpacked
(:mod:`kata_lab.image.kernel`). Contents does not say what is built into a kernel, so that a name which became a
built-in module after the list beside this module was made, and was no module before, is refused as long as the package
is not in the cache; a description has no use for such a name, since nothing is to be loaded.

A list is a paragraph of deb822(5) with the fields Release, Package-SHA256, Loadable, Built-In, and SHA256 (of the
names, so that a damaged list is no list).
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kata_lab.image.apt import Archive, Package
from kata_lab.image.deb import parse_fields
from kata_lab.image.description import Description, DescriptionError, did_you_mean
from kata_lab.image.kernel import KernelPackage, is_module, module_name
from kata_lab.image.store import exclusive, publish, scratch, write_synced
from kata_lab.paths import cache_directory
from kata_lab.progress import ProgressMode

_ENDING = ".modules"
_KERNELS = Path(__file__).parent / "kernels"
_WIDTH = 120


@dataclass(frozen=True)
class ModuleNames:
    """The modules of one kernel.

    Attributes:
        release: the kernel's version, as ``uname -r`` prints it.
        package_sha256: of the kernel package, in hexadecimal.
        loadable: modules that have a file.
        built_in: modules that are part of the kernel.
    """

    release: str
    package_sha256: str
    loadable: frozenset[str]
    built_in: frozenset[str]

    def encode(self) -> bytes:
        """As a file; equal names give equal bytes."""
        fields = {"Release": self.release, "Package-SHA256": self.package_sha256, "SHA256": self._digest()}
        lines = [f"{name}: {value}\n" for name, value in fields.items()]
        for name, modules in (("Loadable", self.loadable), ("Built-In", self.built_in)):
            words = textwrap.fill(" ".join(sorted(modules)), _WIDTH, initial_indent=" ", subsequent_indent=" ")
            lines.append(f"{name}:\n{words}\n" if modules else f"{name}:\n")
        return "".join(lines).encode()

    @classmethod
    def decode(cls, data: bytes) -> ModuleNames | None:
        """The names in a file; None when it is no such file, or damaged."""
        fields = parse_fields(data.decode("utf-8", "replace"))
        try:
            names = cls(
                fields["Release"],
                fields["Package-SHA256"],
                frozenset(fields["Loadable"].split()),
                frozenset(fields["Built-In"].split()),
            )
        except KeyError:
            return None
        return names if names._digest() == fields.get("SHA256") else None

    def _digest(self) -> str:
        parts = (self.release, self.package_sha256, " ".join(sorted(self.loadable)), " ".join(sorted(self.built_in)))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def familiar_names(architecture: str) -> ModuleNames | None:
    """The modules of the kernel that Debian had when the list beside this module was made."""
    return _read(_KERNELS / f"{architecture}{_ENDING}")


def check_module_names(description: Description, kernel: Package, archive: Archive) -> None:
    """Find out that a kernel package has every module of a description, as far as that can be known without it.

    Args:
        description: the one with the names.
        kernel: the package, not a metapackage that depends on it.
        archive: that has the package.

    Raises:
        DescriptionError: the kernel has no module of that name.
        ImageError: the archive's index Contents is needed, and cannot be fetched or does not verify.
    """
    wanted = (*description.modules, *description.modules_on_demand)
    familiar = familiar_names(description.architecture)
    for names in (_read(_place(kernel.sha256)), familiar):
        if names is not None and names.package_sha256 == kernel.sha256:
            _refuse_unknown(description, wanted, names.loadable | names.built_in, names.release)
            return
    taken = frozenset[str]() if familiar is None else familiar.loadable | familiar.built_in
    unfamiliar = [name for name in wanted if name not in taken]
    if not unfamiliar:
        return
    paths = archive.paths_of(kernel.name)
    listed = {module_name(path) for path in paths or () if is_module(path)}
    if listed:
        built_in = frozenset[str]() if familiar is None else familiar.built_in
        _refuse_unknown(description, unfamiliar, built_in | listed, kernel.name.removeprefix("linux-image-"))


def remember_module_names(package: Package, kernel: KernelPackage, progress: ProgressMode = "auto") -> None:
    """Keep the list of an unpacked kernel in the cache; it stays when the package is removed from there.

    Raises:
        ImageError: the cache cannot be written to.
    """
    names = ModuleNames(kernel.release, package.sha256, kernel.loadable, kernel.built_in)
    place = _place(package.sha256)
    if _read(place) == names:
        return
    with exclusive(place.parent, progress), scratch(place.parent) as partial:
        write_synced(partial / place.name, names.encode())
        publish(partial / place.name, place)


def unknown_module(description: Description, name: str, known: Sequence[str], release: str) -> DescriptionError:
    """The error that says that a kernel has no module of this name; `known` are those that it has."""
    problem = f"kernel {release} has no module {name!r}: {did_you_mean(name, known)}"
    for field in ("modules", "modules_on_demand"):
        names: tuple[str, ...] = getattr(description, field)
        if name in names:
            return description.refusal(f"$.kernel.{field}[{names.index(name)}]", problem)
    return description.refusal("$.kernel.package", problem)


def _refuse_unknown(description: Description, names: Sequence[str], known: frozenset[str], release: str) -> None:
    for name in names:
        if name not in known:
            raise unknown_module(description, name, sorted(known), release)


def _place(sha256: str) -> Path:
    return cache_directory() / "modules" / f"{sha256}{_ENDING}"


def _read(place: Path) -> ModuleNames | None:
    try:
        return ModuleNames.decode(place.read_bytes())
    except OSError:
        return None
