"""The files that the guest knows, by node id: O_PATH descriptors of which only so many are open.

The guest never sends a path. It names a directory by node id and an entry by one name, gets the node id of what it
found, and says when it forgets it (FORGET counts down what LOOKUP counted up). A node is the host file itself, pinned
by an O_PATH descriptor that was opened with O_NOFOLLOW below its parent's descriptor: whatever is renamed or replaced
by a symbolic link afterwards, the node stays the file that was found, and nothing leaves the share.

Descriptors are few and guests know many files. One that was not used for long is closed and opened again when it is
needed: by the file system's own handle where the VMM may do that (CAP_DAC_READ_SEARCH), else by the name under which
it was last seen. Both ways what is found must be the same file (device, inode number, and file handle where there is
one), otherwise the guest is told ESTALE. Node ids are never used twice.

A share is one directory, or exports: directories and files that come and go below a top directory that has no place on
the host. What may be done to a file is decided by where the guest found it: one that two exports have in common, since
one lies within the other or both are the same, is two nodes, of which one may be read-only and the other not.

The guest's inode number is the host's; files of further mounts and of exports have a number of theirs in the upper 16
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
        inode: the directory or file itself; None for the share's own directory.
        mount: number of the mount that it is on, where files can be opened by handle; else -1.
    """

    def __init__(self, number: int, name: bytes, read_only: bool, override_stat: bool = False) -> None:
        self.number = number
        self.name = name
        self.read_only = read_only
        self.override_stat = override_stat
        self.inode: Inode | None = None
        self.mount = -1


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
        os.chmod(path, 0o755)  # users of the guest pass through it
        return os.open(path, _DIRECTORY_FLAGS)
    finally:
        os.rmdir(path)


