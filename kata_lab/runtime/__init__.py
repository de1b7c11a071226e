"""The container runtime: sandboxes, containers and processes, all asynchronous.

::

    async with Sandbox.create() as sandbox:
        result = await sandbox.run(["uname", "-a"])
        print(result.output)

:mod:`kata_lab.runtime.sync` is the same for scripts without asyncio. The names are imported when they are first used,
so that :mod:`kata_lab.runtime.state` alone costs a command line little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kata_lab.runtime.config import RunResult, SandboxConfig, SandboxState
    from kata_lab.runtime.container import Container, ContainerState
    from kata_lab.runtime.errors import RuntimeFault
    from kata_lab.runtime.process import Process
    from kata_lab.runtime.sandbox import Sandbox

_PLACES = {
    "Container": "container",
    "ContainerState": "container",
    "Process": "process",
    "RunResult": "config",
    "RuntimeFault": "errors",
    "Sandbox": "sandbox",
    "SandboxConfig": "config",
    "SandboxState": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


__all__ = [
    "Container",
    "ContainerState",
    "Process",
    "RunResult",
    "RuntimeFault",
    "Sandbox",
    "SandboxConfig",
    "SandboxState",
]
