"""What the project itself puts into a guest: its init, and the agent with the protocols it speaks.

The agent's interface is made from the same interface files as the host's: a module with the messages' fields and the
methods' messages, since the guest has no reader for interface files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import kata_lab

AGENT_DIRECTORY: Final = "usr/lib/kata-lab"
AGENT: Final = f"/{AGENT_DIRECTORY}/agent.py"

_PACKAGE = Path(kata_lab.__file__).parent
_INTERFACES = ("agent.proto", "health.proto", "ttrpc.proto")


def init_program() -> bytes:
    """PID 1."""
    return (_PACKAGE / "guest" / "init.py").read_bytes()


def agent_files() -> dict[str, bytes]:
    """Path, without the leading ``/`` → content, of everything that the agent consists of."""
    files = {path.name: path.read_bytes() for path in sorted((_PACKAGE / "guest" / "agent").glob("*.py"))}
    files["wire.py"] = (_PACKAGE / "protocol" / "wire.py").read_bytes()
    files["interface.py"] = _interface()
    return {f"{AGENT_DIRECTORY}/{name}": content for name, content in files.items()}


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
