"""Programs in a stock guest give the answers that the same work gives on the host."""

from __future__ import annotations

import hashlib
import re
import zlib

import pytest

from kata_lab.image.boot import EXIT_STATUS, BootGuest, append_running, build_boot_guest
from vmm import EndKind, MicroVm, VmConfig

COMPLAINTS = re.compile(r"rcu.*stall|soft lockup|hung task|BUG:|Oops|Unable to handle", re.IGNORECASE)
NUMBERS = "".join(f"{number}\n" for number in range(1, 30_001)).encode()


@pytest.fixture(scope="module")
def guest() -> BootGuest:
    return build_boot_guest(progress="off")


def output_of(guest: BootGuest, command: str, vcpus: int) -> str:
    """Console text of a VM that runs one command and powers off."""
    cmdline = append_running(command, guest.append)
    with MicroVm(VmConfig(kernel=guest.kernel, initrd=guest.initrd, cmdline=cmdline, vcpus=vcpus)) as vm:
        vm.start()
        assert vm.wait(120).kind is EndKind.SHUTDOWN
        text = vm.console.text.replace("\r", "")
    status = EXIT_STATUS.search(text)
    assert status is not None
    assert status[1] == "0", text
    assert not COMPLAINTS.search(text), text
    return text


def test_hashes_and_compression_agree_with_the_host(guest: BootGuest) -> None:
    command = (
        "seq 30000 > /n; sha256sum < /n; md5sum < /n; sha512sum < /n; wc -c < /n;"
        " gzip -c /n | gunzip | sha256sum; bzip2 -c /n | bunzip2 | sha256sum; gzip -9c /n > /z; gunzip -t /z"
    )

    text = output_of(guest, command, vcpus=1)

    assert text.count(hashlib.sha256(NUMBERS).hexdigest()) == 3
    assert hashlib.md5(NUMBERS).hexdigest() in text
    assert hashlib.sha512(NUMBERS).hexdigest() in text
    assert f"\n{len(NUMBERS)}\n" in text


def test_a_compressed_file_made_on_the_host_unpacks_in_the_guest(guest: BootGuest) -> None:
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = packed.compress(bytes(range(256)) * 3) + packed.flush()

    text = output_of(guest, f"echo {data.hex()} | xxd -r -p | gunzip | sha256sum", vcpus=1)

    assert hashlib.sha256(bytes(range(256)) * 3).hexdigest() in text


def test_floating_point_of_a_program_agrees_with_the_host(guest: BootGuest) -> None:
    """busybox awk computes in double precision."""
    program = 'BEGIN { s = 0; for (i = 1; i <= 5000; i++) s += i / 3 - 1 / (i * i); printf \\"%.12e\\n\\", s }'
    expected = 0.0
    for number in range(1, 5001):
        expected += number / 3 - 1 / (number * number)

    text = output_of(guest, f'awk "{program}"', vcpus=1)

    assert f"{expected:.12e}" in text


def test_four_harts_at_work_at_once_agree_with_the_host(guest: BootGuest) -> None:
    """More jobs than harts, more harts than this machine may have cores: pipes, forks, timers and migrations."""
    job = "(for r in 1 2; do seq 30000 | gzip | gunzip | sha256sum; done) &"

    text = output_of(guest, f"{job} {job} {job} {job} {job} {job} wait", vcpus=4)

    assert text.count(hashlib.sha256(NUMBERS).hexdigest()) == 12
