"""Where Kata Lab keeps its files: a cache that may be deleted at any time, the state of what runs now, and records.

========================  ===========================================  ==============================
directory                 place                                        with ``KATA_LAB_HOME`` set
========================  ===========================================  ==============================
cache (images, packages)  ``$XDG_CACHE_HOME/kata-lab``                 ``$KATA_LAB_HOME/cache``
state (running sandboxes) ``$XDG_RUNTIME_DIR/kata-lab``, else a        ``$KATA_LAB_HOME/state``
                          private one under the temporary directory
records (of a learner)    ``$XDG_STATE_HOME/kata-lab``, else           ``$KATA_LAB_HOME/records``
                          ``~/.local/state/kata-lab``
========================  ===========================================  ==============================

Follows the XDG Base Directory Specification 0.8: a relative path in one of its variables is ignored.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kata_lab.errors import KataLabError

HOME_VARIABLE = "KATA_LAB_HOME"


def cache_directory() -> Path:
    """The directory of images, packages and compiled code, created if need be.

    Raises:
        KataLabError: it cannot be created or written to.
    """
    return _kept("cache", "XDG_CACHE_HOME", ".cache")


def records_directory() -> Path:
    """The directory of what outlives a restart of the machine: a learner's score. Created if need be.

    Raises:
        KataLabError: it cannot be created or written to.
    """
    return _kept("records", "XDG_STATE_HOME", ".local/state")


def _kept(name: str, variable: str, default: str) -> Path:
    """A directory that stays, beneath the home directory unless the environment says otherwise."""
    home = _home()
    if home is not None:
        return _made(home / name)
    base = _absolute(variable)
    if base is None:
        try:
            base = Path.home() / default
        except RuntimeError as error:
            raise KataLabError(f"this user has no home directory: set {HOME_VARIABLE} to a directory to use") from error
    return _made(base / "kata-lab")


def state_directory() -> Path:
    """The directory of what runs now (sockets, records of sandboxes), private to this user (mode 0700).

    Raises:
        KataLabError: it cannot be created, or belongs to somebody else, or is a symbolic link.
    """
    home = _home()
    if home is not None:
        return _private(home / "state")
    runtime = _absolute("XDG_RUNTIME_DIR")
    if runtime is not None and runtime.is_dir():
        return _private(runtime / "kata-lab")
    import tempfile

    return _private(Path(tempfile.gettempdir()) / f"kata-lab-{os.getuid()}")


def _home() -> Path | None:
    value = os.environ.get(HOME_VARIABLE)
    if not value:
        return None
    home = Path(value).expanduser()
    if not home.is_absolute():
        raise KataLabError(f"{HOME_VARIABLE} is {value!r}: it must be an absolute path")
    return home


def _absolute(variable: str) -> Path | None:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else None


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error
    return path


def _private(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise KataLabError(
                f"the state directory {path} must be a directory of user {os.getuid()}, "
                f"but it belongs to user {found.st_uid} or is a link: remove it or set {HOME_VARIABLE}"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise _unusable(path, error) from error
    return path


def _unusable(path: Path, error: OSError) -> KataLabError:
    return KataLabError(
        f"the directory {path} cannot be used ({error.strerror}): make it writable or set {HOME_VARIABLE}"
    )
