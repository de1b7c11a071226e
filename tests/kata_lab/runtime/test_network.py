"""Containers behind passt: the host through the gateway, a port forwarded to them, and the names they know."""

from __future__ import annotations

import socket
import threading
import urllib.request
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
        gateway = "$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')"
        said = online.shell(f"echo hello | nc -w 20 {gateway} {server.getsockname()[1]}")
        thread.join(10)

    assert said == "got hello\n"


def test_host_reaches_a_container_through_a_port(online: Guest, port: int) -> None:
    # It goes into the background when it listens.
    script = "mkdir /www; echo served > /www/index.html; httpd -p 8000 -h /www && echo up && exec sleep 1000"
    container, process = online.started("sh", "-c", script)
    try:
        assert online.wait(process.stdout.read()) == b"up\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            said = answer.read()
    finally:
        online.remove(container)

    assert said == b"served\n"


def test_address_names_and_resolver_are_the_hosts(online: Guest) -> None:
    expected = network_behind_passt()
    assert expected is not None

    shown = "ip -4 -o addr show eth0 | awk '{print $4}'; hostname; grep webby /etc/hosts"
    lines = online.shell(f"{shown}; cat /etc/hostname /etc/resolv.conf").splitlines()

    address = f"{expected.address}/{expected.prefix}"
    assert lines == [address, "webby", f"{expected.address} webby", "webby", *expected.resolver]


def test_network_is_lost_on_nobody_else(online: Guest) -> None:
    assert online.shell("ip -o link | wc -l; cat /sys/class/net/eth0/mtu").split() == ["2", "65520"]
