"""The container runtime: sandboxes, containers and processes, all asynchronous.

::

    async with Sandbox.create() as sandbox:
        result = await sandbox.run(["uname", "-a"])
        print(result.output)

:mod:`kata_lab.runtime.sync` is the same for scripts without asyncio.
"""

from __future__ import annotations

from kata_lab.runtime.container import Container, ContainerState
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.process import Process
from kata_lab.runtime.sandbox import RunResult, Sandbox, SandboxConfig, SandboxState

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
