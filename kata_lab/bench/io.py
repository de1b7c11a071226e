"""``kata-lab bench io``: disk, network, file sharing and sockets of a guest, against QEMU's devices where it has them.

Both guests are the toolbox image with the same kernel, memory and one hart, and carry out the same commands: fio on a
raw disk (virtio-blk, 4 KiB blocks for random and 1 MiB for sequential requests, past the guest's page cache), and
iperf3 with a server on the host over a user-mode network (virtio-net; ours through passt, QEMU's through its built-in
slirp). Shared directories (virtio-fs) and vsock are ours alone: QEMU's need a daemon of their own and a module of
the host's kernel. What the guest reads from files is in the host's page cache. Bytes count as 10⁶ to the MB.

Where a figure is below its goal, ``limits`` says what was busy meanwhile: the guest's hart, by the instructions that it
retired for each KiB, or the host.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kata_lab.bench.boot import prepare, versions
from kata_lab.bench.measure import BenchError, Sample, Watched, steps
from kata_lab.bench.peer import Peer
from vmm.config import BlockConfig, DeviceConfig, FsConfig, NetworkConfig, VsockConfig
from vmm.devices.virtio.blk import BlockDevice
from vmm.devices.virtio.vsock.device import VsockDevice

if TYPE_CHECKING:
    from kata_lab.image.library import Image
    from vmm.metrics import VmMetrics

MEMORY_MIB: Final = 512
DISK_BYTES: Final = 256 << 20
FILE_BYTES: Final = 192 << 20
VSOCK_BYTES: Final = 128 << 20
VSOCK_PORT: Final = 7000
TOLD: Final = re.compile(r"^RESULT (\w+) ([\d.]+)\s*$", re.MULTILINE)
FINISHED: Final = "RESULT finished 1"
GOALS: Final = {"vsock_to_guest_mb_s": 200.0}  #: figures of which ``limits`` tells when they are lower
RATIO_GOALS: Final = {"seq_read_mb_s": 0.8}  #: and those of which it tells when so much of QEMU's is not reached
ALONE: Final = ("fs_read_mb_s", "fs_write_mb_s", "vsock_to_guest_mb_s", "vsock_to_host_mb_s")

SCRIPT: Final = r"""#!/bin/sh
# bench-io seconds port load...: runs each load on /dev/vda or against the host's iperf3, and tells what came of it.
disk() { # name rw size field
    line=$(fio --minimal --name=load --filename=/dev/vda --ioengine=psync --direct=1 --thread --rw=$2 --bs=$3 \
        --size=192M --runtime=$seconds --time_based)
    echo RESULT $1 $(echo "$line" | cut -d';' -f$4)
}
net() { # name options
    line=$(iperf3 -c $host -p $port -t $seconds -f m $2 | grep 'receiver')
    echo RESULT $1 $(echo "$line" | sed 's/.*MBytes *//; s/ Mbits.*//')
}
seconds=$1 port=$2
shift 2
for load; do
    case $load in
    seq_read) disk seq_read_kib_s read 1M 7 ;;
    seq_write) disk seq_write_kib_s write 1M 48 ;;
    rand_read) disk rand_read_iops randread 4k 8 ;;
    rand_write) disk rand_write_iops randwrite 4k 49 ;;
    net)
        udhcpc -q -n -i eth0 >/dev/null 2>&1
        host=$(ip route | sed -n 's/^default via \([^ ]*\).*/\1/p')
        net net_to_host_mbit_s ''
        net net_to_guest_mbit_s -R
        ;;
    esac
