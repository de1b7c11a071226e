"""A stock kernel's virtio-blk driver on our disks: file systems, load that verifies itself, and the host's troubles."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kata_lab.shell import GuestShell
from tests.guest.conftest import Boot
from vmm.config import BlockConfig
from vmm.microvm import MicroVm
from vmm.storage import OverlayDisk, create_overlay

MIB = 1 << 20


@dataclass(frozen=True)
class Guest:
    """A VM with four disks.

    Attributes:
        plain: ``vda``, an empty file of 192 MiB, two queues.
        shared: ``vdb``, read-only, and beneath the overlay.
        overlay: ``vdc``.
        cut: ``vdd``, whose file the test cuts off.
    """

    vm: MicroVm
    shell: GuestShell
    plain: Path
    shared: Path
    overlay: Path
    cut: Path

    def run(self, command: str, timeout: float = 120) -> str:
        return self.shell.run(command, timeout=timeout, check=True).output


@pytest.fixture(scope="module")
def guest(toolbox: Boot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("disks")
    plain, shared, overlay, cut = (directory / f"{name}.img" for name in ("plain", "shared", "overlay", "cut"))
    for path, size in ((plain, 192 * MIB), (cut, 16 * MIB)):
        with path.open("wb") as file:
            file.truncate(size)
    shared.write_bytes(os.urandom(16 * MIB))
    create_overlay(overlay, shared)
    disks = [
        BlockConfig(name="plain", path=plain, serial="lab-plain-0001", queues=2),
        BlockConfig(name="shared", path=shared, read_only=True),
        BlockConfig(name="overlay", path=overlay, format="overlay"),
        BlockConfig(name="cut", path=cut),
    ]
    with toolbox(devices=disks, vcpus=2, memory_mib=384) as (vm, shell):
        yield Guest(vm, shell, plain, shared, overlay, cut)


def fio(name: str, where: str, *options: str) -> str:
    settings = ("--bs=4k", "--direct=1", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--group_reporting")
    return " ".join(("fio", f"--name={name}", where, *settings, *options))


def test_the_driver_sees_what_the_disk_is(guest: Guest) -> None:
    def attribute(name: str) -> str:
        return guest.run(f"cat /sys/block/vda/{name}").strip()

    assert attribute("serial") == "lab-plain-0001"
    assert int(attribute("size")) == 192 * MIB // 512
    assert attribute("queue/logical_block_size") == "512"
    assert attribute("queue/physical_block_size") == "4096"
    assert attribute("cache_type") == "write back"
    assert int(attribute("queue/discard_max_bytes")) > 0
    assert int(attribute("queue/write_zeroes_max_bytes")) > 0
    assert attribute("ro") == "0"


def test_each_hart_has_its_queue(guest: Guest) -> None:
    assert guest.run("ls /sys/block/vda/mq").split() == ["0", "1"]
    assert guest.run("ls /sys/block/vdb/mq").split() == ["0"]
    served = [0, 0]
    device = guest.vm.machine.device("plain")
    for hart in (0, 1):
        before = [queue.save().next_used for queue in device.queues]
        guest.run(f"busybox taskset {hart + 1:x} dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct")
        after = [queue.save().next_used for queue in device.queues]
        served[hart] = (after[hart] - before[hart]) % 65536
    assert min(served) >= 16


def test_ext4_survives_verified_load_and_is_clean_on_the_host(guest: Guest) -> None:
    guest.run("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt/a && mount -t ext4 /dev/vda /mnt/a")
    guest.run(fio("sequential", "--directory=/mnt/a", "--rw=write", "--size=8m", "--bs=64k", "--numjobs=2"))
    guest.run(fio("random", "--directory=/mnt/a", "--rw=randwrite", "--size=4m", "--numjobs=2", "--ioengine=psync"))
    guest.run(fio("deep", "--directory=/mnt/a", "--rw=randrw", "--size=4m", "--ioengine=libaio", "--iodepth=16"))
    guest.run(fio("synced", "--directory=/mnt/a", "--rw=randwrite", "--size=1m", "--fsync=16"))
    told = guest.run("cd /mnt/a && sha256sum deep.0.0").split()[0]
    guest.run("umount /mnt/a && fsck.ext4 -fn /dev/vda")

    checked = subprocess.run(["e2fsck", "-fn", str(guest.plain)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    found = subprocess.run(["debugfs", "-R", "cat deep.0.0", str(guest.plain)], capture_output=True, check=True).stdout
    assert hashlib.sha256(found).hexdigest() == told
    assert guest.vm.machine.device("plain").counters.errors == 0


def test_discarded_room_goes_back_to_the_host(guest: Guest) -> None:
    guest.run("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt/t && mount -t ext4 /dev/vda /mnt/t")
    guest.run("dd if=/dev/urandom of=/mnt/t/big bs=1M count=32 && sync")
    full = guest.plain.stat().st_blocks
    guest.run("rm /mnt/t/big && sync && fstrim /mnt/t")
    assert guest.plain.stat().st_blocks <= full - 32 * MIB // 512
    guest.run("umount /mnt/t")


def test_zeroes_are_written_by_request(guest: Guest) -> None:
    device = guest.vm.machine.device("plain")
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=4 oflag=direct")
    before = device.counters.discards
    guest.run("fallocate -z -o 1M -l 2M /dev/vda || blkdiscard -z -f -o 1M -l 2M /dev/vda")
    assert device.counters.discards > before
    with guest.plain.open("rb") as file:
        assert any(file.read(MIB))
        assert not any(file.read(2 * MIB))
        assert any(file.read(MIB))


def test_a_read_only_disk_refuses_writes(guest: Guest) -> None:
    before = guest.shared.read_bytes()
    assert guest.run("cat /sys/block/vdb/ro").strip() == "1"
    refused = guest.shell.run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct")
    assert refused.status != 0
    told = guest.run("sha256sum /dev/vdb", timeout=120).split()[0]
    assert told == hashlib.sha256(before).hexdigest()
    assert guest.shared.read_bytes() == before


def test_an_overlay_leaves_its_backing_file_byte_for_byte(guest: Guest) -> None:
    before = guest.shared.read_bytes()
    guest.run("cmp /dev/vdb /dev/vdc")
    guest.run("dd if=/dev/zero of=/dev/vdc bs=512 count=3 seek=100 oflag=direct")
    assert guest.shell.run("cmp /dev/vdb /dev/vdc").status == 1
    guest.run("mkfs.ext4 -q -F /dev/vdc && mkdir -p /mnt/o && mount -t ext4 /dev/vdc /mnt/o")
    guest.run(fio("over", "--directory=/mnt/o", "--rw=randwrite", "--size=4m", "--ioengine=libaio", "--iodepth=8"))
    guest.run("umount /mnt/o && fsck.ext4 -fn /dev/vdc")

    assert guest.shared.read_bytes() == before
    disk = guest.vm.machine.device("overlay").disk
    assert isinstance(disk, OverlayDisk)
    assert 4 * MIB <= disk.clusters_here * disk.cluster_size < 16 * MIB


def test_a_grown_file_is_a_grown_disk(guest: Guest) -> None:
    os.truncate(guest.plain, 256 * MIB)
    guest.vm.machine.device("plain").update()
    guest.run(
        f"for n in $(seq 50); do [ $(cat /sys/block/vda/size) = {256 * MIB // 512} ] && exit; sleep 0.1; done; exit 1"
    )
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=255 count=1 oflag=direct")


def test_a_file_that_the_host_cuts_off_gives_errors_and_the_guest_lives(guest: Guest) -> None:
    os.truncate(guest.cut, 4 * MIB)
    read = guest.shell.run("dd if=/dev/vdd of=/dev/null bs=4k skip=2048 count=1 iflag=direct")
    write = guest.shell.run("dd if=/dev/zero of=/dev/vdd bs=4k seek=2048 count=1 oflag=direct")

    assert "Input/output error" in read.output
    assert "Input/output error" in write.output
    assert guest.cut.stat().st_size == 4 * MIB
    guest.run("dd if=/dev/vdd of=/dev/null bs=1M count=4 iflag=direct")
    assert guest.vm.machine.device("cut").counters.errors >= 2


def test_a_pause_in_the_middle_of_load_changes_nothing(guest: Guest) -> None:
    guest.run(
        "(" + fio("paused", "--filename=/dev/vda", "--rw=randwrite", "--size=4m", "--fsync=8") + ") >/tmp/f 2>&1 &"
    )
    for _ in range(10):
        guest.vm.pause()
        guest.vm.resume()
    guest.run("while pidof fio >/dev/null; do sleep 0.1; done")
    assert "err= 0" in guest.run("cat /tmp/f")
