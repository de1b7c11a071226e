"""Linux's virtio-net driver and real programs over passt, a wire between two VMs, and a tap."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.server
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from kata_lab.shell import GuestShell
from tests.guest.conftest import Boot
from tests.vmm.network.test_tap import set_up, tap_allowed
from vmm.config import NetworkConfig
from vmm.devices.virtio.net import NetworkDevice
from vmm.microvm import MicroVm
from vmm.network.passt import PasstPort
from vmm.network.tap import TapPort

MEMORY_MIB = 320
DOWNLOAD = 100 << 20
DATAGRAMS = "from socket import *; s = socket(AF_INET, SOCK_DGRAM)"  #: how a program for MicroPython begins


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    """Host ports that lead to the guest's 8000."""
    return {"tcp": free_port(), "udp": free_port(socket.SOCK_DGRAM)}


@pytest.fixture(scope="module")
def online(toolbox: Boot, ports: dict[str, int]) -> Iterator[tuple[MicroVm, GuestShell]]:
    """A guest with a passt, and an address that its DHCP client got."""
    config = NetworkConfig(forwards=(f"tcp {ports['tcp']}:8000", f"udp {ports['udp']}:8000"))
    with toolbox(devices=[config], memory_mib=MEMORY_MIB) as (vm, shell):
        shell.run("ip link set eth0 up && udhcpc -i eth0 -n -q", check=True)
        yield vm, shell


@pytest.fixture(scope="module")
def gateway(online: tuple[MicroVm, GuestShell]) -> str:
    """Behind which passt has the host."""
    _, shell = online
    return shell.run("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'", check=True).output.strip()


def device(vm: MicroVm) -> NetworkDevice:
    return cast(NetworkDevice, next(iter(vm.machine.devices.values())))


@contextlib.contextmanager
def iperf_server() -> Iterator[int]:
    port = free_port()
    with subprocess.Popen(
        ["iperf3", "--server", "--port", str(port), "--forceflush"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            while "listening" not in server.stdout.readline():
                assert server.poll() is None
            yield port
        finally:
            server.terminate()


@contextlib.contextmanager
def http_server(directory: Path) -> Iterator[int]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=os.fspath(directory))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, name="http")
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def test_driver_sees_the_offloads_and_the_large_mtu(online: tuple[MicroVm, GuestShell]) -> None:
    vm, shell = online
    assert shell.run("cat /sys/class/net/eth0/mtu").output == "65520\n"
    assert shell.run("cat /sys/class/net/eth0/carrier").output == "1\n"
    address = ":".join(f"{byte:02x}" for byte in device(vm).mac)
    assert shell.run("cat /sys/class/net/eth0/address").output == f"{address}\n"


@pytest.mark.parametrize("direction", ["", "--reverse"])
def test_iperf_in_both_directions(online: tuple[MicroVm, GuestShell], gateway: str, direction: str) -> None:
    _, shell = online
    with iperf_server() as port:
        result = shell.run(f"iperf3 --client {gateway} --port {port} --time 2 --json {direction}", check=True)
    assert json.loads(result.output)["end"]["sum_received"]["bytes"] > 1 << 20


def test_download_of_100_megabytes_is_intact(online: tuple[MicroVm, GuestShell], gateway: str, tmp_path: Path) -> None:
    _, shell = online
    data = os.urandom(DOWNLOAD)
    (tmp_path / "large").write_bytes(data)
    with http_server(tmp_path) as port:
        result = shell.run(f"wget -q -O - http://{gateway}:{port}/large | md5sum", timeout=200, check=True)
    assert result.output.split()[0] == hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_datagrams_go_both_ways(online: tuple[MicroVm, GuestShell], gateway: str) -> None:
    _, shell = online
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(20)
        program = (
            f"{DATAGRAMS}; s.sendto(b'question', getaddrinfo('{gateway}', {host.getsockname()[1]})[0][-1]);"
            " print(s.recv(100).decode())"
        )
        shell.run(f'micropython -c "{program}" >/tmp/answer 2>&1 &')
        question, guest = host.recvfrom(100)
        assert question == b"question"
        host.sendto(b"answer", guest)
        until(lambda: shell.run("cat /tmp/answer").output == "answer\n")


