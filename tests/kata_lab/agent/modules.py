"""Modules of the guest that need nothing of MicroPython, for tests on the host."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from unittest import mock

import kata_lab
from kata_lab.protocol import wire


def guest_module(name: str) -> ModuleType:
    """A module of the agent, which finds ``wire`` under the name that it has in the guest."""
    source = (Path(kata_lab.__file__).parent / "guest" / "agent" / f"{name}.py").read_text()
    module = ModuleType(name)
    with mock.patch.dict("sys.modules", {"wire": wire}):
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module
