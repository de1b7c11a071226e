"""Linux's vsock driver against the socket device: a thousand echoes at once, both directions, ends of all kinds."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.shell import GuestShell, boot_image
from vmm import MicroVm
from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.device import VsockDevice

CONNECTIONS = 1000
ECHO_BYTES = 1 << 20
ECHO, HASH, SILENT, TALKING = 7000, 5001, 5002, 5003
ECHO_PORTS = 50
HOST = 6000

PROGRAM = b"""#!/usr/bin/micropython
# What runs in the guest: "serve", or "send" and "connect" with a port of the host and more.
import ffi, hashlib, socket, struct, sys

def address(port, cid):
    return struct.pack("<HHIIBBBB", 40, 0, port, cid, 0, 0, 0, 0)

def listen(port):
    listening = socket.socket(40, 1)
    listening.bind(address(port, 0xFFFFFFFF))
    listening.listen(1024)
    return listening

def connect(port):
    connected = socket.socket(40, 1)
    connected.connect(address(port, 2))
    return connected

def digest(connected):
    found, block = hashlib.sha256(), bytearray(65536)
    while True:
        length = connected.readinto(block)
        if not length:
            return "".join("%02x" % byte for byte in found.digest())
        found.update(memoryview(block)[:length])

def echo(listeners):
    # poll(2) looks at all thousand sockets every time; epoll is only to be had through ffi.
    libc = ffi.open("libc.so.6")
    wait = libc.func("i", "epoll_wait", "ipii")
    control = libc.func("i", "epoll_ctl", "iiip")
    epoll = libc.func("i", "epoll_create1", "i")(0)
    listeners = {listening.fileno(): listening for listening in listeners}
    for number in listeners:
        control(epoll, 1, number, struct.pack("<IIQ", 1, 0, number))
    events, block, sockets = bytearray(16 * 256), memoryview(bytearray(262144)), {}
    while True:
        for place in range(8, 8 + 16 * wait(epoll, events, 256, -1), 16):
            number = struct.unpack_from("<I", events, place)[0]
            if number in listeners:
                connected, _ = listeners[number].accept()
                connected.setblocking(False)
                sockets[connected.fileno()] = connected
                control(epoll, 1, connected.fileno(), struct.pack("<IIQ", 1, 0, connected.fileno()))
                continue
            ready = sockets[number]
            length = ready.readinto(block)
            if length is None:
                continue
            if not length:
                sockets.pop(number).close()
                continue
            done = ready.write(block[:length]) or 0
            if done < length:
                ready.setblocking(True)
                ready.write(block[done:length])
                ready.setblocking(False)

mode, port = sys.argv[1], int(sys.argv[2])
if mode == "echo":
    listeners = [listen(port + number) for number in range(int(sys.argv[3]))]
    print("listening")
    echo(listeners)
elif mode == "digest":
    listening = listen(port)
    print("listening")
    while True:
        connected, _ = listening.accept()
        connected.write(digest(connected))
        connected.close()
elif mode == "silent":
    listening = listen(port)
    print("listening")
    kept = []
    while True:
        kept.append(listening.accept()[0])
elif mode == "talk":
    listening = listen(port)
    print("listening")
    connected, _ = listening.accept()
    while True:
        connected.write(bytes(65536))
elif mode == "send":
    blocks = int(sys.argv[3])
    connections = [connect(port) for _ in range(int(sys.argv[4]))]
    for number, connected in enumerate(connections):
        connected.write(struct.pack("<I", number))
    for place in range(blocks):
        for number, connected in enumerate(connections):
            connected.write(bytes([number & 255, place & 255]) * 32768)
    for connected in connections:
        connected.close()
    print("sent")
"""

CLIENT = """
import random, selectors, socket, sys, time
path = sys.argv[1]
port, ports, count, length = map(int, sys.argv[2:])
noise = memoryview(random.Random(1).randbytes(length + 8 * count))
clients = []
for number in range(count):
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.sendall(b"CONNECT %d\\n" % (port + number % ports))
    clients.append(client)
