"""All devices in one guest: at work at the same time, paused, put back from their saved states, pulled away, broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kata_lab.shell import GuestShell
from tests.guest.conftest import Boot
from tests.guest.test_net_guest import http_server, iperf_server
from vmm.config import (
    BalloonConfig,
    BlockConfig,
    DeviceConfig,
    EntropyConfig,
    FsConfig,
    NetworkConfig,
    PortsConfig,
    VsockConfig,
)
from vmm.devices.virtio import build_device
from vmm.devices.virtio.balloon import BalloonDevice
from vmm.devices.virtio.console import Port, PortsDevice
from vmm.devices.virtio.mmio import VirtioMmio
from vmm.devices.virtio.vsock.device import VsockDevice
from vmm.microvm import MicroVm

MIB = 1 << 20
ECHO = 7000
ROUNDS = 3
COMPLAINTS = re.compile(r"rcu.*stall|soft lockup|hung task|BUG:|Oops|Unable to handle|I/O error|blocked for more")

# A loop for each device, until /tmp/end is there; what went wrong is in /tmp/wrong.
LOAD = r"""
mkdir -p /mnt/share /tmp/tree && rm -f /tmp/end /tmp/wrong
mountpoint -q /mnt/share || mount -t virtiofs share /mnt/share || exit 1
for n in $(seq 60); do mkdir -p /tmp/tree/$((n % 7)); seq $((n * 50)) > /tmp/tree/$((n % 7))/$n; done
echo 0 > /tmp/rounds.fs
forever() {
    log=/tmp/last.$1.$2
    while ! test -e /tmp/end; do "$@" > $log 2>&1 || { echo "$@: $(tail -n 3 $log)" >> /tmp/wrong; break; }; done
}
disk() {
    fio --name=disk --filename=/dev/$1 --rw=$2 --bs=16k --size=6m --direct=1 --ioengine=libaio --iodepth=8 \
        --verify=crc32c --verify_fatal=1 --do_verify=1
}
files() {
    cd /mnt/share && rm -rf copy && cp -a /tmp/tree copy && diff -r /tmp/tree copy &&
    mv copy moved && rm -rf moved && echo $(($(cat /tmp/rounds.fs) + 1)) > /tmp/rounds.fs
}
traffic() { iperf3 --client $1 --port $2 --time 2 --bidir; }
entropy() { head -c 65536 /dev/hwrng | wc -c | grep -q 65536; }
(
    forever disk vda randwrite & forever disk vdb randrw & forever files share & forever entropy hwrng &
    test -z "$1" || forever traffic $1 $2 &
    wait; touch /tmp/ended
) &
"""

SERVER = """
import socket, struct, sys, _thread
def echo(connected):
    block = memoryview(bytearray(65536))
    while True:
        length = connected.readinto(block)
        if not length:
            break
        connected.write(block[:length])
    connected.close()
listening = socket.socket(40, 1)
listening.bind(struct.pack("<HHIIBBBB", 40, 0, int(sys.argv[1]), 0xFFFFFFFF, 0, 0, 0, 0))
listening.listen(64)
print("listening")
while True:
    _thread.start_new_thread(echo, (listening.accept()[0],))
"""

# A port has one opener, who reads nothing while nobody is at the host's end.
PORT_SERVER = """
import sys, time
port, block = open(sys.argv[1], "r+b"), memoryview(bytearray(4096))
while True:
    length = port.readinto(block)
    if length:
        port.write(block[:length])
    else:
        time.sleep(0.02)
"""


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def configure(place: Path) -> list[DeviceConfig]:
    """Every kind of device, in a directory of the host."""
    (place / "share").mkdir(exist_ok=True)
    for name in ("first.img", "second.img"):
        with (place / name).open("wb") as disk:
            disk.truncate(16 * MIB)
    return [
        BlockConfig(name="first", path=place / "first.img"),
        BlockConfig(name="second", path=place / "second.img", queues=2),
        NetworkConfig(name="net"),
        VsockConfig(name="vsock", socket=place / "v"),
        FsConfig(name="share", tag="share", path=place / "share"),
        BalloonConfig(name="balloon"),
        EntropyConfig(name="rng"),
        PortsConfig(name="ports", ports={"console": None, "data": place / "data"}),
    ]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path is short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="together-") as path:
        yield Path(path)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of this test's own for what is temporary."""
    with tempfile.TemporaryDirectory(prefix="t-") as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(path)


