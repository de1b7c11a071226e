"""Builds an image from its description: resolve, fetch, put together, publish.

1. The lock says which packages; without one that fits, the host's APT resolves them from the signed index.
2. The modules are looked for in what is known of the kernel (:mod:`kata_lab.image.module_names`), and then in its
   package, which is fetched before the other packages are.
3. Packages, modules, the description's own files and our init are put together; no maintainer script runs. Contents of
   files wait in a spool on disk, so that a build of any size takes the memory of a small one.
4. The tree becomes an initramfs, or a file system for a disk (:mod:`kata_lab.image.disk`), and gets its name.

What step 3 and 4 do depends on the description and the lock alone, so that the same inputs give the same bytes. Leaves
out what maintainer scripts would do: alternatives, the loader's cache, compiled Python, enabled units (systemd enables
its presets at the first boot).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kata_lab.errors import ImageError
from kata_lab.image.absent import add_absent_libraries
from kata_lab.image.apt import Archive, Package, PackageGoneError, UnknownPackageError, cached
from kata_lab.image.boot_root import CONFIGURATION, INIT, boot_root
from kata_lab.image.description import Description, did_you_mean, find_description, load_description
from kata_lab.image.guest_files import agent_files, agent_recipe, init_program
from kata_lab.image.kernel import (
    FINIT_MODULE,
    KernelPackage,
    Module,
    UnknownModuleError,
    alias_file,
    dependency_file,
)
from kata_lab.image.library import BOOT, KERNEL, Image, Library, root_file
from kata_lab.image.lock import Lock, check_covers, lock_path, read_lock, write_lock
from kata_lab.image.mirror import SUITES
from kata_lab.image.module_names import check_module_names, remember_module_names, unknown_module
from kata_lab.image.spool import Spool
from kata_lab.image.systemd import add_units
from kata_lab.image.tree import RootTree
from kata_lab.progress import Progress, ProgressMode

SERVICES_MARKER = "kata-lab: services are up"
"""The line that a guest prints once every service of its description has been started."""

_FORMAT = 2
_SYSTEMD = "usr/lib/systemd/systemd"
_DIRECTORIES = ("dev", "proc", "sys", "run", "etc", "var", "mnt", "usr/lib/kata-lab")
_MADE_AT_BOOT = ("/dev/", "/proc/", "/sys/", "/run/")
_GROUPS = "root:x:0:\ntty:x:5:\n"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build.

    Args:
        lock: file of the lock.
        locked: take exactly the packages of the lock, and refuse if it does not fit.
        offline: the same, and without a network: what the cache lacks is refused.
        refresh: read the archive's index again and take the newest packages.
        mirror, keyring: see apt.Archive.
        progress: how to show what takes long.
    """

    lock: Path
    locked: bool = False
    offline: bool = False
    refresh: bool = False
    mirror: str | None = None
    keyring: Path | None = None
    progress: ProgressMode = "auto"


def build_named(
    name: str,
    *,
    locked: bool = False,
    offline: bool = False,
    refresh: bool = False,
    mirror: str | None = None,
    progress: ProgressMode = "auto",
) -> Image:
    """Build one of Kata Lab's descriptions, or the one in a file; see BuildOptions and build_image()."""
    path = find_description(name)
    options = BuildOptions(
        lock=lock_path(path), locked=locked, offline=offline, refresh=refresh, mirror=mirror, progress=progress
    )
    return build_image(load_description(path), options)


