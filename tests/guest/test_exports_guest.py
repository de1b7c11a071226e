"""A share whose directories and files come and go while Linux has it mounted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.shell import GuestShell
from tests.guest.conftest import Boot
from vmm.config import FsConfig
from vmm.devices.virtio.fs.device import FsDevice
from vmm.devices.virtio.fs.override import OVERRIDE

Guest = tuple[FsDevice, GuestShell]


@pytest.fixture(scope="module", params=["auto", "always"])
def guest(request: pytest.FixtureRequest, toolbox: Boot) -> Iterator[Guest]:
    devices = [FsConfig(name="shares", tag="shares", cache=request.param)]
    with toolbox(devices=devices, memory_mib=320) as (vm, shell):
        device = vm.machine.device("shares")
        assert isinstance(device, FsDevice)
        shell.run("mkdir /mnt/shares && mount -t virtiofs shares /mnt/shares && cd /mnt/shares", check=True)
        yield device, shell
        assert device.mistake is None


@pytest.fixture
def shared(guest: Guest, tmp_path: Path) -> Iterator[Path]:
    """``kept``, which can only be read, and ``free``, both with a file."""
    device, _ = guest
    for name in ("kept", "free"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
        device.add(name, tmp_path / name, read_only=name == "kept")
    yield tmp_path
    for name in ("kept", "free"):
        if name.encode() in device.share.inodes.exports:
            device.remove(name)


def said(guest: Guest, command: str) -> str:
    return guest[1].run(f"cd /mnt/shares && {command}").output.strip()


@pytest.mark.usefixtures("shared")
def test_exports_are_listed_read_and_guarded(guest: Guest) -> None:
    assert said(guest, "ls").split() == ["free", "kept"]
    assert said(guest, "cat kept/inner/file free/inner/file") == "keptfree"
    assert said(guest, "stat -c '%A %u %h' .") == "drwxr-xr-x 0 4"
    for attempt in (
        "touch kept/new",
        "echo x > kept/inner/file",
        "rm -r kept/inner",
        "mv kept/inner kept/outer",
        "chmod 777 kept",
        "mkdir new",
        "rmdir free",
        "ln -s /etc new",
    ):
        assert "Read-only file system" in said(guest, attempt), attempt
    assert "cross-device" in said(guest, "ln kept/inner/file free/stolen").lower()
    assert said(guest, "mv free/inner/file free/moved && cp kept/inner/file free/copied && cat free/*ed") == "keptfree"
    assert said(guest, "sync -f . && sync && df . | tail -n 1 | grep -c shares") == "1"


def test_an_export_goes_while_it_is_used_and_another_takes_its_name(guest: Guest, shared: Path) -> None:
    device, shell = guest
    shell.run(
        "cd /mnt/shares/free/inner && exec 3< file && (while sleep 0.1; do :; done) & echo $! > /tmp/user", check=True
    )
    assert said(guest, "cat free/inner/file kept/inner/file") == "freekept"

    device.remove("free")

    assert said(guest, "ls") == "kept"
    assert "No such file" in said(guest, "cat free/inner/file")
    (cwd,) = said(guest, "ls /proc/$(cat /tmp/user)/cwd/ 2>&1 | head -n 1").splitlines()
    assert "Stale file handle" in cwd
    assert said(guest, "cat kept/inner/file") == "kept"
    assert not [
        each
        for each in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{each}").startswith(os.fspath(shared / "free"))
    ]

    (shared / "other").mkdir()
    (shared / "other" / "new").write_text("other")
    device.add("free", shared / "other")
    assert said(guest, "ls free; cat free/new") == "new\nother"
    assert said(guest, "echo more > free/new; cat free/new") == "more"
    assert (shared / "other" / "new").read_text() == "more\n"
    shell.run("kill $(cat /tmp/user)")


def test_a_name_that_was_looked_for_in_vain_appears(guest: Guest, shared: Path) -> None:
    assert "No such file" in said(guest, "cat late")
    assert "No such file" in said(guest, "ls late")

    guest[0].add("late", shared / "free" / "inner" / "file", read_only=True)

    assert said(guest, "cat late") == "free"
    assert "late" in said(guest, "ls").split()
    assert "Read-only" in said(guest, "echo x > late")
    guest[0].remove("late")
    assert "No such file" in said(guest, "cat late")


@pytest.mark.usefixtures("shared")
def test_a_second_mount_finds_the_same(guest: Guest) -> None:
    _, shell = guest
    shell.run("umount /mnt/shares && mount -t virtiofs shares /mnt/shares", check=True)

    assert said(guest, "cat kept/inner/file free/inner/file") == "keptfree"


def test_owners_and_kinds_are_those_of_the_attribute(guest: Guest, shared: Path) -> None:
    root = shared / "root"
    root.mkdir()
    for name, told in {"null": b"0:0:666:char-1-3", "owned": b"1000:1001:4750"}.items():
        (root / name).touch()
        os.setxattr(root / name, OVERRIDE, told)
    guest[0].add("root", root, read_only=True, override_stat=True)

    assert said(guest, "stat -c '%A %t %T' root/null") == "crw-rw-rw- 1 3"
    assert said(guest, "stat -c '%a %u %g' root/owned") == "4750 1000 1001"
    assert said(guest, "echo gone > root/null; wc -c < root/null") == "0"
    guest[0].remove("root")


def test_owners_that_the_guest_gives_are_in_the_attribute(guest: Guest, shared: Path) -> None:
    guest[0].add("owned", shared / "free", override_stat=True)

    assert said(
        guest,
        "cd owned && mkdir place && touch place/file && chown 1000:1001 place/file && chmod 4755 place/file"
        " && mknod null c 1 3 && mkfifo pipe && echo gone > null && stat -c '%A %u %g' place/file null pipe",
    ).splitlines() == ["-rwsr-xr-x 1000 1001", "crw-r--r-- 0 0", "prw-r--r-- 0 0"]
    place = shared / "free" / "place"
    assert os.getxattr(place / "file", OVERRIDE) == b"1000:1001:4755:file"
    assert os.getxattr(shared / "free" / "null", OVERRIDE) == b"0:0:0644:char-1-3"
    # Root keeps the bit when it writes, anybody else does not; a new owner is not given it.
    assert said(guest, "cd owned && echo root >> place/file && stat -c %a place/file") == "4755"
    command = "chmod 4777 place/file && setpriv --reuid 1002 --clear-groups sh -c 'echo other >> place/file'"
    assert said(guest, f"cd owned && {command} && stat -c %a place/file") == "777"
    assert said(guest, "cd owned && chmod 4777 place/file && chown 5 place/file && stat -c %a place/file") == "777"
    assert os.getxattr(place / "file", OVERRIDE) == b"5:1001:0777:file"
    guest[0].remove("owned")
