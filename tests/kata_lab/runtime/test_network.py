"""Containers behind passt: the host through the gateway, a port forwarded to them, and the names they know."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from kata_lab.resource.network import network_behind_passt
from kata_lab.runtime import Sandbox
from tests.kata_lab.runtime.conftest import Guest, Loop
from vmm.config import NetworkConfig


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])


@pytest.fixture(scope="module")
def online(loop: Loop, port: int) -> Iterator[Guest]:
    sandbox = Sandbox.create(network=NetworkConfig(forwards=(f"tcp {port}:8000",)), hostname="webby", memory_mib=192)
    loop(sandbox.start())
    try:
        yield Guest(sandbox, loop)
    finally:
        loop(sandbox.stop())


def test_container_reaches_the_host_through_the_gateway(online: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"got " + connection.recv(100))

        thread = threading.Thread(target=answer)
        thread.start()
        number = server.getsockname()[1]
        script = f"g=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); echo hello | nc -w 5 $g {number}"
        said = online.shell(script)
        thread.join(10)

    assert said == "got hello\n"


def test_host_reaches_a_container_through_a_port(online: Guest, port: int) -> None:
    container, process = online.started("sh", "-c", "echo up; nc -l -p 8000 -e echo from the container")
    try:
        assert online.wait(process.stdout.read()) == b"up\n"
        said = b""
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                said = connection.recv(100)
            if said:
                break
            threading.Event().wait(0.05)
    finally:
        online.remove(container)

    assert said == b"from the container\n"


def test_address_names_and_resolver_are_the_hosts(online: Guest) -> None:
    expected = network_behind_passt()
    assert expected is not None

    lines = online.shell(
        "ip -4 -o addr show eth0 | awk '{print $4}'; hostname; grep webby /etc/hosts; cat /etc/hostname /etc/resolv.conf"
    ).splitlines()

    address = f"{expected.address}/{expected.prefix}"
    assert lines == [address, "webby", f"{expected.address} webby", "webby", *expected.resolver]


def test_network_is_lost_on_nobody_else(online: Guest) -> None:
    assert online.shell("ip -o link | wc -l; cat /sys/class/net/eth0/mtu").split() == ["2", "65520"]