def build_image(description: Description, options: BuildOptions) -> Image:
    """Build an image, or find that it is built already.

    Raises:
        ImageError: an unknown package or module (with its JSON path), a package that does not verify or is missing
            offline, a lock that does not fit, packages that do not go together, or a full disk.
    """
    lock = _lock(description, options)
    recipe = _recipe(description, lock)
    library = Library(options.progress)
    if (present := _present(library, description.name, recipe)) is not None:
        return present
    with Spool() as spool:
        inputs = _fetch(description, lock, options, spool)
        if read_lock(options.lock) != lock:
            write_lock(options.lock, lock)
        with Progress(f"Building {description.name}", total=len(inputs.files) + 2, mode=options.progress) as bar:
            tree = RootTree(description.architecture, spool, description.excluded_paths)
            for package, file in zip(lock.packages, inputs.files, strict=True):
                tree.install(file, package.name)
                bar.advance(1, package.name)
            add_absent_libraries(tree, description)
            _add_kernel_modules(tree, inputs.kernel, inputs.modules)
            _add_own(tree, description, inputs.kernel, inputs.modules)
            bar.advance(1, "root")
            image = _publish(library, tree, description, lock, inputs, recipe, options.progress)
            bar.advance(1, "written")
    return image


def _present(library: Library, name: str, recipe: str) -> Image | None:
    """The image of this recipe, if it is built already; a damaged one is built again."""
    with contextlib.suppress(ImageError):
        if name in library.names() and (image := library.find(name)).manifest["recipe"] == recipe:
            image.verify()
            return image
    return None


def _lock(description: Description, options: BuildOptions) -> Lock:
    """Which packages to take; nothing is downloaded but the index."""
    lock = read_lock(options.lock)
    if options.locked or options.offline:
        return check_covers(lock, description, options.lock)
    if lock is not None and lock.inputs == description.package_inputs and not options.refresh:
        return lock
    archive = _archive(description, options)
    try:
        if options.refresh:
            archive.update()
        kernel = _kernel_package(archive, description)
        packages = archive.resolve(description.packages)
    except PackageGoneError as error:
        if description.suite in SUITES:
            raise
        problem = f"there is no suite {description.suite!r}: {did_you_mean(description.suite, SUITES)}"
        raise description.refusal("$.base.suite", problem) from error
    except UnknownPackageError as error:
        raise description.refusal(_path_of(error.name, description), str(error)) from error
    names = {package.name for package in packages}
    for place, name in enumerate(description.excluded_packages):
        if name not in names:
            problem = f"nothing brings a package {name!r}: {did_you_mean(name, names)}"
            raise description.refusal(f"$.exclude.packages[{place}]", problem)
    if description.init == "kata-lab" and "micropython" not in names:
        raise description.refusal("$.packages", "the init of Kata Lab runs in MicroPython: add 'micropython'")
    kept = tuple(package for package in packages if package.name not in description.excluded_packages)
    return Lock(description.package_inputs, kernel, kept)


def _archive(description: Description, options: BuildOptions) -> Archive:
    return Archive(
        options.mirror,
        suite=description.suite,
        architecture=description.architecture,
        keyring=options.keyring,
        progress=options.progress,
    )


def _path_of(name: str, description: Description) -> str:
    if name in description.packages:
        return f"$.packages[{description.packages.index(name)}]"
    return "$.kernel.package"


def _kernel_package(archive: Archive, description: Description) -> Package:
    """The package itself, or the one that a metapackage depends on."""
    package = archive.find(description.kernel_package)
    match = re.search(r"\blinux-image-\d\S*", package.depends)
    return package if match is None else archive.find(match[0])


@dataclass(frozen=True)
class _Modules:
    """What the image has, and what of it is loaded at boot; both in the order of dependencies."""

    present: list[Module]
    loaded: list[Module]


@dataclass(frozen=True)
class _Inputs:
    """What an image is made of: the kernel with its modules, and the files of the packages in the order of the lock."""

    kernel: KernelPackage
    modules: _Modules
    files: list[Path]


