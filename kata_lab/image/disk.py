"""A root for a disk: a read-only erofs, or an ext4, made by their own tools without root and without a mount.

Tools: mkfs.erofs(1) 1.5 or later, and mke2fs(8) with debugfs(8), 1.46 or later. Both read a directory, which is written
beneath the cache for as long as they run; device nodes are left out, since a guest mounts devtmpfs. Times are 0 and
identifiers come from the recipe, so that the same inputs give the same bytes. In erofs everything belongs to root.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kata_lab.errors import ImageError
from kata_lab.image.cpio import Node
from kata_lab.image.spool import chunks_of
from kata_lab.image.store import exclusive, scratch
from kata_lab.image.tree import RootTree
from kata_lab.paths import cache_directory
from kata_lab.programs import run_apart
from kata_lab.progress import ProgressMode

BLOCK = 4096
SPARE = 1.15
"""How much larger than its files an ext4 is made: for inode tables and directories; it has no journal."""

_PACKAGES = {"mkfs.erofs": "erofs-utils", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}
_CONFIGURATION = """[fs_types]
ext4 = {
features = extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize,sparse_super,large_file,filetype,dir_index
inode_size = 256
}
"""  # mke2fs.conf(5); the host's own would make images depend on the host
_DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/local/sbin")


@contextmanager
def make_root(tree: RootTree, format: str, identity: str, progress: ProgressMode = "auto") -> Iterator[Path]:
    """The file with the file system, which may be moved away, and is removed at the end of the ``with`` block.

    Args:
        tree: the root.
        format: "erofs" or "ext4".
        identity: hexadecimal digits from which the file system's UUID comes.
        progress: how to show that another process must be waited for.

    Raises:
        ImageError: the tool is not installed, or fails.
    """
    name = str(uuid.UUID(identity[:32]))
    work = cache_directory() / "disks"
    with exclusive(work, progress), scratch(work) as partial:
        root = partial / "root"
        _write(tree, root)
        place = partial / "image"
        if format == "erofs":
            _run(["mkfs.erofs", "-T0", f"-U{name}", "--all-root", "-x-1", str(place), str(root)])
        else:
            _make_ext4(tree, root, place, name)
        yield place


def _write(tree: RootTree, root: Path) -> None:
    """Write the tree; its directories are written before what is in them, so that no link is ever followed."""
    root.mkdir()
    permissions = []
    for path, node in tree.nodes():
        place = root / path
        if stat.S_ISDIR(node.mode):
            place.mkdir()
            permissions.append((place, stat.S_IMODE(node.mode)))
        elif stat.S_ISLNK(node.mode):
            place.symlink_to(node.content.decode("utf-8", "surrogateescape"))
        elif stat.S_ISREG(node.mode):
            with place.open("wb") as file:
                file.writelines(chunks_of(node.data))
            place.chmod(stat.S_IMODE(node.mode))
    for place, mode in reversed(permissions):
        place.chmod(mode)
    root.chmod(0o755)


def _make_ext4(tree: RootTree, root: Path, place: Path, name: str) -> None:
    nodes = [(path, node) for path, node in tree.nodes() if not stat.S_ISCHR(node.mode) and not stat.S_ISBLK(node.mode)]
    blocks = sum(-(-len(node.data) // BLOCK) + 1 for _, node in nodes)
    inodes = len(nodes) + 64
    total = int((blocks + inodes // 16) * SPARE) + 1024
    configuration = place.with_name("mke2fs.conf")
    configuration.write_text(_CONFIGURATION)
    _run(
        [
            "mke2fs",
            "-q",
            "-text4",
            f"-b{BLOCK}",
            f"-N{inodes}",
            "-m0",
            f"-U{name}",
            f"-Ehash_seed={name},lazy_itable_init=0,nodiscard,root_owner=0:0",
            f"-d{root}",
            str(place),
            str(total),
        ],
        MKE2FS_CONFIG=str(configuration),
    )
    script = place.with_name("inodes")
    script.write_text("".join(_set_inode(path, node) for path, node in [("", Node(stat.S_IFDIR | 0o755)), *nodes]))
    _run(["debugfs", "-w", f"-f{script}", str(place)])
    # What the tools wrote of the time of their work.
    times = "".join(f"ssv {field} 0\n" for field in ("mkfs_time", "wtime", "mtime", "lastcheck", "kbytes_written"))
    script.write_text(times)
    _run(["debugfs", "-w", f"-f{script}", str(place)])


def _set_inode(path: str, node: Node) -> str:
    """Commands of debugfs(8) that give an inode its owner and no time."""
    if '"' in path:  # it would end the name, and what follows would be a command
        raise ImageError(f"/{path} cannot be in an ext4 root: its name has a quotation mark, so exclude it")
    quoted = f'"/{path}"'
    fields = {"uid": node.uid, "gid": node.gid, "mode": f"0{node.mode:o}"}
    fields |= {f"{kind}time{extra}": "0" for kind in "acm" for extra in ("", "_extra")}
    fields |= {"crtime": "0", "crtime_extra": "0"}
    return "".join(f"sif {quoted} {field} {value}\n" for field, value in fields.items())


def _run(command: Sequence[str], **variables: str) -> None:
    path = os.pathsep.join((os.environ.get("PATH", ""), *_DIRECTORIES))
    program = shutil.which(command[0], path=path)
    if program is None:
        raise ImageError(f"this machine has no {command[0]}: install the package {_PACKAGES[command[0]]}")
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1", "LC_ALL": "C", **variables}
    answer = run_apart([program, *command[1:]], environment)
    if answer.returncode != 0:
        complaint = " ".join((answer.stderr or answer.stdout).split())[-300:]
        raise ImageError(f"{command[0]} could not make the root (status {answer.returncode}): {complaint}")
