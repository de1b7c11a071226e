"""A container's configuration made out of an image and what somebody wishes, as container engines make it.

Follows the OCI runtime specification 1.1, and conversion.md of the image specification 1.1 for what an image says. The
defaults (mounts, capabilities, hidden paths, namespaces, devices) are those that users of Docker and containerd know.
Left out: a default seccomp profile (a sandbox's guest kernel is the container's own), and an image's anonymous volumes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from kata_lab.oci import linux
from kata_lab.oci.accounts import resolve_user
from kata_lab.oci.image import ImageHandle
from kata_lab.oci.shape import nearest
from kata_lab.oci.spec import SpecError, check_spec

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CPU_PERIOD: Final = 100_000
"""Microseconds over which a share of CPUs is counted."""

SMALLEST_MEMORY: Final = 6 << 20
"""Bytes that a container's limit must leave it, as with Docker."""

LARGEST_MEMORY: Final = 1 << 50

_SIZE = re.compile(r"(\d{1,19})\s*([kmgt]?)i?b?", re.IGNORECASE)
_SIZE_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_ALL = "ALL"


class Wishes(TypedDict, total=False):
    """What somebody wishes of a container beyond its image, program and environment.

    Attributes:
        entrypoint: in place of the image's; its ``Cmd`` is then not used.
        user: ``name|uid[:group|gid]``, in place of the image's.
        cwd: working directory, in place of the image's.
        tty: give the program a terminal.
        read_only: the root cannot be written to.
        tmpfs: each ``/where[:options]``, such as ``/scratch:size=64m,mode=1777``.
        volumes: each ``source:/where[:ro|rw]``, a directory or file of this machine.
        cpus: how much of CPUs it may use, such as 1.5.
        memory: bytes that it may use, or a text such as ``64m``.
        pids: processes and threads that it may have.
        hostname: its name.
        cap_add, cap_drop: capabilities more or fewer than by default, with or without ``CAP_``; ``ALL`` is every one.
        no_new_privileges: no program in it gains privileges from set-user-ID bits.
        annotations: anything more, by name.
    """

    entrypoint: Sequence[str]
    user: str
    cwd: str
    tty: bool
    read_only: bool
    tmpfs: Sequence[str]
    volumes: Sequence[str]
    cpus: float
    memory: int | str
    pids: int
    hostname: str
    cap_add: Sequence[str]
    cap_drop: Sequence[str]
    no_new_privileges: bool
    annotations: Mapping[str, str]


def make_spec(
    image: ImageHandle,
    args: Sequence[str] = (),
    env: Sequence[str] | Mapping[str, str] = (),
    **wishes: Unpack[Wishes],
) -> dict[str, Any]:
    """The configuration (config.json) of a container.

    ::

        make_spec(image, ["uname", "-a"], ["LANG=C"], user="nobody", memory="64m")

    Args:
        image: whose configuration and files are asked.
        args: arguments in place of the image's ``Cmd``; the image's ``Entrypoint`` stays before them.
        env: variables beyond the image's, ``NAME=value`` each.
        wishes: see Wishes.

    Returns:
        plain JSON that check_spec() accepts; its root is ``rootfs``, and sources of volumes are absolute paths.

    Raises:
        SpecError: a wish that cannot be granted, or an image with no program to run.
        OciError: the image's layers cannot be unpacked.
    """
    config = image.config
    entrypoint = wishes.get("entrypoint")
    program = [*(config.entrypoint if entrypoint is None else entrypoint)]
    program += args or (config.cmd if entrypoint is None else ())
    if not program:
        raise SpecError(f"the image {image.reference!r} names no program: give one with its arguments")
    account = resolve_user(wishes.get("user", config.user), image.tree())
    tty = wishes.get("tty", False)
    process = {
        "terminal": tty,
        "user": {"uid": account.uid, "gid": account.gid, "additionalGids": list(account.groups)},
        "args": list(program),
        "env": _environment(config.env, env, account.home, wishes),
        "cwd": wishes.get("cwd", "") or config.working_directory or "/",
        "capabilities": _capabilities(wishes, account.uid),
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1048576}],
        "noNewPrivileges": wishes.get("no_new_privileges", False),
    }
    spec: dict[str, Any] = {
        "ociVersion": "1.1.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": wishes.get("read_only", False)},
        "mounts": [
            *_default_mounts(),
            *(_tmpfs(each) for each in wishes.get("tmpfs", ())),
            *(_volume(each) for each in wishes.get("volumes", ())),
        ],
        "linux": {
            "resources": _resources(wishes),
            "namespaces": [{"type": each} for each in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": list(linux.MASKED_PATHS),
            "readonlyPaths": list(linux.READONLY_PATHS),
        },
    }
    if wishes.get("hostname"):
        spec["hostname"] = wishes["hostname"]
    if wishes.get("annotations"):
        spec["annotations"] = dict(wishes["annotations"])
    check_spec(spec, "the container")
    return spec