def _fetch(description: Description, lock: Lock, options: BuildOptions, spool: Spool) -> _Inputs:
    """Everything, modules checked: without a package as far as possible, and with the kernel before other packages."""
    wanted = (lock.kernel, *lock.packages)
    kernel_file, *files = (cached(package) for package in wanted)
    if options.offline:
        missing = [wanted[0].name] if kernel_file is None else []
        missing += [package.name for package, file in zip(lock.packages, files, strict=True) if file is None]
        if missing:
            raise ImageError(
                f"{', '.join(missing)} is not in the cache, or not as the lock {options.lock} says: "
                "build once without --offline"
            )
    if kernel_file is None:
        archive = _archive(description, options)
        check_module_names(description, lock.kernel, archive)
        (kernel_file,) = _fetched(archive, [lock.kernel], options)
    kernel = KernelPackage(kernel_file, description.architecture, spool)
    remember_module_names(lock.kernel, kernel, options.progress)
    modules = _modules(description, kernel)
    present = [file for file in files if file is not None]
    if len(present) < len(files):
        present = _fetched(_archive(description, options), list(lock.packages), options)
    return _Inputs(kernel, modules, present)


def _fetched(archive: Archive, packages: list[Package], options: BuildOptions) -> list[Path]:
    try:
        return archive.fetch_all(packages)
    except PackageGoneError:
        archive.update()
    try:
        return archive.fetch_all(packages)
    except PackageGoneError as error:
        raise ImageError(f"{error}; --refresh takes what the archive has now, in place of {options.lock}") from error


def _modules(description: Description, kernel: KernelPackage) -> _Modules:
    try:
        loaded = kernel.modules(description.modules)
        return _Modules(kernel.modules((*description.modules, *description.modules_on_demand)), loaded)
    except UnknownModuleError as error:
        raise unknown_module(description, error.name, error.known, kernel.release) from error


def _recipe(description: Description, lock: Lock) -> str:
    """Everything that decides the bytes of an image, hashed."""
    parts = [str(_FORMAT).encode(), description.sha256.encode(), lock.encode(), init_program()]
    parts.append(description.command_line.encode())
    if description.agent:
        parts.append(agent_recipe())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _add_kernel_modules(tree: RootTree, kernel: KernelPackage, modules: _Modules) -> None:
    if not modules.present:
        return
    base = f"usr/lib/modules/{kernel.release}"
    for module in modules.present:
        tree.file(f"{base}/{module.path}", module.content, owner="(modules)")
    tree.file(f"{base}/modules.dep", dependency_file(modules.present), owner="(modules)")
    tree.file(f"{base}/modules.alias", alias_file(modules.present), owner="(modules)")


def _add_own(tree: RootTree, description: Description, kernel: KernelPackage, modules: _Modules) -> None:
    """What no package brings: accounts, the description's files and links, init and its services."""
    for name in _DIRECTORIES:
        tree.directory(name)
    tree.directory("tmp", 0o1777)
    tree.device("dev/console", 5, 1)
    _add_users(tree, description)
    for spec in description.files:
        path = spec.path[1:]
        if spec.text is not None:
            tree.file(path, spec.text.encode(), 0o644 if spec.mode is None else spec.mode)
        elif spec.link is not None:
            tree.symlink(path, spec.link)
        else:
            tree.directory(path, 0o755 if spec.mode is None else spec.mode)
    for target, names in description.links:
        if not tree.has(target[1:]) and not target.startswith(_MADE_AT_BOOT):
            problem = f"the image has no file {target!r}: {did_you_mean(target, _paths(tree))}"
            raise description.refusal(f"$.links[{json.dumps(target)}]", problem)
        for name in names:
            tree.symlink(name[1:], target)
    paths = [f"/usr/lib/modules/{kernel.release}/{module.path}" for module in modules.loaded]
    if description.init == "systemd":
        if tree.read(_SYSTEMD) is None:
            raise description.refusal("$.init", "the packages bring no systemd: add 'systemd-sysv' to $.packages")
        add_units(tree, description, paths, SERVICES_MARKER)
        tree.symlink("init", f"/{_SYSTEMD}")
    else:
        _add_init(tree, description, paths)
    for service in description.services:
        if tree.read(service.command[0][1:]) is None:
            path = f"$.services[{_position(description, service.name)}].command[0]"
            problem = (
                f"the image has no program {service.command[0]!r}: {did_you_mean(service.command[0], _paths(tree))}"
            )
            raise description.refusal(path, problem)