@dataclass
class Held:
    """What a process holds of the host."""

    threads: int
    descriptors: int
    children: int

    @classmethod
    def now(cls) -> Held:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), len(children))


class Everything:
    """A guest with every device, of which all can be put to work."""

    def __init__(self, vm: MicroVm, shell: GuestShell, place: Path) -> None:
        self.vm, self.shell, self.place = vm, shell, place
        self.echoed = self.said = 0
        self._stop = threading.Event()
        self.wrong: list[str] = []
        self._threads: list[threading.Thread] = []

    def go_online(self) -> str:
        """Returns the gateway's address, where the host is."""
        self.shell.run("ip link set eth0 up && udhcpc -i eth0 -n -q", check=True)
        return self.shell.run("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'", check=True).output.strip()

    def serve(self) -> None:
        """Echo servers on vsock and on the port."""
        self.shell.run(f"cat > /tmp/echo.py <<'EOP'\n{SERVER}\nEOP", check=True)
        self.shell.run(
            f"micropython /tmp/echo.py {ECHO} > /tmp/echo 2>&1 & until grep -q listening /tmp/echo; do sleep 0.1; done"
        )
        self.shell.run(
            "port=/dev/$(basename $(dirname $(grep -lx data /sys/class/virtio-ports/*/name)))\n"
            f"cat > /tmp/say.py <<'EOP'\n{PORT_SERVER}\nEOP\nmicropython /tmp/say.py $port > /tmp/say 2>&1 &"
        )
        assert self.port.wait_for_guest()

    def load(self, address: str = "", port: int = 0, *, host: bool = True) -> None:
        """Put the devices to work, without end.

        Args:
            address: of an iperf3 server, empty for no traffic.
            port: of it.
            host: whether the host does its part too: vsock, port and balloon.
        """
        self.shell.run(f"cat > /tmp/load <<'EOL'\n{LOAD}\nEOL\nsh /tmp/load {address} {port or ''}", check=True)
        for work in (self.echo, self.say, self.squeeze) if host else ():
            thread = threading.Thread(target=self._work, args=(work,), name=f"test-{work.__name__}")
            self._threads.append(thread)
            thread.start()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                work()
        except Exception as error:
            if not self._stop.is_set():
                self.wrong.append(f"{work.__name__}: {error!r}")

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """A connection to the guest's echo server on vsock."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(os.fspath(self.place / "v"))
            client.sendall(f"CONNECT {ECHO}\n".encode())
            answer = b""
            while not answer.endswith(b"\n"):
                part = client.recv(1)
                assert part, f"the guest refused, after {answer!r}"
                answer += part
            assert answer.startswith(b"OK ")
            yield client

    def echo(self) -> None:
        data = random.randbytes(MIB)
        with self.connect() as client, client.makefile("rb") as stream:
            for start in range(0, MIB, 1 << 16):
                client.sendall(data[start : start + (1 << 16)])
                assert stream.read(1 << 16) == data[start : start + (1 << 16)]
                if self._stop.is_set():
                    return
        self.echoed += 1

    def say(self) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(os.fspath(self.place / "data"))
            for _ in range(50):
                data = random.randbytes(4096)  # what the guest reads at once
                client.sendall(data)
                received = b""
                while len(received) < len(data):
                    part = client.recv(4096)
                    assert part, "the port has hung up"
                    received += part
                assert received == data
                self.said += 1
                if self._stop.is_set():
                    return

    @property
    def port(self) -> Port:
        device = self.vm.machine.device("ports")
        assert isinstance(device, PortsDevice)
        return device.port("data")

    @property
    def balloon(self) -> BalloonDevice:
        device = self.vm.machine.device("balloon")
        assert isinstance(device, BalloonDevice)
        return device

    def squeeze(self) -> None:
        device = self.balloon
        for target in (60, 10):
            device.set_target(target)
            deadline = time.monotonic() + 60
            while device.actual_mib != target and not self._stop.is_set():
                assert time.monotonic() < deadline, f"the balloon has {device.actual_mib} MiB, not {target}"
                time.sleep(0.05)

    def check(self) -> None:
        """Nothing has gone wrong so far."""
        assert not self.wrong
        assert self.shell.run("cat /tmp/wrong 2> /dev/null").output == ""
        assert not COMPLAINTS.search(self.vm.console.text), COMPLAINTS.search(self.vm.console.text)

    def end_host(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive()
        self._threads.clear()
        self._stop.clear()

    def end(self) -> None:
        """Let every load come to its end."""
        self.end_host()
        self.shell.run("touch /tmp/end; until test -e /tmp/ended; do sleep 0.2; done; rm /tmp/ended", 120, check=True)


@contextlib.contextmanager
def everything(toolbox: Boot, place: Path, **settings: object) -> Iterator[Everything]:
    with toolbox(devices=configure(place), **{"memory_mib": 512, "vcpus": 2} | settings) as (vm, shell):
        yield Everything(vm, shell, place)


def test_all_devices_work_at_the_same_time_through_pauses(toolbox: Boot, place: Path) -> None:
    with everything(toolbox, place) as guest, iperf_server() as port:
        gateway = guest.go_online()
        guest.serve()
        guest.load(gateway, port)
        for number in range(20):
            time.sleep(0.7)
            guest.vm.pause()
            time.sleep(0.05 * (number % 3))
            guest.vm.resume()
        time.sleep(5)
        guest.check()
        guest.end()
        guest.check()

        assert guest.echoed
        assert guest.said > 100
        assert "err= 0" in guest.shell.run("cat /tmp/last.disk.vda").output
        assert "receiver" in guest.shell.run("cat /tmp/last.traffic.*").output
        assert int(guest.shell.run("cat /tmp/rounds.fs").output) > 0
        metrics = guest.vm.metrics()
        assert len(metrics.vcpus) == 2
        assert all(each.instructions > 0 and each.exits.get("mmio", 0) >= 0 for each in metrics.vcpus)
        assert 0 < metrics.memory.pss < 2048 * MIB
        vsock = guest.vm.machine.device("vsock")
        assert isinstance(vsock, VsockDevice)
        eventually(lambda: vsock.statistics.connections == 0)
        assert not any(device.mistake for device in guest.vm.machine.devices.values())


def test_closing_at_work_leaves_nothing_time_after_time(toolbox: Boot, place: Path, temporary: Path) -> None:
    held = []
    for _ in range(ROUNDS):
        with everything(toolbox, place, memory_mib=384) as guest:
            gateway = guest.go_online()
            guest.serve()
            guest.load(gateway, 9)
            time.sleep(1)
            guest.vm.shutdown()
            with contextlib.suppress(OSError):
                guest.end_host()
        held.append(Held.now())
    assert all(each == held[0] for each in held), held
    assert not held[0].children
    assert not os.listdir(temporary)
    assert sorted(os.listdir(place)) == ["first.img", "second.img", "share"]


VICTIM = """
import sys, time
from pathlib import Path
from kata_lab.image.build import build_named
from kata_lab.shell import boot_image
from tests.guest.test_devices_together_guest import Everything, configure
place = Path(sys.argv[1])
with boot_image(build_named("toolbox", progress="off"), devices=configure(place), memory_mib=384) as (vm, shell):
    guest = Everything(vm, shell, place)
    gateway = guest.go_online()
    guest.serve()
    guest.load(gateway, 9)
    time.sleep(1)
    print("at work", flush=True)
    time.sleep(600)
