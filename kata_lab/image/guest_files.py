"""What the project itself puts into a guest: its init, and the agent with the protocols it speaks.

The agent's interface is made from the same interface files as the host's: a module with the messages' fields and the
methods' messages as plain tables, since the guest has no reader for interface files.
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
    lines = [
        '"""The agent API: the fields of its messages by number, and the messages of its methods."""',
        "",
        "MESSAGES = {",
    ]
    for name, fields in sorted(interface.messages.items()):
        lines.append(f"    {name!r}: {fields!r},")
    lines += ["}", "METHODS = {"]
    for service, methods in sorted(interface.services.items()):
        for name, method in sorted(methods.items()):
            lines.append(f"    {f'{service}/{name}'!r}: ({method.request!r}, {method.response!r}),")
    lines += ["}", ""]
    return "\n".join(lines).encode()