selector = selectors.DefaultSelector()
for number, client in enumerate(clients):
    answer = b""
    while not answer.endswith(b"\\n"):
        part = client.recv(1)
        assert part, f"connection {number} was refused"
        answer += part
    assert answer.startswith(b"OK "), answer
    client.setblocking(False)
    # Each connection says something else.
    data = noise[8 * number : 8 * number + length]
    selector.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE, [data, 0, 0])
print("connected", flush=True)
began = time.monotonic()
block = memoryview(bytearray(1 << 18))
left = count
while left:
    for key, events in selector.select():
        client, state = key.fileobj, key.data
        data, sent, received = state
        if events & selectors.EVENT_WRITE:
            try:
                state[1] += client.send(data[sent : sent + (1 << 18)])
            except BlockingIOError:
                pass
            if state[1] == length:
                selector.modify(client, selectors.EVENT_READ, state)
        if events & selectors.EVENT_READ:
            size = client.recv_into(block)
            assert size, f"the end after {received} bytes"
            assert block[:size] == data[received : received + size], f"wrong bytes at {received}"
            state[2] += size
            if state[2] == length:
                selector.unregister(client)
                client.close()
                left -= 1
print(f"{count} x {length} bytes in {time.monotonic() - began:.1f} s")
"""


class Booted:
    """The guest, its device, and where the host's sockets are."""

    def __init__(self, vm: MicroVm, shell: GuestShell, path: Path) -> None:
        self.vm, self.shell, self.path = vm, shell, path
        device = vm.machine.device("vsock0")
        assert isinstance(device, VsockDevice)
        self.device = device

    def serve(self, mode: str, port: int, more: str = "") -> None:
        self.shell.run(
            f"ulimit -n 4096; vsock-peer {mode} {port} {more} >/tmp/{port} 2>&1 & "
            f"echo $! >/tmp/{port}.pid; until grep -q listening /tmp/{port}; do sleep 0.1; done",
            check=True,
        )

    def settled(self, connections: int = 0) -> bool:
        """Whether so many connections are left soon."""
        until = time.monotonic() + 20
        while self.device.statistics.connections != connections:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    path = tmp_path_factory.mktemp("vsock") / "socket"
    config = VsockConfig(socket=path)
    with boot_image("toolbox", devices=[config], memory_mib=1024, files={"/usr/bin/vsock-peer": PROGRAM}) as (
        vm,
        shell,
    ):
        yield Booted(vm, shell, path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_connections_echo_a_megabyte_each(booted: Booted) -> None:
    # Linux finds a connection by a list of all that share the guest's port: with one port half the time goes there.
    booted.serve("echo", ECHO, str(ECHO_PORTS))
    opened = booted.device.statistics.opened

    client = subprocess.run(
        [sys.executable, "-c", CLIENT, booted.path, *map(str, (ECHO, ECHO_PORTS, CONNECTIONS, ECHO_BYTES))],
        capture_output=True,
        text=True,
        timeout=270,
    )

    assert client.returncode == 0, client.stderr
    assert booted.device.statistics.opened == opened + CONNECTIONS
    assert booted.settled(), booted.device.statistics
    print(client.stdout)


def test_the_guest_opens_connections_and_all_its_bytes_arrive(booted: Booted) -> None:
    count, blocks = 40, 8
    found: dict[int, str] = {}

    def receive(host: socket.socket) -> None:
        with host:
            number = int.from_bytes(host.recv(4, socket.MSG_WAITALL), "little")
            digest = hashlib.sha256()
            while data := host.recv(1 << 18):
                digest.update(data)
            found[number] = digest.hexdigest()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{booted.path}_{HOST}")
        listening.listen(8)

        def accept() -> None:
            workers = [threading.Thread(target=receive, args=listening.accept()[:1], daemon=True) for _ in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        assert booted.shell.run(f"vsock-peer send {HOST} {blocks} {count}", check=True).output == "sent\n"
        accepting.join(60)

    for number in range(count):
        sent = b"".join(bytes([number & 255, place]) * 32768 for place in range(blocks))
        assert found[number] == hashlib.sha256(sent).hexdigest(), number
    assert booted.settled()


def test_an_answer_comes_after_a_half_close(booted: Booted) -> None:
    booted.serve("digest", HASH)
    data = random.Random(2).randbytes(3_000_001)
    with booted.device.dial(HASH).result(10) as host:
        host.settimeout(30)
        host.sendall(data)
        host.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: host.recv(64), b""))

    assert answer.decode() == hashlib.sha256(data).hexdigest()
    assert booted.settled()


