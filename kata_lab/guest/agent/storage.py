"""What is mounted before a container uses it: the ``Storage`` messages of the agent API, by their drivers.

A place that several containers name is mounted once, and unmounted with the last of them.
"""

import os

import files
import linux
from rpc import INVALID_ARGUMENT, NOT_FOUND, RpcError

RUN = "/run/kata-containers"
DRIVERS = ("virtio-fs", "blk", "overlayfs", "ephemeral", "local", "bind")
_WRITTEN = ("upperdir", "workdir")


def find_disk(source):
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


def _mount(storage):
    driver, place, options = storage["driver"], storage["mount_point"], storage["options"]
    source, kind = storage["source"], storage["fstype"]
    if driver not in DRIVERS:
        raise RpcError(INVALID_ARGUMENT, f"storage driver {driver!r} is not known; {', '.join(DRIVERS)} are")
    if driver == "virtio-fs":
        kind = "virtiofs"
    elif driver == "blk":
        source = find_disk(source)
    elif driver == "overlayfs":
        kind, source = "overlay", source or "overlay"
        for option in options:
            name, _, path = option.partition("=")
            if name in _WRITTEN:
                files.make_directory(path)
    elif driver == "bind":
        kind, options = "none", list(options) + ["bind"]
    else:
        kind = source = "tmpfs"
    files.make_directory(place)
    try:
        linux.mount(source, place, kind, options)
    except OSError:
        _remove_directory(place)
        raise
    if driver == "virtio-fs":
        _read_ahead(place)


def _read_ahead(place):
    """Let the kernel read as much of a file ahead as one request can carry; it begins with an eighth of that."""
    device = os.stat(place)[2]
    major = device >> 8 & 0xFFF
    minor = device & 0xFF | device >> 12 & 0xFFF00
    try:
        with open(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb", "w") as file:
            file.write("1024")
    except OSError:
        pass  # a kernel without it reads in smaller parts


def _remove_directory(place):
    try:
        os.rmdir(place)
    except OSError:
        pass  # it is not empty: it was there before


class Storages:
    """Places that are mounted, and by how many they are used."""

    def __init__(self):
        self._users = {}
        self._written = {}  # place → directories of what was written there
        self.left = []  # directories that nobody needs any more

    def mount_all(self, storages):
        """Mount all, or none; the places, the first one first."""
        places = []
        try:
            for storage in storages:
                place = storage["mount_point"]
                if place not in self._users:
                    _mount(storage)
                    parts = [each.partition("=") for each in storage["options"]]
                    kept = "keep" in storage["driver_options"]  # for when it is mounted again
                    self._written[place] = [] if kept else [each[2] for each in parts if each[0] in _WRITTEN]
                self._users[place] = self._users.get(place, 0) + 1
                places.append(place)
        except BaseException:
            self.undo(places)
            raise
        return places

    def undo(self, places):
        """Unmount, the last one first, and remove the directories."""
        while places:
            place = places.pop()
            self._users[place] -= 1
            if self._users[place]:
                continue
            del self._users[place]
            try:
                linux.unmount(place)
            except OSError:
                pass  # a mount below a place that was unmounted is gone with it
            _remove_directory(place)
            self.left += self._written.pop(place, [])


def remount(storage):
    """Change the options of what is mounted."""
    files.parts_of(storage["mount_point"])
    options = list(storage["options"]) + ["remount"]
    linux.mount(storage["source"], storage["mount_point"], storage["fstype"], options)


def clear():
    """Unmount everything that an agent before this one has mounted, and remove its files. False if there was none."""
    if not linux.exists(RUN):
        return False
    with open("/proc/self/mounts") as file:
        places = [line.split()[1].replace("\\040", " ") for line in file]
    for place in reversed(places):
        if place.startswith(RUN + "/"):
            try:
                linux.unmount(place)
            except OSError:
                pass
    linux.remove_tree(RUN)
    return True