"""


def children(parent: int) -> set[int]:
    """Processes that a process started."""
    found = set()
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with contextlib.suppress(OSError):
                if int((each / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.add(int(each.name))
    return found


def test_a_vmm_that_is_killed_leaves_nothing_that_a_next_one_minds(toolbox: Boot, place: Path, temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", VICTIM, os.fspath(place)], stdout=subprocess.PIPE, text=True) as vmm:
        try:
            assert vmm.stdout is not None
            assert vmm.stdout.readline() == "at work\n"
            started = children(vmm.pid)
            assert started, "passt is a child of the VMM"
        finally:
            vmm.send_signal(signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{each}").exists() for each in started), 10)
    assert not os.listdir(temporary)

    with everything(toolbox, place, memory_mib=384) as guest:
        guest.go_online()
        guest.serve()
        guest.load()
        time.sleep(1)
        guest.check()
        guest.vm.shutdown()
        guest.end_host()


def replace_devices(vm: MicroVm) -> None:
    """While the VM is paused: every device's state goes into a fresh device, which takes its slot."""
    board, devices = vm.machine.board, vm.machine.devices
    configurations = {each.name: each for each in vm.config.devices}

    async def replace() -> None:
        for number, slot in enumerate(board.slots):
            if not isinstance(slot, VirtioMmio):
                continue
            old, state = slot.device, slot.save()
            crashed = old.host.crashed
            assert board.unplug(number) is old
            old.close()
            new = build_device(configurations[old.name])
            devices[new.name] = new
            assert board.plug(new, asyncio.get_running_loop(), crashed) == number
            fresh = board.slots[number]
            assert isinstance(fresh, VirtioMmio)
            with new.lock:
                new.pause()
            fresh.restore(state)

    loop = next(iter(devices.values())).host.loop
    asyncio.run_coroutine_threadsafe(replace(), loop).result(60)


