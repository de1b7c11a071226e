"""The split arrangement as processes: whichever of the three is killed, nothing is left of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.vmm.guest_program import Program
from vmm import ConfigError, EndKind, VmConfig, VmState
from vmm.config import VhostFsConfig
from vmm.rpc.client import RemoteVm
from vmm.vhost.process import FsProcess

SECONDS = 60

RUNTIME = """
import sys
from pathlib import Path
from vmm import VmConfig
from vmm.rpc.client import RemoteVm
from vmm.vhost.process import FsProcess
place = Path(sys.argv[2])
fs = FsProcess(place / "fs.sock")
vm = RemoteVm(VmConfig(kernel=sys.argv[1], memory_mib=16, devices=(fs.device("shared"),)), place / "vmm.sock")
vm.start()
vm.console.expect("hello")
print(vm.pid, fs.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return Program().print("hello\n").forever().write(tmp_path / "Image")


@contextmanager
def running(kernel: Path, place: Path) -> Iterator[tuple[RemoteVm, FsProcess]]:
    with FsProcess(place / "fs.sock") as fs:
        config = VmConfig(kernel=kernel, memory_mib=16, devices=(fs.device("shared"),))
        with RemoteVm(config, place / "vmm.sock") as vm:
            vm.start()
            vm.console.expect("hello", SECONDS)
            yield vm, fs


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_runtime_leaves_no_process_and_no_socket(kernel: Path, private: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", RUNTIME, str(kernel), str(private)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runtime:
        assert runtime.stdout is not None
        others = [psutil.Process(int(pid)) for pid in runtime.stdout.readline().split()]

        runtime.send_signal(how)
        runtime.wait(SECONDS)

        assert len(others) == 2
        for each in others:
            each.wait(SECONDS)
    assert list(private.iterdir()) == []


def test_a_killed_vmm_takes_its_file_system_process_along_and_the_next_start_works(kernel: Path, private: Path) -> None:
    for _ in range(2):
        with running(kernel, private) as (vm, fs):
            os.kill(vm.pid, signal.SIGKILL)

            assert vm.ended.result(SECONDS).kind is EndKind.CRASH
            assert fs.ended.result(SECONDS).endswith("ended with status 0")
        assert list(private.iterdir()) == []


def test_a_killed_file_system_process_is_told_and_the_vm_can_be_shut_down(kernel: Path, private: Path) -> None:
    with running(kernel, private) as (vm, fs):
        os.kill(fs.pid, signal.SIGKILL)

        assert fs.ended.result(SECONDS).endswith("killed by SIGKILL")
        assert vm.state is VmState.RUNNING
        assert vm.shutdown(SECONDS).kind is EndKind.HOST
    assert list(private.iterdir()) == []


def test_a_vm_whose_file_system_process_is_not_there_does_not_start(kernel: Path, private: Path) -> None:
    device = VhostFsConfig(tag="shared", socket=private / "fs.sock")
    with RemoteVm(VmConfig(kernel=kernel, memory_mib=16, devices=(device,))) as vm:
        with pytest.raises(ConfigError, match="start a back end there first"):
            vm.start()
        assert vm.state is VmState.CONFIGURED

        with FsProcess(private / "fs.sock"):
            vm.start()
            assert vm.state is VmState.RUNNING
            vm.shutdown(SECONDS)


def test_only_a_vm_with_such_a_device_shares_its_memory(kernel: Path, private: Path) -> None:
    with running(kernel, private) as (vm, _):
        assert "guest-memory" in Path(f"/proc/{vm.pid}/maps").read_text()
    with RemoteVm(VmConfig(kernel=kernel, memory_mib=16)) as vm:
        vm.start()
        vm.console.expect("hello", SECONDS)
        assert "guest-memory" not in Path(f"/proc/{vm.pid}/maps").read_text()
