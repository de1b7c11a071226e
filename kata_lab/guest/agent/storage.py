"""What is mounted before a container uses it: the ``Storage`` messages of the agent API, by their drivers."""

import os

import linux
from rpc import INVALID_ARGUMENT, NOT_FOUND, RpcError

RUN = "/run/kata-containers/"


def _find_disk(source):
    """The device of ``serial=…``, or the path itself."""
    if not source.startswith("serial="):
        return source
    wanted = source[7:]
    for entry in os.ilistdir("/sys/block"):
        try:
            with open(f"/sys/block/{entry[0]}/serial") as file:
                if file.read().strip() == wanted:
                    return "/dev/" + entry[0]
        except OSError:
            continue
    raise RpcError(NOT_FOUND, f"the guest has no disk with serial number {wanted!r}")


def _directories(options):
    """Directories of an overlay that are to be made."""
    for option in options:
        name, _, path = option.partition("=")
        if name in ("upperdir", "workdir"):
            linux.make_directories(path)


def mount_storage(storage):
    """Mount one; returns what :func:`undo` takes."""
    driver, place, options = storage["driver"], storage["mount_point"], storage["options"]
    if not place.startswith("/run/") or "/../" in place + "/":
        raise RpcError(INVALID_ARGUMENT, f"storage at {place!r} must be mounted below /run")
    source, kind = storage["source"], storage["fstype"]
    linux.make_directories(place)
    if driver == "virtio-fs":
        kind = "virtiofs"
    elif driver == "blk":
        source = _find_disk(source)
    elif driver == "overlayfs":
        kind = "overlay"
        _directories(options)
    elif driver in ("ephemeral", "local"):
        kind, source = "tmpfs", "tmpfs"
    elif driver == "bind":
        kind, options = "none", list(options) + ["bind"]
    else:
        known = "virtio-fs, blk, overlayfs, ephemeral, local and bind"
        raise RpcError(INVALID_ARGUMENT, f"storage driver {driver!r} is not known; {known} are")
    linux.mount(source, place, kind, options)
    if kind == "virtiofs":
        read_ahead(place)
    return place


def read_ahead(place):
    """Let the kernel read as much of a file ahead as one request can carry; it begins with an eighth of that."""
    device = os.stat(place)[2]
    major = device >> 8 & 0xFFF
    minor = device & 0xFF | device >> 12 & 0xFFF00
    try:
        with open(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb", "w") as file:
            file.write("1024")
    except OSError:
        pass  # a kernel without it reads in smaller parts


def mount_all(storages):
    """Mount all, or none; returns the places, the first one first."""
    places = []
    try:
        for storage in storages:
            places.append(mount_storage(storage))
    except Exception:
        undo(places)
        raise
    return places


def undo(places):
    """Unmount, the last one first, and remove the directories."""
    while places:
        place = places.pop()
        try:
            linux.unmount(place)
            os.rmdir(place)
        except OSError:
            pass


def remove_tree(path):
    """Remove a directory with all that is in it; mounts below it stay."""
    try:
        entries = list(os.ilistdir(path))
    except OSError:
        return
    for entry in entries:
        inner = path + "/" + entry[0]
        try:
            if entry[1] == 0x4000:
                remove_tree(inner)
            else:
                os.remove(inner)
        except OSError:
            pass
    try:
        os.rmdir(path)
    except OSError:
        pass
