"""A real guest in the split arrangement: this process, a VMM process, and a file system process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kata_lab.image.boot import boot_source
from kata_lab.image.build import build_named
from kata_lab.shell import GuestShell, initrd_with
from vmm import EndKind, GetState, VmConfig, VmState
from vmm.actions import ManipulateFsBackend
from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.endpoint import VsockError
from vmm.errors import ConfigError
from vmm.rpc.client import RemoteVm
from vmm.vhost.process import FsProcess

SECONDS = 120
ECHO = 7000
HOST = 6000

PROGRAM = b"""#!/usr/bin/micropython
# In the guest: "echo" one connection from the host, or "call" a port of the host and print what it says.
import socket, struct, sys
def address(port, cid):
    return struct.pack("<HHIIBBBB", 40, 0, port, cid, 0, 0, 0, 0)
made = socket.socket(40, 1)
if sys.argv[1] == "echo":
    made.bind(address(int(sys.argv[2]), 0xFFFFFFFF))
    made.listen(8)
    connected, _ = made.accept()
    connected.write(connected.readline())
    connected.close()
else:
    made.connect(address(int(sys.argv[2]), 2))
    print(made.readline().decode())
"""


@dataclass
class Sandbox:
    """The guest, and the processes that it consists of."""

    vm: RemoteVm
    shell: GuestShell
    fs: FsProcess
    share: Path


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A guest that has mounted the share at /mnt."""
    place = tmp_path_factory.mktemp("sandbox")
    os.chmod(place, 0o700)
    share = place / "share"
    share.mkdir()
    (share / "hello").write_text("from the host\n")
    source = boot_source(build_named("toolbox", progress="off"))
    with ExitStack() as stack:
        initrd = stack.enter_context(initrd_with(source.initrd, {"/usr/bin/sockets": PROGRAM}))
        fs = stack.enter_context(FsProcess(place / "fs.sock"))
        config = VmConfig(
            memory_mib=512,
            kernel=source.kernel,
            initrd=initrd,
            cmdline=source.append,
            devices=(VsockConfig(name="agent", socket=place / "vm.sock"), fs.device("shared", name="shared")),
        )
        vm = stack.enter_context(RemoteVm(config, place / "vmm.sock"))
        vm.start()
        shell = stack.enter_context(GuestShell(vm))
        manipulate(vm, "add", "work", share)
        shell.run("mount -t virtiofs shared /mnt", check=True)
        yield Sandbox(vm, shell, fs, share)


def manipulate(vm: RemoteVm, operation: str, entry: str, path: Path | None = None) -> None:
    vm.request(ManipulateFsBackend("shared", operation, entry, path)).result(SECONDS)


def test_the_sandbox_is_three_processes(sandbox: Sandbox) -> None:
    this = psutil.Process()
    own = {sandbox.vm.pid, sandbox.fs.pid}

    assert own <= {each.pid for each in this.children()}
    assert [psutil.Process(pid).children() for pid in own] == [[], []]
    assert {psutil.Process(pid).cmdline()[3] for pid in own} == {"vmm.rpc", "vmm.vhost.fs"}


def test_the_guest_reads_and_writes_what_the_host_has(sandbox: Sandbox) -> None:
    data = os.urandom(3 << 20)
    (sandbox.share / "data").write_bytes(data)

    sandbox.shell.run("cp /mnt/work/data /mnt/work/copy && echo guest >/mnt/work/written", check=True)

    assert sandbox.shell.run("cat /mnt/work/hello").output == "from the host\n"
    assert (sandbox.share / "copy").read_bytes() == data
    assert (sandbox.share / "written").read_text() == "guest\n"


def test_a_program_that_the_host_replaces_is_the_new_one_when_it_runs_again(sandbox: Sandbox) -> None:
    """Pages that held code take other code from the file system process, of which the engine must hear."""
    made = "mkdir /mnt/work/bin && cp /bin/busybox /usr/bin/micropython /mnt/work/bin"
    sandbox.shell.run(made, check=True)
    directory = sandbox.share / "bin"
    for _ in range(6):
        for name, said in (("busybox", "--version"), ("micropython", "MicroPython")):
            shutil.copyfile(directory / name, directory / "next")
            os.chmod(directory / "next", 0o755)
            os.rename(directory / "next", directory / "echo")  # BusyBox acts by the name that it is called by
            output = sandbox.shell.run("echo 3 >/proc/sys/vm/drop_caches; /mnt/work/bin/echo --version 2>&1").output
            assert output.startswith(said), output


def test_shares_come_and_go_by_an_action(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("another\n")

    manipulate(sandbox.vm, "add", "other", tmp_path)
    assert sandbox.shell.run("cat /mnt/other/file").output == "another\n"
    with pytest.raises(ConfigError, match="'other': File exists"):
        manipulate(sandbox.vm, "add", "other", tmp_path)
    with pytest.raises(ConfigError, match="must be 'add' or 'remove'"):
        manipulate(sandbox.vm, "replace", "other", tmp_path)

    manipulate(sandbox.vm, "remove", "other")
    assert sandbox.shell.run("cat /mnt/other/file").status != 0


def test_ports_of_the_guest_are_dialled(sandbox: Sandbox) -> None:
    with pytest.raises(VsockError, match=f"port {ECHO} of the guest cannot be reached"):
        sandbox.vm.dial(ECHO).result(SECONDS)
    sandbox.shell.run(f"sockets echo {ECHO} >/dev/null 2>&1 &", check=True)

    connection = None
    while connection is None:  # until the guest listens
        try:
            connection = sandbox.vm.dial(ECHO).result(SECONDS)
        except VsockError:
            assert sandbox.vm.state is VmState.RUNNING
    with connection:
        connection.settimeout(SECONDS)
        connection.sendall(b"hello\n")
        assert connection.makefile("rb").readline() == b"hello\n"


def test_ports_of_the_host_are_listened_at(sandbox: Sandbox) -> None:
    def accept(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"from the host\n")

    sandbox.vm.listen(HOST, accept)
    with pytest.raises(VsockError, match="has a listener already"):
        sandbox.vm.listen(HOST, accept)

    assert sandbox.shell.run(f"sockets call {HOST}").output.strip() == "from the host"
    sandbox.vm.unlisten(HOST)
    assert sandbox.shell.run(f"sockets call {HOST}").status != 0


def test_a_paused_guest_goes_on_with_its_files(sandbox: Sandbox) -> None:
    for _ in range(3):
        sandbox.vm.pause()
        sandbox.vm.resume()
        assert sandbox.shell.run("cat /mnt/work/hello && echo more >>/mnt/work/appended").output == "from the host\n"

    assert (sandbox.share / "appended").read_text() == "more\n" * 3


def test_last_a_killed_file_system_process_is_told_and_the_guest_lives_without_its_share(sandbox: Sandbox) -> None:
    ended = sandbox.fs.ended
    os.kill(sandbox.fs.pid, signal.SIGKILL)

    assert "killed by SIGKILL" in ended.result(SECONDS)
    result = sandbox.shell.run("echo 3 >/proc/sys/vm/drop_caches; cat /mnt/work/hello")
    assert result.status != 0
    assert "Input/output error" in result.output
    assert sandbox.vm.request(GetState()).result(SECONDS).state is VmState.RUNNING
    with pytest.raises(ConfigError, match="shared can share nothing any more"):
        manipulate(sandbox.vm, "add", "more", sandbox.share)
    assert sandbox.shell.run("echo alive").output == "alive\n"
    assert sandbox.vm.shutdown(SECONDS).kind is EndKind.HOST
