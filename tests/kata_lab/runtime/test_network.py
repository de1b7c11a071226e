"""Containers behind passt: the host through the gateway, a port forwarded to them, and the names they know."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
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


# passt of Debian 12 sometimes keeps what comes together with a connection's end, hence second attempts.
ATTEMPTS = 8


def test_container_reaches_the_host_through_the_gateway(online: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for connection in iter(lambda: server.accept()[0], None):
                with connection:
                    asked = connection.recv(1000)
                    if asked == b"end":
                        return
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\ngot\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            number = server.getsockname()[1]
            address = "http://$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')"
            said = online.shell(
                f"for i in $(seq {ATTEMPTS}); do timeout 4 wget -q -O - {address}:{number}/ && exit; done; exit 1"
            )
        finally:
            with socket.create_connection(server.getsockname()) as last:
                last.sendall(b"end")
            thread.join(10)

    assert said == "got\n"


def test_host_reaches_a_container_through_a_port(online: Guest, port: int) -> None:
    script = "mkdir /www; echo served > /www/index.html; echo up; exec httpd -f -p 8000 -h /www"
    container, process = online.started("sh", "-c", script)
    try:
        assert online.wait(process.stdout.read()) == b"up\n"
        said = b""
        for _ in range(ATTEMPTS):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=4) as answer:
                said = answer.read()
                break
            time.sleep(0.1)
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
