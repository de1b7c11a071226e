"""The boot guest is built once, whole, and survives whatever happens to its builder, its cache and its mirror."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.boot import (
    APPEND,
    EXIT_STATUS,
    UNNEEDED_INITCALLS,
    USERLAND_MARKER,
    BootGuest,
    append_running,
    build_boot_guest,
    kernel_image,
)
from tests.kata_lab.image.fake_mirror import BUSYBOX, KERNEL, RELEASE, FakeMirror, Signer

BUILD = (
    "import sys; from pathlib import Path; from kata_lab.image.boot import build_boot_guest\n"
    "print(build_boot_guest('off', sys.argv[1], keyring=Path(sys.argv[2])).kernel)"
)


def build(mirror: FakeMirror, signer: Signer, refresh: bool = False) -> BootGuest:
    return build_boot_guest("off", mirror.uri, keyring=signer.keyring, refresh=refresh)


def start_build(mirror: FakeMirror, signer: Signer) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, mirror.uri, str(signer.keyring)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_good(guest: BootGuest, release: str = RELEASE) -> None:
    assert guest.kernel.read_bytes() == KERNEL + release.encode()
    assert guest.release == release
    names = subprocess.run(["cpio", "-t"], input=guest.initrd.read_bytes(), capture_output=True, check=True).stdout
    assert {"init", "bin/busybox", "dev/console", "proc", "sys"} <= set(names.decode().split())
    assert BUSYBOX in guest.initrd.read_bytes()


def test_guest_is_built_from_the_packages(mirror: FakeMirror, signer: Signer) -> None:
    guest = build(mirror, signer)

    assert_good(guest)
    assert guest.append == APPEND


def test_built_guest_needs_neither_network_nor_apt(
    mirror: FakeMirror, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = build(mirror, signer)
    asked = mirror.requests.total()
    monkeypatch.setenv("PATH", "")

    assert build_boot_guest("off") == guest
    assert mirror.requests.total() == asked


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "manifest"])
def test_damaged_guest_is_built_again_from_the_cached_packages(mirror: FakeMirror, signer: Signer, damage: str) -> None:
    guest = build(mirror, signer)
    asked = mirror.requests.total()
    match damage:
        case "changed":
            guest.kernel.write_bytes(guest.kernel.read_bytes()[:-1] + b"?")
        case "cut":
            guest.initrd.write_bytes(guest.initrd.read_bytes()[:100])
        case "removed":
            guest.kernel.unlink()
        case "manifest":
            (guest.kernel.parent / "manifest.json").write_text(json.dumps({"format": 1, "files": 3}))

    assert_good(build(mirror, signer))
    assert mirror.requests.total() == asked


def test_copied_cache_is_used_as_it_is(mirror: FakeMirror, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = build(mirror, signer)
    os.utime(guest.kernel, (1, 1))
    monkeypatch.setenv("PATH", "")

    assert build_boot_guest("off") == guest


def test_killed_build_leaves_nothing_that_the_next_one_uses(mirror: FakeMirror, signer: Signer, home: Path) -> None:
    kernel = f"linux-image-{RELEASE}_1-1_riscv64.deb"
    mirror.faults[kernel] = "stall"
    killed = start_build(mirror, signer)
    assert mirror.stalled.wait(30)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    mirror.faults.clear()
    mirror.release.set()

    assert_good(build(mirror, signer))
    left = [path for path in (home / "cache").rglob("partial/*") if "archives" not in path.parts]
    assert left == []


def test_two_builds_at_once_agree(mirror: FakeMirror, signer: Signer) -> None:
    builds = [start_build(mirror, signer) for _ in range(2)]

    outcomes = [(*process.communicate(), process.returncode) for process in builds]

    assert [code for *_, code in outcomes] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    assert_good(build(mirror, signer))
    assert mirror.requests_for("busybox-static_1-1_riscv64.deb") == 1


def test_index_out_of_date_is_fetched_again(mirror: FakeMirror, signer: Signer) -> None:
    mirror.faults[f"linux-image-{RELEASE}_1-1_riscv64.deb"] = "wrong hash"
    with pytest.raises(ImageError):
        build(mirror, signer)
    mirror.publish("6.100-riscv64")

    assert_good(build(mirror, signer), "6.100-riscv64")


def test_newer_kernel_comes_only_when_asked_for(mirror: FakeMirror, signer: Signer) -> None:
    build(mirror, signer)
    mirror.publish("6.100-riscv64")

    assert build(mirror, signer).release == RELEASE
    assert_good(build(mirror, signer, refresh=True), "6.100-riscv64")


def test_wrong_kernel_package_is_refused(mirror: FakeMirror, signer: Signer, home: Path) -> None:
    mirror.faults[f"linux-image-{RELEASE}_1-1_riscv64.deb"] = "wrong hash"

    with pytest.raises(ImageError, match=rf"served the package linux-image-{RELEASE} 1:1-1 with a wrong hash or size"):
        build(mirror, signer)

    assert not list((home / "cache" / "boot").glob("*/kernel"))


def test_compressed_kernel_is_decompressed() -> None:
    assert kernel_image(gzip.compress(KERNEL), "vmlinuz") == KERNEL


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(100), b"\x7fELF" + bytes(100)])
def test_other_kernel_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="the kernel vmlinuz is not a RISC-V Image"):
        kernel_image(data, "vmlinuz")


def test_damaged_compressed_kernel_is_refused() -> None:
    with pytest.raises(ImageError, match="the kernel vmlinuz is damaged"):
        kernel_image(b"\x1f\x8b\x08\x00 nonsense", "vmlinuz")


def test_command_too_long_for_the_kernel_is_refused() -> None:
    with pytest.raises(ImageError, match=r"the kernel command line would have \d+ bytes: it takes 1023"):
        append_running("x" * 1000)


FIXED_INPUT_SHA256 = hashlib.sha256(b"fixed input\n").hexdigest()

COMMANDS = {
    "uname -sm; tty; exit 7": ("Linux riscv64", "/dev/ttyS0", "7"),
    "echo \"a 'quoted' $((6 * 7))\" é\nfalse": ("a 'quoted' 42 é", "", "1"),
    "echo fixed input | gzip | gunzip | sha256sum; kill -9 $$": (FIXED_INPUT_SHA256, "", "137"),
}


def boot_under_qemu(append: str) -> str:
    """What the real boot guest prints until it powers off."""
    guest = build_boot_guest()
    machine = ["qemu-system-riscv64", "-M", "virt", "-m", "256M", "-nographic", "-no-reboot"]
    boot = subprocess.run(
        [*machine, "-kernel", guest.kernel, "-initrd", guest.initrd, "-append", append],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=True,
    )
    return boot.stdout.decode().replace("\r", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_real_guest_runs_a_command_under_qemu(command: str) -> None:
    _, marker, lines = boot_under_qemu(append_running(command)).partition(USERLAND_MARKER)

    first, second, status = COMMANDS[command]
    assert marker
    assert first in lines
    assert second in lines
    found = EXIT_STATUS.search(lines)
    assert found is not None
    assert found[1] == status


def test_real_kernel_knows_every_initcall_that_is_left_out() -> None:
    log = boot_under_qemu(APPEND.replace("quiet", "loglevel=8") + " kata.poweroff")

    for initcall in UNNEEDED_INITCALLS:
        assert f"initcall {initcall} blacklisted" in log
