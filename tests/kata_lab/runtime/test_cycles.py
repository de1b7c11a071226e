"""Lives of containers and sandboxes leave nothing behind; ``cycles`` does as many as one likes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from kata_lab.runtime import Sandbox
from tests.kata_lab.runtime.conftest import Loop
from tests.kata_lab.runtime.cycles import (
    CONSOLE,
    MEMORY_MIB,
    WARM_UP,
    Held,
    anonymous_memory,
    container_life,
    sandbox_life,
    settled,
    steady,
)

CONTAINERS = 200
SANDBOXES = 2
MOST_GROWTH = 4 << 20  # bytes: what Python keeps for later, and the calls that are remembered


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What others run meanwhile is in another directory; this one's path is short, as those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="kl-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield


def test_containers_of_a_sandbox_leave_nothing_in_the_process_and_in_the_guest(loop: Loop) -> None:
    async def lives() -> tuple[Held, Held, int]:
        async with Sandbox.create(memory_mib=MEMORY_MIB, append=CONSOLE) as sandbox:
            for _ in range(WARM_UP):
                await container_life(sandbox)
            before, memory = await steady(sandbox), anonymous_memory()
            for _ in range(CONTAINERS):
                await container_life(sandbox)
            return before, await settled(before, sandbox), anonymous_memory() - memory

    before, after, grown = loop(lives())

    assert after == before
    assert grown < MOST_GROWTH


def test_sandboxes_leave_nothing_in_the_process(loop: Loop) -> None:
    async def lives() -> tuple[Held, Held]:
        await sandbox_life()
        before = await steady()
        for _ in range(SANDBOXES):
            await sandbox_life()
        return before, await settled(before)

    before, after = loop(lives())

    assert after == before