def parse_size(value: int | str) -> int:
    """Bytes out of a number or a text such as ``64m``, ``1.5`` being none; k, m, g and t count by 1024.

    Raises:
        SpecError: it is something else.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise SpecError(f"the size {value!r} is none: it must be a whole number of bytes, or like 512k, 64m or 1g")
        return int(match[1]) << _SIZE_SHIFTS[match[2].lower()]
    return value


def _environment(
    image: Sequence[str], wished: Sequence[str] | Mapping[str, str], home: str, wishes: Wishes
) -> list[str]:
    """The later of two variables of one name wins, and keeps the place of the first."""
    found = {"PATH": PATH}
    if wishes.get("hostname"):
        found["HOSTNAME"] = wishes["hostname"]
    if wishes.get("tty", False):
        found["TERM"] = "xterm"
    more = [f"{name}={value}" for name, value in wished.items()] if isinstance(wished, Mapping) else wished
    for each in (*image, *more):
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise SpecError(f"the environment variable {each!r} has no value: it must be NAME=value")
        found[name] = value
    found.setdefault("HOME", home)
    return [f"{name}={value}" for name, value in found.items()]


def _capabilities(wishes: Wishes, uid: int) -> dict[str, list[str]]:
    """Root has them at once; somebody else may only get them by a program that has them."""
    dropped, added = _named(wishes.get("cap_drop", ())), _named(wishes.get("cap_add", ()))
    chosen = (set(linux.DEFAULT_CAPABILITIES) - dropped) | added
    if _ALL in {each.upper() for each in wishes.get("cap_add", ())}:
        chosen -= dropped
    bounding = [name for name in linux.CAPABILITIES if name in chosen]
    held = bounding if uid == 0 else []
    return {"bounding": bounding, "effective": list(held), "permitted": list(held), "inheritable": [], "ambient": []}


def _named(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for each in names:
        name = each.upper()
        if name == _ALL:
            found |= set(linux.CAPABILITIES)
            continue
        name = name if name.startswith("CAP_") else f"CAP_{name}"
        if name not in linux.CAPABILITIES:
            raise SpecError(f"there is no capability {each!r}: {nearest(name, linux.CAPABILITIES)}")
        found.add(name)
    return found


def _mount(destination: str, kind: str, source: str, options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": options.split(",")}


def _default_mounts() -> list[dict[str, Any]]:
    return [
        _mount("/proc", "proc", "proc", "nosuid,noexec,nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
    ]


def _tmpfs(wish: str) -> dict[str, Any]:
    destination, _, options = wish.partition(":")
    _need_place(destination, f"the tmpfs {wish!r}")
    return _mount(destination, "tmpfs", "tmpfs", ",".join(["nosuid", "nodev", "noexec", *filter(None, [options])]))


def _volume(wish: str) -> dict[str, Any]:
    parts = wish.split(":")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise SpecError(f"the volume {wish!r} is none: it must be source:/where or source:/where:ro")
    if not parts[0].startswith(("/", ".", "~")):
        raise SpecError(f"the volume {wish!r} has the source {parts[0]!r}: it must be a path, such as ./{parts[0]}")
    source = Path(os.path.abspath(Path(parts[0]).expanduser()))
    if not source.exists():
        raise SpecError(f"the volume {wish!r} has the source {parts[0]!r}, which does not exist: make it first")
    _need_place(parts[1], f"the volume {wish!r}")
    mode = parts[2] if len(parts) == 3 else "rw"
    return _mount(parts[1], "bind", str(source), f"rbind,rprivate,{mode}")


def _need_place(destination: str, what: str) -> None:
    if not destination.startswith("/") or destination.strip("/") == "" or ".." in destination.split("/"):
        raise SpecError(f"{what} goes to {destination!r}: it must be an absolute path beneath / without '..'")


def _resources(wishes: Wishes) -> dict[str, Any]:
    found: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if "cpus" in wishes:
        cpus = wishes["cpus"]
        if not math.isfinite(cpus) or not 0.01 <= cpus <= 4096:
            raise SpecError(f"{cpus} CPUs cannot be given: it must be a number from 0.01 to 4096")
        found["cpu"] = {"quota": round(cpus * CPU_PERIOD), "period": CPU_PERIOD}
    if "memory" in wishes:
        size = parse_size(wishes["memory"])
        if not SMALLEST_MEMORY <= size <= LARGEST_MEMORY:
            raise SpecError(
                f"a memory of {wishes['memory']} is no limit for a container: it must be from {SMALLEST_MEMORY >> 20}m "
                f"to {LARGEST_MEMORY >> 40}t"
            )
        found["memory"] = {"limit": size, "swap": size}
    if "pids" in wishes:
        found["pids"] = {"limit": wishes["pids"]}
    return found