def _paths(tree: RootTree) -> list[str]:
    return [f"/{path}" for path, _ in tree.nodes()]


def _position(description: Description, service: str) -> int:
    return [each["name"] for each in description.data["services"]].index(service)


def _add_init(tree: RootTree, description: Description, modules: list[str]) -> None:
    configuration = {
        "name": description.name,
        "format": description.format,
        "modules": modules,
        "finit_module": FINIT_MODULE[description.architecture],
        "writable": list(description.writable),
        "services": [
            {
                "name": each.name,
                "command": list(each.command),
                "restart": each.restart,
                "once": each.once,
                "console": each.console,
            }
            for each in description.services
        ],
    }
    tree.file(CONFIGURATION, json.dumps(configuration, indent=1).encode() + b"\n")
    tree.file(INIT, init_program(), 0o755)
    if description.agent:
        for path, content in agent_files().items():
            tree.file(path, content)
    tree.symlink("init", f"/{INIT}")
    tree.symlink("usr/sbin/init", f"/{INIT}")


def _add_users(tree: RootTree, description: Description) -> None:
    """passwd(5), group(5), shadow(5): Debian's own accounts where base-passwd brings them, then the description's."""
    accounts = _table(tree, "usr/share/base-passwd/passwd.master")
    groups = _table(tree, "usr/share/base-passwd/group.master") or {
        line.partition(":")[0]: line for line in _GROUPS.splitlines()
    }
    for user in description.users:
        accounts[user.name] = f"{user.name}:x:{user.uid}:{user.gid}:{user.name}:{user.home}:{user.shell}"
        if not any(line.split(":")[2] == str(user.gid) for line in groups.values()):
            groups[user.name] = f"{user.name}:x:{user.gid}:"
        tree.directory(user.home[1:], 0o700)
    for path, table, permissions in (
        ("etc/passwd", accounts, 0o644),
        ("etc/group", groups, 0o644),
        ("etc/shadow", {name: f"{name}:*:::::::" for name in accounts}, 0o640),
    ):
        tree.file(path, "".join(f"{line}\n" for line in table.values()).encode(), permissions)


def _table(tree: RootTree, path: str) -> dict[str, str]:
    lines = (tree.read(path) or b"").decode().splitlines()
    return {line.partition(":")[0]: line.replace(":*:", ":x:", 1) for line in lines if line}


def _publish(
    library: Library,
    tree: RootTree,
    description: Description,
    lock: Lock,
    inputs: _Inputs,
    recipe: str,
    progress: ProgressMode,
) -> Image:
    sizes = tree.sizes()
    manifest: dict[str, Any] = {
        "name": description.name,
        "summary": description.summary,
        "recipe": recipe,
        "architecture": description.architecture,
        "suite": description.suite,
        "format_of_root": description.format,
        "command_line": description.command_line,
        "release": inputs.kernel.release,
        "description": description.data,
        "kernel_package": {"name": lock.kernel.name, "version": lock.kernel.version, "sha256": lock.kernel.sha256},
        "packages": [
            {
                "name": each.name,
                "version": each.version,
                "sha256": each.sha256,
                "download": each.size,
                "bytes": sizes.get(each.name, 0),
            }
            for each in lock.packages
        ],
        "other_bytes": {name: size for name, size in sizes.items() if name.startswith("(")},
        "modules": [module.name for module in inputs.modules.present],
        "services": [each.name for each in description.services],
        "bytes": tree.total,
    }
    kernel = inputs.kernel.image.chunks()
    if description.format == "initramfs":
        return library.add(manifest, {KERNEL: kernel, root_file("initramfs"): tree.chunks()})
    from kata_lab.image.disk import make_root

    boot = boot_root(tree, description, inputs.kernel, init_program()).chunks()
    with make_root(tree, description.format, recipe, progress) as file:
        return library.add(manifest, {KERNEL: kernel, BOOT: boot, root_file(description.format): file})
