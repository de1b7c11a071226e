"""Commands over a real guest's console: exact output, exit statuses, and time-outs that leave the shell usable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from kata_lab.shell import GuestShell, ShellError, ShellTimeout, boot_image
from tests.guest.conftest import Boot
from vmm.config import EntropyConfig
from vmm.microvm import MicroVm

Guest = tuple[MicroVm, GuestShell]


@pytest.fixture(scope="module")
def guest(toolbox: Boot) -> Iterator[Guest]:
    with toolbox(devices=[EntropyConfig()], files={"/opt/greet": b'#!/bin/sh\necho "hello $1"\n'}) as booted:
        yield booted


@pytest.fixture
def shell(guest: Guest) -> GuestShell:
    return guest[1]


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("true", 0, ""),
        ("exit 3", 3, ""),
        ("kill -9 $$", 137, "Killed\n"),
        ("sh -c 'kill -9 $$'; echo $?", 0, "Killed\n137\n"),
        ("echo one; echo two >&2; printf three", 0, "one\ntwo\nthree"),
        ("for i in 1 2; do\n  echo \"$i\"\ndone\n", 0, "1\n2\n"),
        ("  printf '%s' '\\n  $HOME'", 0, "\\n  $HOME"),
        ("printf '%s' 'tab\tescape\x1b interrupt\x03'", 0, "tab\tescape\x1b interrupt\x03"),
        ("printf 'é\udcff'", 0, "é\udcff"),
        ("cat", 0, ""),
        ("no-such-command", 127, "sh: no-such-command: not found\n"),
        ("/opt/greet 'you there'", 0, "hello you there\n"),
    ],
)  # fmt: skip
def test_a_command_gives_its_exact_output_and_status(shell: GuestShell, command: str, status: int, output: str) -> None:
    result = shell.run(command)

    assert (result.status, result.output) == (status, output)


def test_a_syntax_error_is_a_status(shell: GuestShell) -> None:
    assert shell.run("if then").status == 2
    assert shell.run("echo still here").output == "still here\n"


def test_one_command_leaves_nothing_to_the_next(shell: GuestShell) -> None:
    shell.run("cd /tmp; word=kept; exec 3>&1")

    assert shell.run('pwd; echo "[$word]"').output == "/\n[]\n"


def test_every_byte_of_long_output_arrives(shell: GuestShell) -> None:
    result = shell.run("head -c 100000 /bin/busybox", timeout=120)
    digest = shell.run("head -c 100000 /bin/busybox | sha256sum").output.split()[0]

    assert len(result.data) == 100_000
    assert hashlib.sha256(result.data).hexdigest() == digest


def test_a_long_command_arrives(shell: GuestShell) -> None:
    assert shell.run(f"echo {'x' * 6000} | wc -c").output == "6001\n"


def test_messages_of_the_kernel_are_neither_output_nor_harm(shell: GuestShell, guest: Guest) -> None:
    noise = "while :; do echo '<1>noise of the kernel' >/dev/kmsg; done"

    result = shell.run(f"({noise}) & seq 500; kill $!", timeout=120)

    assert result.output == "".join(f"{number}\n" for number in range(1, 501))
    assert "noise of the kernel" in guest[0].console.text


def test_a_command_that_takes_too_long_is_interrupted(shell: GuestShell) -> None:
    with pytest.raises(ShellTimeout, match=r"'echo begun; sleep 600' took more than 0.5 s and was interrupted") as told:
        shell.run("echo begun; sleep 600", timeout=0.5)

    assert told.value.output == "begun\n"
    assert shell.run("pidof sleep").status == 1


def test_a_command_that_prints_without_end_is_interrupted(shell: GuestShell) -> None:
    with pytest.raises(ShellTimeout):
        shell.run("yes", timeout=0.5)

    assert shell.run("echo well").output == "well\n"


def test_a_checked_command_that_fails_is_an_error_with_its_words(shell: GuestShell) -> None:
    with pytest.raises(ShellError, match=r"'echo no such thing; exit 7' ended with status 7 and said 'no such thing'"):
        shell.run("echo no such thing; exit 7", check=True)


def test_a_zero_byte_in_a_command_is_refused(shell: GuestShell) -> None:
    with pytest.raises(ShellError, match="zero byte"):
        shell.run("echo \0")


def test_drivers_of_the_devices_that_are_there_are_loaded(shell: GuestShell) -> None:
    modules = [line.split()[0] for line in shell.run("tail -n +2 /proc/modules; lsmod", check=True).output.splitlines()]

    assert "virtio_rng" in modules
    assert not {"virtio_blk", "virtio_net", "virtio_balloon", "vsock"} & set(modules)
    assert shell.run("head -c 1000 /dev/hwrng | wc -c").output == "1000\n"


def test_loopback_is_up(shell: GuestShell) -> None:
    assert shell.run("ping -c 1 -w 5 127.0.0.1", check=True).status == 0


def test_tools_run(shell: GuestShell) -> None:
    tools = "fio --version; iperf3 --version; mke2fs -V; e2fsck -V; strace -V; lsblk -V; setfattr --version; socat -V"
    for command in tools.split("; "):
        shell.run(command, check=True)


def test_the_end_of_the_vm_is_told(toolbox: Boot) -> None:
    with (
        pytest.raises(ShellError, match=r"the VM ended while 'poweroff -f' ran: the guest shut down"),
        toolbox() as (_, shell),
    ):
        shell.run("poweroff -f")


def test_a_guest_without_a_shell_is_refused_with_its_words() -> None:
    with pytest.raises(ShellError, match="the guest's shell does not answer"), boot_image(append="kata.poweroff"):
        pass


def test_too_little_memory_for_the_root_is_told() -> None:
    filler = bytes(96 << 20)

    with (
        pytest.raises(ShellError, match="256 MiB of memory are too few for the root of the image 'lifsea'"),
        boot_image("lifsea", memory_mib=256, files={"/usr/filler": filler}),
    ):
        pass


def test_the_prompt_is_back_after_the_shell_was_closed(toolbox: Boot) -> None:
    with toolbox() as (vm, shell):
        shell.run("true")
        shell.close()
        vm.console.expect("kata-lab:/# ", timeout=60)

        with GuestShell(vm) as again:
            assert again.run("echo again").output == "again\n"


def test_a_program_that_calls_an_absent_library_ends_by_a_signal(shell: GuestShell) -> None:
    verified = "fio --name=verified --rw=randwrite --bs=4k --size=256k --verify=crc32c --filename=/tmp/verified"
    remote = "fio --name=remote --ioengine=rbd --rw=read --size=1m --pool=none --rbdname=none"

    assert shell.run(verified, check=True).status == 0
    assert shell.run(remote).status == 128 + 4