done
echo RESULT finished 1
"""
LOADS: Final = ("seq_read", "seq_write", "rand_read", "rand_write", "net")  #: in this order on both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class IoFigures:
    """What was measured; medians.

    Attributes:
        ours: name → figure: ``seq_read_mb_s``, ``seq_write_mb_s``, ``rand_read_iops``, ``rand_write_iops``,
            ``net_to_host_mb_s``, ``net_to_guest_mb_s``, and those in :data:`ALONE`.
        qemu: the same names, without those in :data:`ALONE`.
        ratio: ours / qemu, more is better.
        limits: what limits a figure that is below its goal, as measured in the same run.
        runs: measured runs of each side.
        versions: of what took part.
    """

    ours: dict[str, float]
    qemu: dict[str, float]
    ratio: dict[str, float]
    limits: dict[str, str] = field(default_factory=dict)
    runs: int
    versions: dict[str, str] = field(default_factory=dict)


def measure_io(runs: int, seconds: float = 3.0) -> IoFigures:
    """Measure, each kind of load for so many seconds.

    Raises:
        PeerError: this machine has no QEMU.
        BenchError: a run did not come to its end, or iperf3 or passt is missing.
        ImageError: the guest cannot be built.
    """
    from kata_lab.image.build import build_named

    peer = Peer.find()
    for program in ("iperf3", "passt"):
        if shutil.which(program) is None:
            raise BenchError(f"this machine has no {program} to measure with: install the package {program}")
    image = build_named("toolbox")
    prepare()
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="kata-lab-bench-") as name, steps("Measuring devices", 2 * runs) as begin:
        place = Path(name)
        _fill(place)
        for _ in range(runs):
            begin("ours")
            figures, busy = _ours(image, place, seconds)
            ours.append(figures)
            begin("QEMU")
            theirs.append(_qemu(peer, image, place, seconds))
    return _figures(ours, theirs, busy, versions(peer) | {"guest kernel": str(image.manifest["release"])})


def _figures(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], busy: dict[str, str], told: dict[str, str]
) -> IoFigures:
    def medians(runs: list[dict[str, float]]) -> dict[str, float]:
        return {name: Sample(tuple(run[name] for run in runs)).median for name in runs[0]}

    mine, qemu = medians(ours), medians(theirs)
    ratio = {name: mine[name] / qemu[name] for name in qemu}
    missed = [name for name, goal in GOALS.items() if mine[name] < goal]
    missed += [name for name, goal in RATIO_GOALS.items() if ratio[name] < goal]
    return IoFigures(
        ours=mine,
        qemu=qemu,
        ratio=ratio,
        limits={name: busy[name] for name in missed},
        runs=len(ours),
        versions=told,
    )


def _fill(place: Path) -> None:
    """A disk and a file to share, both with bytes that are not all alike, and in the page cache."""
    block = os.urandom(1 << 20)
    share = place / "share"
    share.mkdir()
    for path, size in ((place / "disk", DISK_BYTES), (share / "file", FILE_BYTES)):
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)


@contextlib.contextmanager
def _iperf3() -> Iterator[int]:
    """A server on a free port of the host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with Watched(["iperf3", "--server", "--port", str(port), "--forceflush"]) as server:
        server.seconds_until("listening", timeout=10)
        yield port


