"""The files that the guest knows, by node id: O_PATH descriptors of which only so many are open.

The guest never sends a path. It names a directory by node id and an entry by one name, gets the node id of what it
found, and says when it forgets it (FORGET counts down what LOOKUP counted up). A node is the host file itself, pinned
by an O_PATH descriptor that was opened with O_NOFOLLOW below its parent's descriptor: whatever is renamed or replaced
by a symbolic link afterwards, the node stays the file that was found, and nothing leaves the share.

Descriptors are few and guests know many files. One that was not used for long is closed and opened again when it is
needed: by the file system's own handle where the VMM may do that (CAP_DAC_READ_SEARCH), else by the name under which
it was last seen. Both ways what is found must be the same file (device, inode number, and file handle where there is
one), otherwise the guest is told ESTALE. Node ids are never used twice.

The guest's inode number is the host's; files of further mounts inside the share have the mount's number in the upper 16
bits, since the guest sees one file system.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vmm.devices.virtio.fs import host, protocol

MAX_KNOWN: Final = 1 << 20  #: nodes that a guest may know at a time
MAX_DEPTH: Final = 4096  #: parents that are looked at to open a node by name
_EVICTED_AT_ONCE: Final = 64
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_SUBMOUNT_SHIFT: Final = 48

Identification = tuple[int, int]  #: st_dev, st_ino


def failure(code: int) -> OSError:
    """The exception for an errno."""
    return OSError(code, os.strerror(code))


class Export:
    """What one part of the share is served by.

    Attributes:
        number: 0 for the share's own directory.
        name: in the top directory.
        read_only: the guest can only read.
        override_stat: owner, mode and kind of its files are in an extended attribute.
        removed: it is not served any more.
        inode: the directory or file itself; None for the share's own directory.
    """

    def __init__(self, number: int, name: bytes, read_only: bool, override_stat: bool = False) -> None:
        self.number = number
        self.name = name
        self.read_only = read_only
        self.override_stat = override_stat
        self.removed = False
        self.inode: Inode | None = None


class Inode:
    """A file that the guest knows.

    Attributes:
        node: its node id.
        identification: device and inode number on the host.
        kind: its type, ``stat.S_IFMT`` of the mode, which never changes.
        descriptor: an O_PATH descriptor, or -1 while it is closed.
        lookups: how many times the guest was told of it and did not forget.
        parent: the directory under which it was last seen, or None.
        name: and its name there.
        handle: the host file system's name for it, or None if it is not known or there is none.
        uses: open files of it, locks included; while there are any, its descriptor stays open.
        seen: size and times when it was last opened, by which the guest's pages are known to be fresh.
    """

    __slots__ = (
        "descriptor",
        "export",
        "handle",
        "identification",
        "kind",
        "lookups",
        "name",
        "node",
        "parent",
        "seen",
        "uses",
        "warm",
    )

    def __init__(
        self, node: int, identification: Identification, kind: int, parent: int, name: bytes, export: Export
    ) -> None:
        self.node = node
        self.export = export
        self.identification = identification
        self.kind = kind
        self.descriptor = -1
        self.lookups = 0
        self.parent = parent
        self.name = name
        self.handle: host.FileHandle | None = None
        self.uses = 0
        self.seen: tuple[int, ...] = ()
        self.warm = True


def _open_nowhere() -> int:
    """A descriptor of an empty directory that has no name any more, so that nothing can be put there."""
    path = tempfile.mkdtemp(prefix="kata-lab-share-")
    try:
        return os.open(path, _DIRECTORY_FLAGS)
    finally:
        os.rmdir(path)


class Inodes:
    """The table of nodes.

    A file that two exports have in common is two nodes, with inode numbers that differ, since what may be done to it
    depends on where the guest found it.

    Args:
        root: path of the share, None for a top directory that has nothing but exports.
        read_only: of what is below the root itself.
        limit: how many O_PATH descriptors may be open; files in use can exceed it.

    Raises:
        OSError: the share cannot be opened.
    """

    def __init__(self, root: os.PathLike[str] | None, read_only: bool, limit: int) -> None:
        self._limit = max(limit, 8)
        self._by_node: dict[int, Inode] = {}
        self._by_identification: dict[tuple[int, Identification], Inode] = {}  # by number of the export as well
        #: Whether the top directory holds exports and nothing else.
        self.virtual = root is None
        self._base = Export(0, b"", read_only or self.virtual)
        #: Directories and files that appear in the top directory, by name.
        self.exports: dict[bytes, Export] = {}
        self._export_numbers = itertools.count(1)
        self._open: OrderedDict[int, Inode] = OrderedDict()
        self._next_node = protocol.ROOT + 1
        self._mounts: dict[int, int] = {}  # mount number → descriptor that open_by_handle_at accepts
        # Number of the export and st_dev → what is put into the upper bits of inode numbers.
        self._devices: dict[tuple[int, int], int] = {}
        #: Descriptors that were closed to stay below the limit, and opened again.
        self.evicted = self.reopened = 0
        self._root_descriptor = _open_nowhere() if root is None else os.open(root, _DIRECTORY_FLAGS)
        try:
            status = os.fstat(self._root_descriptor)
            self._devices[0, status.st_dev] = 0
            known = host.file_handle(self._root_descriptor)
            self._by_handle = known is not None and self._may_open_by_handle(known)
            if known is not None and self._by_handle:
                self._mounts[known.mount] = self._root_descriptor
            self._make_root(status)
        except BaseException:
            os.close(self._root_descriptor)
            raise

    def _may_open_by_handle(self, known: host.FileHandle) -> bool:
        try:
            os.close(host.open_by_handle(self._root_descriptor, known.handle, os.O_PATH | os.O_CLOEXEC))
        except OSError:
            return False
        return True

    def _make_root(self, status: os.stat_result) -> None:
        identification = (status.st_dev, status.st_ino)
        root = Inode(protocol.ROOT, identification, stat.S_IFMT(status.st_mode), 0, b"", self._base)
        root.descriptor = self._root_descriptor
        root.lookups = 1
        root.uses = 1
        self._by_node[protocol.ROOT] = self._by_identification[0, identification] = root
        self.root = root

    def __len__(self) -> int:
        return len(self._by_node)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_node.values())

    @property
    def descriptors(self) -> int:
        """O_PATH descriptors that are open."""
        return len(self._open)

    def get(self, node: int) -> Inode:
        """The node of that id.

        Raises:
            OSError: ESTALE, the guest was never told of it or forgot it.
        """
        inode = self._by_node.get(node)
        if inode is None or inode.export.removed:
            raise failure(errno.ESTALE)
        return inode

    def descriptor(self, inode: Inode) -> int:
        """An open O_PATH descriptor of ``inode``, good until the next call here.

        Raises:
            OSError: ESTALE, it cannot be found again.
        """
        inode.warm = True
        if inode.descriptor < 0:
            self._reopen(inode)
        return inode.descriptor

    def number(self, inode: Inode, status: os.stat_result) -> int:
        """The inode number that the guest sees."""
        return status.st_ino ^ self._upper(inode.export, status.st_dev)

    def upper_bits(self, inode: Inode) -> int:
        """What distinguishes inode numbers of the export and mount that ``inode`` is on."""
        return self._upper(inode.export, inode.identification[0])

    def _upper(self, export: Export, device: int) -> int:
        upper = self._devices.get((export.number, device))
        if upper is None:
            upper = self._devices[export.number, device] = (len(self._devices) & 0xFFFF) << _SUBMOUNT_SHIFT
        return upper

    def add(self, name: bytes, path: os.PathLike[str], read_only: bool, override_stat: bool) -> None:
        """Let a directory or file of the host appear as ``name`` in the top directory. The name is checked already.

        Raises:
            OSError: EEXIST, the name is taken; and whatever the host says of the path.
        """
        if name in self.exports:
            raise failure(errno.EEXIST)
        export = Export(next(self._export_numbers), name, read_only, override_stat)
        inode, _ = self._enter(self.open(os.fsencode(path), os.O_PATH | os.O_CLOEXEC), protocol.ROOT, name, export)
        # Its descriptor stays open, and the node there, for as long as it is exported.
        inode.uses += 1
        inode.lookups += 1
        export.inode = inode
        self.exports[name] = export

    def remove(self, name: bytes) -> None:
        """Undo :meth:`add`: what the guest knows below it is ESTALE from now on.

        Raises:
            OSError: ENOENT, there is no export of that name.
        """
        export = self.exports.pop(name, None)
        if export is None:
            raise failure(errno.ENOENT)
        export.removed = True
        if export.inode is not None:
            export.inode.uses -= 1
            self.forget(export.inode.node, 1)
        for inode in [each for each in self._open.values() if each.export is export and not each.uses]:
            self._release(inode)

    def status(self, inode: Inode) -> os.stat_result:
        """``stat`` of the file itself."""
        return os.fstat(self.descriptor(inode))

    def lookup(self, directory: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """Find ``name`` in ``directory`` and count that the guest knows it. The name is checked already.

        Raises:
            OSError: ENOENT and whatever else the host says; ENFILE, the guest knows too many files.
        """
        if directory is self.root and name in self.exports:
            return self._lookup_export(self.exports[name])
        # A known file whose descriptor is open keeps its inode number, so that the number tells that it is this one.
        status = os.stat(name, dir_fd=self.descriptor(directory), follow_symlinks=False)
        export = directory.export
        inode = self._by_identification.get((export.number, (status.st_dev, status.st_ino)))
        if inode is None or inode.descriptor < 0:
            descriptor = self.open(name, _PATH_FLAGS, directory=directory)
            inode, status = self._enter(descriptor, directory.node, name, export)
        inode.parent, inode.name = directory.node, name
        inode.warm = True
        inode.lookups += 1
        return inode, status

    def top_entries(self) -> list[host.DirectoryEntry]:
        """The top directory's entries, where it has nothing but exports."""
        upper = self.upper_bits(self.root)
        found = [(self.root.identification[1], stat.S_IFDIR, b"."), (self.root.identification[1], stat.S_IFDIR, b"..")]
        for export in self.exports.values():
            if export.inode is not None:
                number = self.number(export.inode, self.status(export.inode)) ^ upper
                found.append((number, export.inode.kind, export.name))
        return [
            host.DirectoryEntry(number, place, kind >> 12, name)
            for place, (number, kind, name) in enumerate(found, start=1)
        ]

    def _lookup_export(self, export: Export) -> tuple[Inode, os.stat_result]:
        assert export.inode is not None
        export.inode.lookups += 1
        return export.inode, self.status(export.inode)

    def adopt(self, descriptor: int, directory: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """Count that the guest knows the file that is open as ``descriptor``, which stays the caller's."""
        own = self.open(host.proc_path(descriptor), os.O_PATH | os.O_CLOEXEC)
        inode, status = self._enter(own, directory.node, name, directory.export)
        inode.lookups += 1
        return inode, status

    def _enter(self, descriptor: int, directory: int, name: bytes, export: Export) -> tuple[Inode, os.stat_result]:
        try:
            status = os.fstat(descriptor)
            identification = (status.st_dev, status.st_ino)
            inode = self._by_identification.get((export.number, identification))
            if inode is not None and inode.descriptor >= 0:
                os.close(descriptor)
                return inode, status
            if inode is None or not self._is_still(inode, descriptor):
                if len(self._by_node) >= MAX_KNOWN:
                    raise failure(errno.ENFILE)
                inode = Inode(self._next_node, identification, stat.S_IFMT(status.st_mode), directory, name, export)
                self._next_node += 1
                self._by_node[inode.node] = self._by_identification[export.number, identification] = inode
        except BaseException:
            os.close(descriptor)
            raise
        self._hold(inode, descriptor)
        return inode, status

    @staticmethod
    def _is_still(inode: Inode, descriptor: int) -> bool:
        # An inode number may be another file's by now; its handle then has another generation.
        return inode.handle is None or (found := host.file_handle(descriptor)) is None or found[1] == inode.handle[1]

    def _hold(self, inode: Inode, descriptor: int) -> None:
        inode.descriptor = descriptor
        self._open[inode.node] = inode
        if len(self._open) > self._limit:
            self._evict(_EVICTED_AT_ONCE, inode)

    def open(self, path: bytes, flags: int, mode: int = 0, directory: Inode | None = None) -> int:
        """``os.open`` in ``directory``; where descriptors have run out, old ones are closed first."""
        above = None if directory is None else self.descriptor(directory)
        try:
            return os.open(path, flags, mode, dir_fd=above)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._evict(len(self._open) // 2 + 1):
                raise
        above = None if directory is None else self.descriptor(directory)
        return os.open(path, flags, mode, dir_fd=above)

    @contextlib.contextmanager
    def both(self, first: Inode, second: Inode) -> Iterator[tuple[int, int]]:
        """The descriptors of two nodes, neither of which is closed to open the other."""
        one = self.descriptor(first)
        first.uses += 1
        try:
            yield one, self.descriptor(second)
        finally:
            first.uses -= 1

    def _evict(self, wanted: int, keep: Inode | None = None) -> int:
        """Close up to ``wanted`` descriptors, those first that were not used since they were last looked at."""
        closed = 0
        for _ in range(2 * len(self._open)):
            if closed == wanted or not self._open:
                break
            node, inode = next(iter(self._open.items()))
            if inode.warm or inode.uses or inode is keep:
                inode.warm = False
                self._open.move_to_end(node)
                continue
            self._release(inode)
            closed += 1
        self.evicted += closed
        return closed

    def _release(self, inode: Inode) -> None:
        if inode.handle is None:
            inode.handle = host.file_handle(inode.descriptor)
        handle = inode.handle
        if handle is not None and self._by_handle and handle.mount not in self._mounts and inode.kind == stat.S_IFDIR:
            # Without a descriptor of its mount the file is found by name.
            with contextlib.suppress(OSError):
                path = host.proc_path(inode.descriptor)
                self._mounts[handle.mount] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        del self._open[inode.node]
        os.close(inode.descriptor)
        inode.descriptor = -1

    def _reopen(self, inode: Inode) -> None:
        if self._by_node.get(inode.node) is not inode:
            raise failure(errno.ESTALE)
        if (descriptor := self._open_by_handle(inode)) >= 0:
            self.reopened += 1
            self._hold(inode, descriptor)
            return
        chain = [inode]
        while chain[-1].descriptor < 0:
            above = self._by_node.get(chain[-1].parent)
            if above is None or len(chain) > MAX_DEPTH:
                raise failure(errno.ESTALE)
            chain.append(above)
        for each in chain:
            each.uses += 1
        try:
            for below, above in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
                self._open_by_name(below, above.descriptor)
        finally:
            for each in chain:
                each.uses -= 1

    def _open_by_handle(self, inode: Inode) -> int:
        handle = inode.handle
        if handle is None or handle.mount not in self._mounts:
            return -1
        flags = os.O_PATH | os.O_CLOEXEC
        try:
            return host.open_by_handle(self._mounts[handle.mount], handle.handle, flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._evict(len(self._open) // 2 + 1):
                raise failure(errno.ESTALE) from error
        return host.open_by_handle(self._mounts[handle.mount], handle.handle, flags)

    def _open_by_name(self, inode: Inode, above: int) -> None:
        try:
            descriptor = os.open(inode.name, _PATH_FLAGS, dir_fd=above)
        except OSError as error:
            raise failure(errno.ESTALE) from error
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != inode.identification or not self._is_still(inode, descriptor):
            os.close(descriptor)
            raise failure(errno.ESTALE)
        self.reopened += 1
        self._hold(inode, descriptor)

    def moved(self, directory: Inode, name: bytes) -> None:
        """Something was renamed to ``name`` in ``directory``; a known file is found there from now on."""
        try:
            status = os.stat(name, dir_fd=self.descriptor(directory), follow_symlinks=False)
        except OSError:
            return
        inode = self._by_identification.get((directory.export.number, (status.st_dev, status.st_ino)))
        if inode is not None:
            inode.parent, inode.name = directory.node, name

    def forget(self, node: int, count: int) -> Inode | None:
        """The guest forgets ``node`` that many times; returns it if that was for good. Unknown ids are nothing."""
        inode = self._by_node.get(node)
        if inode is None or node == protocol.ROOT:
            return None
        if inode is inode.export.inode and not inode.export.removed:
            # The share itself knows it, however often a guest forgets it.
            inode.lookups = max(inode.lookups - count, 1)
            return None
        inode.lookups -= min(count, inode.lookups)
        if inode.lookups:
            return None
        self._remove(inode)
        return inode

    def _remove(self, inode: Inode) -> None:
        del self._by_node[inode.node]
        key = inode.export.number, inode.identification
        if self._by_identification.get(key) is inode:
            del self._by_identification[key]
        if self._open.pop(inode.node, None) is not None:
            os.close(inode.descriptor)
            inode.descriptor = -1

    def clear(self) -> None:
        """Forget everything but the root and the exports."""
        kept = [self.root, *(export.inode for export in self.exports.values())]
        for inode in list(self._by_node.values()):
            if inode not in kept:
                self._remove(inode)
        for export in self.exports.values():
            if export.inode is not None:
                export.inode.lookups = 1
        for mount, descriptor in list(self._mounts.items()):
            if descriptor != self._root_descriptor:
                os.close(descriptor)
                del self._mounts[mount]

    def save(self) -> list[dict[str, Any]]:
        """Every node but the root, as plain data from which :meth:`restore` finds the files again."""
        saved = []
        for inode in self._by_node.values():
            if inode is self.root or inode.export.removed:
                continue
            if inode.handle is None and inode.descriptor >= 0:
                inode.handle = host.file_handle(inode.descriptor)
            saved.append(
                {
                    "node": inode.node,
                    "identification": inode.identification,
                    "kind": inode.kind,
                    "lookups": inode.lookups,
                    "parent": inode.parent,
                    "name": inode.name,
                    "export": inode.export.name,
                    "handle": None if inode.handle is None else inode.handle.handle,
                }
            )
        return saved

    def restore(self, saved: list[Mapping[str, Any]]) -> None:
        """Know what :meth:`save` knew. Files are looked for when they are used; one that is gone is ESTALE then."""
        self.clear()
        mount = next(iter(self._mounts), -1)
        for each in saved:
            device, number = each["identification"]
            export = self.exports.get(each["export"]) if each["export"] else self._base
            if export is None:
                continue  # ESTALE, unless its owner adds the export before
            if export.inode is not None and each["parent"] == protocol.ROOT and each["name"] == export.name:
                self._renumber(export.inode, each["node"], each["lookups"])
                continue
            inode = Inode(each["node"], (device, number), each["kind"], each["parent"], each["name"], export)
            inode.lookups = each["lookups"]
            if each["handle"] is not None:
                # Mounts have other numbers in another boot of the host; files of the share's own are found by handle.
                on_root = device == self.root.identification[0]
                inode.handle = host.FileHandle(mount if on_root else -1, each["handle"])
            self._by_node[inode.node] = self._by_identification[export.number, inode.identification] = inode
            self._next_node = max(self._next_node, inode.node + 1)

    def _renumber(self, inode: Inode, node: int, lookups: int) -> None:
        """An export's own node, by the number that the guest knows it by."""
        del self._by_node[inode.node]
        if self._open.pop(inode.node, None) is not None:
            self._open[node] = inode
        inode.node, inode.lookups = node, lookups
        self._by_node[node] = inode
        self._next_node = max(self._next_node, node + 1)

    def close(self) -> None:
        """Close every descriptor. A second time this does nothing."""
        if self._root_descriptor >= 0:
            self.exports.clear()
            self.clear()
            self._mounts.clear()
            os.close(self._root_descriptor)
            self._root_descriptor = self.root.descriptor = -1