def test_host_reaches_the_guest_by_a_forward(online: tuple[MicroVm, GuestShell], ports: dict[str, int]) -> None:
    _, shell = online
    shell.run("echo from the guest | nc -l -p 8000 >/tmp/got 2>&1 &")
    until(lambda: shell.run("netstat -ltn | grep -q :8000").status == 0)
    with socket.create_connection(("127.0.0.1", ports["tcp"]), timeout=20) as connection:
        connection.sendall(b"from the host\n")
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as stream:
            assert stream.readline() == b"from the guest\n"
    until(lambda: shell.run("cat /tmp/got").output == "from the host\n")

    program = f"{DATAGRAMS}; s.bind(getaddrinfo('0.0.0.0', 8000)[0][-1]); print(s.recv(100).decode())"
    shell.run(f'micropython -c "{program}" >/tmp/datagram 2>&1 &')
    until(lambda: shell.run("netstat -lun | grep -q :8000").status == 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"datagram", ("127.0.0.1", ports["udp"]))
        until(lambda: shell.run("cat /tmp/datagram").output == "datagram\n")


def test_server_in_the_guest_may_speak_first(online: tuple[MicroVm, GuestShell], ports: dict[str, int]) -> None:
    _, shell = online
    shell.run("nc -ll -p 8000 -e echo from the guest >/dev/null 2>&1 &")
    until(lambda: shell.run("netstat -ltn | grep -q :8000").status == 0)
    said = []
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", ports["tcp"]), timeout=20) as connection:
            said.append(b"".join(iter(lambda: connection.recv(100), b"")))
    shell.run("killall nc")
    until(lambda: shell.run("netstat -ltn | grep -q :8000").status != 0)
    assert said == [b"from the guest\n"] * 20


def test_guest_that_ends_its_half_first_hears_the_answer_and_its_end(
    online: tuple[MicroVm, GuestShell], gateway: str
) -> None:
    _, shell = online
    count = 20
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(count):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"got " + connection.recv(100))

        thread = threading.Thread(target=answer, name="answer")
        thread.start()
        command = f"echo hello | timeout 20 nc {gateway} {server.getsockname()[1]} || echo no end"
        said = shell.run(f"for i in $(seq {count}); do {command}; done", timeout=100).output
        thread.join(20)
    assert said == "got hello\n" * count


def test_paused_guest_keeps_its_connections(online: tuple[MicroVm, GuestShell], gateway: str, tmp_path: Path) -> None:
    vm, shell = online
    data = os.urandom(20 << 20)
    (tmp_path / "large").write_bytes(data)
    with http_server(tmp_path) as port:
        shell.run(f"(wget -q -O - http://{gateway}:{port}/large | md5sum >/tmp/sum) &")
        for _ in range(3):
            vm.pause()
            time.sleep(0.1)
            vm.resume()
            time.sleep(0.1)
        until(lambda: shell.run("test -s /tmp/sum").status == 0)
    assert shell.run("cat /tmp/sum").output.split()[0] == hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_interface_that_goes_down_and_up_works_again(
    online: tuple[MicroVm, GuestShell], gateway: str, tmp_path: Path
) -> None:
    _, shell = online
    (tmp_path / "small").write_text("here\n")
    shell.run("ip link set eth0 down && ip link set eth0 up && udhcpc -i eth0 -n -q", check=True)
    with http_server(tmp_path) as port:
        assert shell.run(f"wget -q -O - http://{gateway}:{port}/small", check=True).output == "here\n"


def test_driver_that_is_unbound_and_bound_again_works(
    online: tuple[MicroVm, GuestShell], gateway: str, tmp_path: Path
) -> None:
    _, shell = online
    (tmp_path / "small").write_text("here\n")
    shell.run(
        "cd /sys/bus/virtio/drivers/virtio_net && each=$(ls -d virtio*) && echo $each >unbind && echo $each >bind"
        " && ip link set eth0 up && udhcpc -i eth0 -n -q",
        check=True,
    )
    with http_server(tmp_path) as port:
        assert shell.run(f"wget -q -O - http://{gateway}:{port}/small", check=True).output == "here\n"