def test_socat_relays_in_both_directions(booted: Booted) -> None:
    booted.shell.run("socat VSOCK-LISTEN:5010,fork EXEC:'tr a-z A-Z' & sleep 1", check=True)
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(30)
        host.connect(str(booted.path))
        host.sendall(b"CONNECT 5010\nshout")
        host.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: host.recv(64), b""))

    assert answer.startswith(b"OK ")
    assert answer.endswith(b"SHOUT")


def test_a_port_where_nobody_listens_is_refused_on_both_sides(booted: Booted) -> None:
    with pytest.raises(Exception, match="nobody in the guest listens on vsock port 4321"):
        booted.device.dial(4321).result(10)

    refused = booted.shell.run("socat - VSOCK-CONNECT:2:4321 </dev/null")
    assert refused.status == 1
    assert "Connection reset by peer" in refused.output


def test_a_host_process_killed_while_it_sends_leaves_nothing(booted: Booted) -> None:
    booted.serve("silent", SILENT)
    program = (
        "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n"
        f"s.sendall(b'CONNECT {SILENT}\\n')\nassert s.recv(64)\nprint('ok', flush=True)\n"
        "while True: s.sendall(bytes(65536))"
    )
    with subprocess.Popen([sys.executable, "-c", program, booted.path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ok\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # The guest has not read: its end stays until its process does, whose bytes are still in the host's socket.
    booted.shell.run(f"kill $(cat /tmp/{SILENT}.pid)", check=True)

    assert booted.settled()


def test_a_guest_process_killed_while_it_sends_ends_the_hosts_socket(booted: Booted) -> None:
    booted.serve("talk", TALKING)
    with booted.device.dial(TALKING).result(10) as host:
        host.settimeout(30)
        assert host.recv(65536, socket.MSG_WAITALL) == bytes(65536)
        booted.shell.run(f"kill -9 $(cat /tmp/{TALKING}.pid)", check=True)
        while data := host.recv(1 << 18):
            assert not any(data)

    assert booted.settled()


def test_connections_survive_a_pause(booted: Booted) -> None:
    booted.serve("digest", HASH + 100)
    with booted.device.dial(HASH + 100).result(10) as host:
        host.settimeout(30)
        host.sendall(b"before ")
        booted.vm.pause()
        host.sendall(b"and after")
        host.shutdown(socket.SHUT_WR)
        booted.vm.resume()
        answer = b"".join(iter(lambda: host.recv(64), b""))

    assert answer.decode() == hashlib.sha256(b"before and after").hexdigest()


def test_the_guests_shutdown_closes_every_socket_of_the_host(tmp_path: Path) -> None:
    config = VsockConfig(socket=tmp_path / "socket")
    with boot_image("toolbox", devices=[config], files={"/usr/bin/vsock-peer": PROGRAM}) as (vm, shell):
        guest = Booted(vm, shell, tmp_path / "socket")
        guest.serve("silent", SILENT)
        hosts = [guest.device.dial(SILENT).result(10) for _ in range(3)]

    for host in hosts:
        with host:
            assert host.recv(64) == b""
    assert not os.path.exists(tmp_path / "socket")