def test_devices_are_put_back_from_their_states_while_the_guest_works(toolbox: Boot, place: Path) -> None:
    with everything(toolbox, place, memory_mib=384) as guest:
        vm, shell = guest.vm, guest.shell
        gateway = guest.go_online()
        guest.serve()
        guest.load(host=False)
        shell.run("(while sleep 0.05; do echo $((n += 1)); done > /mnt/share/counted) & echo $! > /tmp/counting")
        for number in range(5):
            guest.balloon.set_target(8 * number)
            eventually(lambda: guest.balloon.actual_mib == guest.balloon.target_mib)
            with guest.connect() as client:
                time.sleep(0.7)
                vm.pause()
                replace_devices(vm)
                vm.resume()
                assert client.recv(1) == b"", "a connection of the saved device has ended"
            assert guest.balloon.actual_mib == guest.balloon.target_mib == 8 * number
            guest.check()
            guest.echo()
            guest.say()
            with http_server(place) as port:
                shell.run(f"wget -q -T 20 -O /dev/null http://{gateway}:{port}/", check=True)

        shell.run("kill $(cat /tmp/counting)")
        counted = (place / "share" / "counted").read_text().split()
        assert counted == [str(number) for number in range(1, len(counted) + 1)]
        guest.end()
        guest.check()
        rounds = int(shell.run("cat /tmp/rounds.fs").output)
        assert rounds
        assert "err= 0" in shell.run("cat /tmp/last.disk.vdb").output
        assert not any(device.mistake for device in vm.machine.devices.values())


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Writes behind ``size`` bytes of a file fail (RLIMIT_FSIZE), as those to a full disk do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_faults_of_the_host_are_errors_in_the_guest_which_lives(toolbox: Boot, place: Path) -> None:
    with everything(toolbox, place, memory_mib=384) as guest:
        shell = guest.shell
        gateway = guest.go_online()
        guest.serve()
        shell.run("mkdir -p /mnt/share && mount -t virtiofs share /mnt/share", check=True)

        # No room on the host.
        to_disk = "dd if=/dev/urandom of=/dev/vda bs=64k count=4 seek=100 oflag=direct"
        to_file = "dd if=/dev/urandom of=/mnt/share/file bs=64k count=32 && sync /mnt/share/file"
        with no_file_beyond(MIB):
            assert "Input/output error" in shell.run(to_disk).output
            assert "File too large" in shell.run(to_file).output
            shell.run("dd if=/dev/urandom of=/dev/vdb bs=64k count=4 oflag=direct", check=True)
        shell.run(f"{to_disk} && {to_file}", check=True)
        assert (place / "share" / "file").stat().st_size == 2 * MIB

        # A disk that became shorter.
        os.truncate(place / "second.img", MIB)
        assert shell.run("dd if=/dev/vdb of=/dev/null bs=64k skip=100 count=1 iflag=direct").status
        shell.run("dd if=/dev/vdb of=/dev/null bs=64k count=4 iflag=direct", check=True)

        # A share that was deleted.
        shutil.rmtree(place / "share")
        eventually(lambda: shell.run("ls -A /mnt/share").output == "")
        assert "No such file" in shell.run("touch /mnt/share/new").output

        # Peers that leave in the middle.
        for _ in range(20):
            with guest.connect() as client:
                client.sendall(bytes(100_000))
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(place / "data"))
                client.sendall(bytes(4096))
        guest.echo()

        # A network that is gone.
        (passt,) = children(os.getpid())
        os.kill(passt, signal.SIGKILL)
        eventually(lambda: shell.run("cat /sys/class/net/eth0/carrier").output == "0\n")
        assert shell.run(f"wget -q -T 2 -O /dev/null http://{gateway}/").status

        guest.balloon.set_target(20)
        eventually(lambda: guest.balloon.actual_mib == 20)
        shell.run("head -c 4096 /dev/hwrng > /dev/null", check=True)
        assert not any(device.mistake for device in guest.vm.machine.devices.values())
        assert guest.vm.end is None
