"""One guest for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kata_lab.agent.guest import AgentGuest, agent_guest


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentGuest]:
    """A guest with a sandbox."""
    with agent_guest(tmp_path_factory.mktemp("guest")) as running:
        yield running
