"""Mounts that make the root file system of a bundle: containerd's snapshots (containerd, ``api/types/mount.proto``).

Carried out on the host, by mount(2), as their sender has it: ``bind`` and ``overlay``, one over the other in the order
in which they are given, and taken away in the opposite one. Only root may. A process that calls
:func:`keep_mounts_private` before its first thread has them to itself, so that they end with it however it ends, and
nobody else sees them. Left out: file systems on block devices and in files (erofs, ext4 …), for which a loop device
would have to be found; whoever wants one mounts it and binds the place.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kata_lab.ttrpc import RpcError, StatusCode

KINDS: Final = ("bind", "overlay")
LONGEST_DATA: Final = 4095  #: bytes of options that the kernel takes, a page

_RDONLY, _REMOUNT, _BIND, _RECURSIVE, _SLAVE = 0x1, 0x20, 0x1000, 0x4000, 0x80000
_FLAGS: Final = {"ro": _RDONLY, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "noatime": 0x400, "nodiratime": 0x800}
_FLAGS_OF_NOTHING: Final = ("rw", "bind", "rbind", "defaults")
_DETACH: Final = 0x2
_NEW_MOUNT_NAMESPACE: Final = 0x20000

_libc = ctypes.CDLL(None, use_errno=True)


def keep_mounts_private() -> None:
    """Mounts of this process are its own from now on; those that others make still appear. Nothing without root."""
    if _libc.unshare(_NEW_MOUNT_NAMESPACE) == 0:
        _mount("none", Path("/"), "", _RECURSIVE | _SLAVE, "")


@contextlib.contextmanager
def mounted(mounts: Sequence[Mapping[str, Any]], root: Path) -> Iterator[None]:
    """Carry out mounts at the directory ``root``, which is made if need be.

    Args:
        mounts: messages ``containerd.types.Mount``.
        root: the directory.

    Raises:
        RpcError: one is not understood (INVALID_ARGUMENT, UNIMPLEMENTED), or refused by the system; none is left.
    """
    for number, mount in enumerate(mounts):
        _check(f"rootfs[{number}]", mount)
    with contextlib.ExitStack() as undo:
        if mounts and not root.exists():
            root.mkdir(mode=0o755)
            undo.callback(root.rmdir)
        for number, mount in enumerate(mounts):
            place = _place(f"rootfs[{number}]", root, mount.get("target", ""))
            try:
                _carry_out(mount, place)
            except OSError as error:
                text = f"rootfs[{number}], {mount['type']} of {mount['source']!r}, cannot be mounted: {error.strerror}"
                code = StatusCode.PERMISSION_DENIED if isinstance(error, PermissionError) else StatusCode.INTERNAL
                hint = ", which only root may do" if code is StatusCode.PERMISSION_DENIED else ""
                raise RpcError(code, text + hint) from error
            undo.callback(_libc.umount2, os.fsencode(place), _DETACH)
        yield


def _check(name: str, mount: Mapping[str, Any]) -> None:
    if mount["type"] not in KINDS:
        text = f"{name}.type is {mount['type']!r}: it must be bind or overlay, so mount it before and bind the place"
        raise RpcError(StatusCode.UNIMPLEMENTED, text)
    if len(_data(mount).encode()) > LONGEST_DATA:
        text = f"{name}.options has more than the {LONGEST_DATA} bytes that the kernel takes: give fewer directories"
        raise RpcError(StatusCode.INVALID_ARGUMENT, text)
    if mount["type"] == "bind" and not mount["source"].startswith("/"):
        raise RpcError(
            StatusCode.INVALID_ARGUMENT, f"{name}.source is {mount['source']!r}: it must be an absolute path"
        )


def _place(name: str, root: Path, target: str) -> Path:
    """Where in the root a mount goes; links in what was mounted before lead nowhere else."""
    place = Path(os.path.realpath(root / target.lstrip("/")))
    if not place.is_relative_to(os.path.realpath(root)):
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"{name}.target is {target!r}: it must not lead out of the root")
    return place


def _data(mount: Mapping[str, Any]) -> str:
    return ",".join(each for each in mount["options"] if each not in _FLAGS and each not in _FLAGS_OF_NOTHING)


def _carry_out(mount: Mapping[str, Any], place: Path) -> None:
    flags = 0
    for option in mount["options"]:
        flags |= _FLAGS.get(option, 0)
    if mount["type"] == "overlay":
        _mount(mount["source"] or "overlay", place, "overlay", flags, _data(mount))
        return
    recursive = _RECURSIVE if "rbind" in mount["options"] else 0
    _mount(mount["source"], place, "", _BIND | recursive, "")
    if flags:
        try:
            # A bind mount takes its flags only when it is changed (mount(2)).
            _mount("none", place, "", _BIND | _REMOUNT | flags, "")
        except OSError:
            _libc.umount2(os.fsencode(place), _DETACH)
            raise


def _mount(source: str, place: Path, kind: str, flags: int, data: str) -> None:
    arguments = os.fsencode(source), os.fsencode(place), kind.encode() or None
    if _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data) or None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(place))