class Inodes:
    """The table of nodes.

    Args:
        root: path of the share, None for a top directory that has nothing but exports.
        read_only: of everything, exports too.
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
        self._read_only = read_only
        self._base = Export(0, b"", read_only or self.virtual)
        #: Directories and files that appear in the top directory, by name.
        self.exports: dict[bytes, Export] = {}
        self._export_numbers = itertools.count(1)
        self._open: OrderedDict[int, Inode] = OrderedDict()
        self._next_node = protocol.ROOT + 1
        # Export and mount number → descriptor that open_by_handle_at accepts, or -1 where it is of no use.
        self._mounts: dict[tuple[Export, int], int] = {}
        # Export and st_dev → what is put into the upper bits of inode numbers.
        self._upper_bits: dict[tuple[Export, int], int] = {}
        self._next_upper = 0
        #: Descriptors that were closed to stay below the limit, and opened again.
        self.evicted = self.reopened = 0
        self._root_descriptor = _open_nowhere() if root is None else os.open(root, _DIRECTORY_FLAGS)
        try:
            status = os.fstat(self._root_descriptor)
            self._upper(self._base, status.st_dev)
            self._base.mount = self._know_mount(self._base, self._root_descriptor)
            self._make_root(status)
        except BaseException:
            self._close_mounts()
            os.close(self._root_descriptor)
            raise

    def _know_mount(self, export: Export, descriptor: int) -> int:
        """Have what open_by_handle_at needs for a directory's mount; returns its number, -1 if it cannot be used."""
        known = host.file_handle(descriptor)
        if known is None:
            return -1
        if (export, known.mount) not in self._mounts:
            opened = os.open(host.proc_path(descriptor), _DIRECTORY_FLAGS)
            try:
                os.close(host.open_by_handle(opened, known.handle, os.O_PATH | os.O_CLOEXEC))
            except OSError:
                os.close(opened)
                opened = -1
            self._mounts[export, known.mount] = opened
        return known.mount if self._mounts[export, known.mount] >= 0 else -1

    def _close_mounts(self, of: Export | None = None) -> None:
        for (export, mount), descriptor in list(self._mounts.items()):
            if of is None or export is of:
                del self._mounts[export, mount]
                if descriptor >= 0:
                    os.close(descriptor)

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
        if inode is None:
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
        upper = self._upper_bits.get((export, device))
        if upper is None:
            upper = self._upper_bits[export, device] = (self._next_upper & 0xFFFF) << _SUBMOUNT_SHIFT
            self._next_upper += 1
        return upper

    def add(self, name: bytes, path: os.PathLike[str], read_only: bool, override_stat: bool) -> None:
        """Let a directory or file of the host appear as ``name`` in the top directory. The name is checked already.

        Raises:
            OSError: EEXIST, the name is taken; EBADF, the share is closed; and whatever the host says of the path.
        """
        if self._root_descriptor < 0:
            raise failure(errno.EBADF)
        if name in self.exports:
            raise failure(errno.EEXIST)
        export = Export(next(self._export_numbers), name, read_only or self._read_only, override_stat)
        inode, _ = self._enter(self.open(os.fsencode(path), os.O_PATH | os.O_CLOEXEC), protocol.ROOT, name, export)
        # Its descriptor stays open, and the node there, for as long as it is exported.
        inode.uses += 1
        inode.lookups += 1
        export.inode = inode
        self.exports[name] = export
        if inode.kind == stat.S_IFDIR:
            # A directory that may be passed but not read can be exported too; its files are found by name.
            with contextlib.suppress(OSError):
                export.mount = self._know_mount(export, inode.descriptor)

    def remove(self, name: bytes) -> None:
        """Undo :meth:`add`: what the guest knows below it is ESTALE from now on. None of it is open or locked.

        Raises:
            OSError: ENOENT, there is no export of that name.
        """
        export = self.exports.pop(name, None)
        if export is None:
            raise failure(errno.ENOENT)
        for inode in [each for each in self._by_node.values() if each.export is export]:
            self._remove(inode)
        self._close_mounts(export)
        for key in [key for key in self._upper_bits if key[0] is export]:
            del self._upper_bits[key]

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
        if inode.handle is not None and inode.kind == stat.S_IFDIR:
            # Without a descriptor of its mount a file is found by name.
            with contextlib.suppress(OSError):
                self._know_mount(inode.export, inode.descriptor)
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
        if handle is None or (mount := self._mounts.get((inode.export, handle.mount), -1)) < 0:
            return -1
        flags = os.O_PATH | os.O_CLOEXEC
        try:
            return host.open_by_handle(mount, handle.handle, flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._evict(len(self._open) // 2 + 1):
                raise failure(errno.ESTALE) from error
        return host.open_by_handle(mount, handle.handle, flags)

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
        if inode is inode.export.inode:
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
        for inode in list(self._by_node.values()):
            if inode is inode.export.inode:
                inode.lookups = 1
            elif inode is not self.root:
                self._remove(inode)
        for (export, mount), descriptor in list(self._mounts.items()):
            if mount != export.mount:
                del self._mounts[export, mount]
                if descriptor >= 0:
                    os.close(descriptor)

    def save(self) -> dict[str, Any]:
        """Every node, as plain data from which :meth:`restore` finds the files again."""
        known = []
        for inode in self._by_node.values():
            if inode.handle is None and inode.descriptor >= 0:
                inode.handle = host.file_handle(inode.descriptor)
            known.append(
                {
                    "node": inode.node,
                    "identification": inode.identification,
                    "kind": inode.kind,
                    "lookups": inode.lookups,
                    "parent": inode.parent,
                    "name": inode.name,
                    "export": inode.export.name,
                    "top": self._is_top(inode),
                    "handle": None if inode.handle is None else inode.handle.handle,
                }
            )
        return {
            "known": known,
            "next": self._next_node,
            "upper": [(export.name, device, upper) for (export, device), upper in self._upper_bits.items()],
            "next upper": self._next_upper,
        }

    def _is_top(self, inode: Inode) -> bool:
        return inode is self.root or inode is inode.export.inode

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Know what :meth:`save` knew. Files are looked for when they are used; one that is gone is ESTALE then, and so
        is everything of an export that is not there now, or is another directory."""
        self.clear()
        self._next_node = max(self._next_node, saved["next"])
        tops = {each["export"]: each for each in saved["known"] if each["top"]}
        same = self._renumber(tops)
        self._next_upper = max(self._next_upper, saved["next upper"])
        for name, device, upper in saved["upper"]:
            if name in same:
                self._upper_bits[same[name], device] = upper
        for each in saved["known"]:
            export = same.get(each["export"])
            if export is None or each["top"]:
                continue
            device, number = each["identification"]
            inode = Inode(each["node"], (device, number), each["kind"], each["parent"], each["name"], export)
            inode.lookups = each["lookups"]
            if each["handle"] is not None:
                # Mounts have other numbers in another boot of the host; files of the export's own are found by handle.
                here = device == tops[export.name]["identification"][0]
                inode.handle = host.FileHandle(export.mount if here else -1, each["handle"])
            self._by_node[inode.node] = self._by_identification[export.number, inode.identification] = inode

    def _renumber(self, tops: Mapping[bytes, Mapping[str, Any]]) -> dict[bytes, Export]:
        """Give exports' own nodes the numbers that the guest knows them by, all at once, since one may have another's
        now. Returns the exports that are what they were, by name."""
        same = {}
        if b"" in tops and tuple(tops[b""]["identification"]) == self.root.identification:
            same[b""] = self._base
        tops_here = [(export, export.inode) for export in self.exports.values() if export.inode is not None]
        for _, inode in tops_here:
            del self._by_node[inode.node]
            del self._open[inode.node]
        for export, inode in tops_here:
            before = tops.get(export.name)
            if before is not None and tuple(before["identification"]) == inode.identification:
                inode.node, inode.lookups = before["node"], before["lookups"]
                same[export.name] = export
            else:
                inode.node = self._next_node
                self._next_node += 1
            self._by_node[inode.node] = self._open[inode.node] = inode
        return same

    def close(self) -> None:
        """Close every descriptor. A second time this does nothing."""
        if self._root_descriptor >= 0:
            for name in list(self.exports):
                self.remove(name)
            self.clear()
            self._close_mounts()
            os.close(self._root_descriptor)
            self._root_descriptor = self.root.descriptor = -1