def _ours(image: Image, place: Path, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Figures of one run; and what was busy meanwhile, by name of the figure."""
    from kata_lab.shell import boot_image

    devices: tuple[DeviceConfig, ...] = (
        BlockConfig(path=place / "disk"),
        NetworkConfig(backend="passt"),
        FsConfig(path=place / "share", tag="bench"),
        VsockConfig(socket=place / "vsock"),
    )
    files = {"/bench-io": SCRIPT.encode()}
    with _iperf3() as port, boot_image(image, devices=devices, files=files, memory_mib=MEMORY_MIB) as (vm, shell):
        before, run = vm.metrics(), f"/bench-io {seconds:g} {port}"
        text = shell.run(f"{run} {LOADS[0]}", 60 + 10 * seconds).output
        disk = next(each for each in vm.machine.devices.values() if isinstance(each, BlockDevice)).counters
        limit = _limit(before, vm.metrics(), disk.bytes_read)
        busy = {"seq_read_mb_s": f"{limit}, in requests of {disk.bytes_read / disk.reads / 1024:.0f} KiB"}
        told = _results(text + shell.run(f"{run} {' '.join(LOADS[1:])}", 60 + 10 * seconds).output)
        shell.run("mkdir -p /bench && mount -t virtiofs bench /bench", check=True)
        # As the agent does for the shared directory of a sandbox.
        shell.run("for each in /sys/class/bdi/*/read_ahead_kb; do echo 1024 > $each; done", check=True)
        started = _clocked(lambda: shell.run("dd if=/bench/file of=/dev/null bs=1M 2>/dev/null", 60, check=True))
        told["fs_read_mb_s"] = FILE_BYTES / 1e6 / started
        command = "dd if=/dev/zero of=/bench/new bs=1M count=128 conv=fsync 2>/dev/null"
        told["fs_write_mb_s"] = (128 << 20) / 1e6 / _clocked(lambda: shell.run(command, 60, check=True))
        shell.run(f"(socat -u -b 262144 VSOCK-LISTEN:{VSOCK_PORT} OPEN:/dev/null; echo done > /run/drained) &")
        before = vm.metrics()
        told["vsock_to_guest_mb_s"] = VSOCK_BYTES / 1e6 / _clocked(lambda: _to_guest(place / "vsock"))
        counted = next(each for each in vm.machine.devices.values() if isinstance(each, VsockDevice)).statistics
        size = counted.bytes_to_guest / counted.packets_to_guest
        limit = _limit(before, vm.metrics(), VSOCK_BYTES)
        busy["vsock_to_guest_mb_s"] = f"{limit}, in packets of {size:.0f} bytes, its driver's choice"
        with _listening(Path(f"{place / 'vsock'}_{VSOCK_PORT}")) as listener:
            shell.run(
                f"(dd if=/dev/zero bs=1M count={VSOCK_BYTES >> 20} | socat -u -b 262144 - VSOCK:2:{VSOCK_PORT}) &"
            )
            told["vsock_to_host_mb_s"] = VSOCK_BYTES / 1e6 / _drain(listener)
    return told, busy


def _limit(before: VmMetrics, after: VmMetrics, transferred: int) -> str:
    """What the time went to, of the one hart's thread."""
    seconds = after.uptime_seconds - before.uptime_seconds
    ran = after.vcpus[0].run_seconds - before.vcpus[0].run_seconds
    retired = after.vcpus[0].instructions - before.vcpus[0].instructions
    return (
        f"the guest's hart ran for {ran / seconds:.0%} of the time and retired {retired / (transferred >> 10):.0f}"
        f" instructions for each KiB, at {retired / ran / 1e6:.0f} million a second"
    )


def _clocked(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _to_guest(path: Path) -> None:
    """Send, and wait until the guest has read everything and closed."""
    block = bytes(1 << 20)
    with _dialled(path) as connection:
        for _ in range(VSOCK_BYTES >> 20):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


@contextlib.contextmanager
def _dialled(path: Path) -> Iterator[socket.socket]:
    for _ in range(100):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(os.fspath(path))
        connection.sendall(f"CONNECT {VSOCK_PORT}\n".encode())
        answer = connection.recv(64)
        if answer.startswith(b"OK "):
            with connection:
                yield connection
            return
        connection.close()  # the guest does not listen yet
        time.sleep(0.05)
    raise BenchError(f"nobody listens on the guest's vsock port {VSOCK_PORT}")


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        listener.settimeout(60)
        try:
            yield listener
        finally:
            path.unlink()


def _drain(listener: socket.socket) -> float:
    """Seconds from the connection to its end."""
    connection, _ = listener.accept()
    began, left = time.monotonic(), VSOCK_BYTES
    buffer = bytearray(1 << 20)
    with connection:
        connection.settimeout(60)
        while count := connection.recv_into(buffer):
            left -= count
    if left:
        raise BenchError(f"{left} of {VSOCK_BYTES} bytes from the guest are missing")
    return time.monotonic() - began


def _qemu(peer: Peer, image: Image, place: Path, seconds: float) -> dict[str, float]:
    from kata_lab.shell import initrd_with

    with _iperf3() as port, initrd_with(image.root, {"/bench-io": SCRIPT.encode()}) as initrd:
        run = f"/bench-io {seconds:g} {port} {' '.join(LOADS)}"
        line = f"{image.append} kata.run={shlex.quote(run)}".replace("'", '"')
        command = [
            *peer.boot_command(image.kernel, initrd, line, MEMORY_MIB),
            *("-drive", f"file={place / 'disk'},format=raw,if=none,id=disk,cache=writeback"),
            *("-global", "virtio-mmio.force-legacy=false", "-device", "virtio-blk-device,drive=disk"),
            *("-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"),
        ]
        command.remove("-net")
        command.remove("none")
        with Watched(command) as process:
            process.seconds_until(FINISHED, 120 + 10 * seconds)
            return _results(process.text)


def _results(text: str) -> dict[str, float]:
    """What the script told, in MB/s and operations per second."""
    told = {name: float(value) for name, value in TOLD.findall(text)}
    if told.pop("finished", None) is None or len(told) != 6:
        raise BenchError(f"the load did not come to its end in the guest; it told {text.strip()[-500:]!r}")
    return {
        "seq_read_mb_s": told["seq_read_kib_s"] * 1024 / 1e6,
        "seq_write_mb_s": told["seq_write_kib_s"] * 1024 / 1e6,
        "rand_read_iops": told["rand_read_iops"],
        "rand_write_iops": told["rand_write_iops"],
        "net_to_host_mb_s": told["net_to_host_mbit_s"] / 8,
        "net_to_guest_mb_s": told["net_to_guest_mbit_s"] / 8,
    }
