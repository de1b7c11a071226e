"""Programs of the guest that die at the wrong moment: crun at every step, and the agent itself."""

from __future__ import annotations

import pytest

from kata_lab.ttrpc import RpcError
from tests.kata_lab.agent.guest import STORAGES, AgentGuest, InGuest, StatusCode, configuration

HOST = {"linux": {"namespaces": [{"type": "mount"}]}}  # it sees the guest's processes


@pytest.mark.parametrize("milliseconds", [0, 5, 10, 20, 30, 45, 60])
def test_crun_killed_while_it_creates_leaves_nothing(guest: AgentGuest, milliseconds: int) -> None:
    name = guest.name()
    container = InGuest(guest, name)
    with guest.dial(1026) as connection:
        connection.sendall(_killer(milliseconds))
        connection.recv(1)
        failed = None
        try:
            container.create(_sleeper())
        except RpcError as error:
            failed = error
    if failed is None:
        guest.call("RemoveContainer", container_id=name)
    else:
        assert failed.code is StatusCode.INTERNAL
    # The same name can be used at once, and all is as it should be.
    container.create(_sleeper())
    guest.call("StartContainer", container_id=name)
    container.exec("e", ["/bin/echo", "well"])
    assert container.finish("e") == (0, "well\n")
    guest.call("RemoveContainer", container_id=name)


@pytest.mark.parametrize("milliseconds", [0, 5, 10, 20, 30, 40])
def test_crun_killed_while_it_enters_leaves_no_process(guest: AgentGuest, milliseconds: int) -> None:
    with guest.container(["/bin/sleep", "1000"]) as container:
        failed = None
        with guest.dial(1026) as connection:
            connection.sendall(_killer(milliseconds))
            connection.recv(1)
            try:
                container.exec("e", ["/bin/sleep", "77"])
            except RpcError as error:
                failed = error
        if failed is not None:
            assert failed.code is StatusCode.INTERNAL
            container.exec("look", ["/bin/sh", "-c", "ps | grep -c 'slee[p] 77'"])
            assert container.finish("look") == (1, "0\n")
        else:
            container.signal(9, "e")
            assert container.wait("e") == 128 + 9


def test_an_agent_that_was_killed_comes_back_and_says_that_its_sandbox_is_gone(guest: AgentGuest) -> None:
    container = InGuest(guest, guest.name())
    container.create(_sleeper())
    guest.call("StartContainer", container_id=container.id)
    with guest.dial(1026) as connection:
        connection.sendall(b"killall -9 micropython\n")
        with pytest.raises(RpcError) as failed:
            container.wait()
    assert failed.value.code is StatusCode.UNAVAILABLE
    guest.run(guest.agent.close())
    guest.agent = guest.connect()
    error = guest.refused("WaitProcess", **container.ids())
    assert (error.code, "started again" in str(error)) == (StatusCode.NOT_FOUND, True)
    guest.call("CreateSandbox", sandbox_id="s2", storages=STORAGES)
    look = ["/bin/sh", "-c", "ps | grep -c 'slee[p] 1000'; cat /proc/1/mounts | grep -c containers/c"]
    assert guest.output(look, **HOST)[1] == "0\n1\n", "nothing but the root of the container that looks"


def _sleeper() -> dict[str, object]:
    return configuration(["/bin/sleep", "1000"])


def _killer(milliseconds: int) -> bytes:
    """Kills crun as soon as there is one, or so long after it began."""
    find = "while ! pidof crun > /dev/null; do :; done"
    return f"{find}; usleep {milliseconds * 1000}; killall -9 crun; exit\n".encode()