def test_passt_killed_under_load_takes_the_link_down_and_the_guest_lives(toolbox: Boot) -> None:
    with toolbox(devices=[NetworkConfig(mtu=1500)], memory_mib=MEMORY_MIB) as (vm, shell), iperf_server() as port:
        shell.run("ip link set eth0 up && udhcpc -i eth0 -n -q", check=True)
        gateway = shell.run("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").output.strip()
        shell.run(f"iperf3 --client {gateway} --port {port} --time 30 >/dev/null 2>&1 &")
        interface = device(vm)
        until(lambda: interface.statistics.sent_bytes > 4 << 20)
        # The guest leaves it to passt to make segments of 1,500 bytes.
        assert interface.statistics.sent_bytes > 3000 * interface.statistics.sent_frames
        cast(PasstPort, interface.port).process.kill()
        until(lambda: shell.run("cat /sys/class/net/eth0/carrier").output == "0\n")
        assert shell.run("echo alive").output == "alive\n"


def test_two_vms_joined_by_a_socket_exchange_data(toolbox: Boot, tmp_path: Path) -> None:
    wire = NetworkConfig(backend="socket", socket=tmp_path / "wire")
    with (
        toolbox(devices=[wire], memory_mib=MEMORY_MIB) as (_, one),
        toolbox(devices=[wire], memory_mib=MEMORY_MIB) as (_, other),
    ):
        for number, shell in enumerate((one, other), 1):
            shell.run(
                f"echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad && ip link set eth0 up"
                f" && ip addr add 10.9.0.{number}/24 dev eth0 && ip addr add fd09::{number}/64 dev eth0",
                check=True,
            )
        one.run("ping -c 1 -w 20 10.9.0.2 && ping -c 1 -s 50000 -w 20 fd09::2", check=True)
        one.run("cat /usr/bin/* | head -c 8000000 >/tmp/data")
        other.run("sleep 100 | nc -l -p 8000 >/tmp/data &")  # who sends nothing and goes on listening
        until(lambda: other.run("netstat -ltn | grep -q :8000").status == 0)
        one.run("nc 10.9.0.2 8000 </tmp/data", check=True)
        expected = one.run("md5sum /tmp/data").output
        until(lambda: other.run("md5sum /tmp/data").output == expected)


def test_several_pairs_of_queues_are_used(toolbox: Boot) -> None:
    with (
        toolbox(devices=[NetworkConfig(queues=2)], memory_mib=MEMORY_MIB, vcpus=2) as (vm, shell),
        iperf_server() as port,
    ):
        shell.run("ip link set eth0 up && udhcpc -i eth0 -n -q", check=True)
        gateway = shell.run("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").output.strip()
        assert shell.run("ls -d /sys/class/net/eth0/queues/tx-*").output.count("tx-") == 2
        for cpu in (0, 1):
            shell.run(f"taskset {1 << cpu} iperf3 --client {gateway} --port {port} --time 1 --bidir", check=True)
        assert device(vm).queues[3].view()["next_used"] > 0
        assert device(vm).queues[2].view()["next_used"] > 0


def set_address(name: str, address: str) -> None:
    """Of an interface, with the mask that addresses of 192.168 have by themselves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(control, 0x8916, request)  # SIOCSIFADDR


def test_tap_reaches_the_host_where_taps_are_allowed(toolbox: Boot, tmp_path: Path) -> None:
    if not tap_allowed():
        return
    with toolbox(devices=[NetworkConfig(backend="tap")], memory_mib=MEMORY_MIB) as (vm, shell), iperf_server() as port:
        name = cast(TapPort, device(vm).port).name
        set_address(name, "192.168.213.1")
        set_up(name)
        shell.run("ip link set eth0 up && ip addr add 192.168.213.2/24 dev eth0", check=True)
        shell.run("ping -c 1 -w 20 192.168.213.1", check=True)
        for direction in ("", "--reverse"):
            result = shell.run(f"iperf3 --client 192.168.213.1 --port {port} --time 2 --json {direction}", check=True)
            assert json.loads(result.output)["end"]["sum_received"]["bytes"] > 1 << 20
        # Segments of more than the MTU went through whole.
        statistics = device(vm).statistics
        assert statistics.sent_bytes > 3000 * statistics.sent_frames
