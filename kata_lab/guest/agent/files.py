"""Files that the host puts into the guest (CopyFile): below /run, and never through a symbolic link, since a container
can make links in its own root, which is below /run too."""

import linux
from rpc import INVALID_ARGUMENT, RpcError

_TYPE, _DIRECTORY, _LINK, _FILE = 0o170000, 0o040000, 0o120000, 0o100000
_PARTIAL = ".kata-partial"


def parts_of(path):
    """The names that a path below /run consists of, without ``run``."""
    parts = path.split("/")
    if parts[:2] != ["", "run"] or len(parts) < 3 or any(each in ("", ".", "..") for each in parts[2:]) or "\0" in path:
        raise RpcError(INVALID_ARGUMENT, f"path {path!r} must be absolute, plain and below /run")
    return parts[2:]


def enter(parts, mode):
    """A descriptor of the directory ``/run/…``, whose missing parents are made."""
    descriptor = linux.open_file("/run", linux.O_PATH | linux.O_DIRECTORY)
    for part in parts:
        try:
            inner = linux.enter_directory(descriptor, part, mode)
        except OSError as error:
            if error.args[0] in (linux.ENOTDIR, linux.ELOOP):
                raise RpcError(INVALID_ARGUMENT, f"{part!r} in /run/{'/'.join(parts)} is no directory")
            raise
        finally:
            linux.close(descriptor)
        descriptor = inner
    return descriptor


def make_directory(path):
    """Make a directory below /run, with its parents."""
    linux.close(enter(parts_of(path), 0o755))


def copy(request):
    """Take one piece of a file, which gets its name with the last piece; or make a directory or a symbolic link."""
    path, data, offset, size = request["path"], request["data"], request["offset"], request["file_size"]
    parts = parts_of(path)
    kind = request["file_mode"] & _TYPE or _FILE
    mode = request["file_mode"] & 0o7777
    owner = request["uid"] & 0xFFFFFFFF, request["gid"] & 0xFFFFFFFF
    if kind not in (_FILE, _DIRECTORY, _LINK):
        raise RpcError(INVALID_ARGUMENT, f"file_mode {request['file_mode']:#o} must be of a file, directory or link")
    if kind == _FILE and not 0 <= offset <= offset + len(data) <= size:
        text = f"{len(data)} bytes at offset {offset} are not inside a file of {size} bytes"
        raise RpcError(INVALID_ARGUMENT, text)
    parent = enter(parts[:-1], request["dir_mode"] & 0o7777 or 0o755)
    try:
        if kind == _FILE:
            _copy_part(parent, parts[-1], data, offset, size, mode or 0o644, owner)
        elif kind == _LINK:
            linux.remove_below(parent, parts[-1])
            linux.link_below(bytes(data), parent, parts[-1])
            linux.set_owner(parent, parts[-1], *owner)
        else:
            linux.close(linux.enter_directory(parent, parts[-1], mode or 0o755))
            linux.set_owner(parent, parts[-1], *owner)
    finally:
        linux.close(parent)


def _copy_part(parent, name, data, offset, size, mode, owner):
    partial = name + _PARTIAL
    if offset == 0:
        linux.remove_below(parent, partial)
    flags = linux.O_WRONLY | (linux.O_CREAT | linux.O_TRUNC if offset == 0 else 0)
    file = linux.open_below(parent, partial, flags, 0o600)
    try:
        linux.write_at(file, offset, data)
        if offset + len(data) < size:
            return
        linux.set_owner(parent, partial, *owner)
        linux.set_mode_of(file, mode)
    finally:
        linux.close(file)
    linux.rename_below(parent, partial, name)
