"""A VM in a process of its own: what MicroVm promises, and what becomes of it when either process is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from tests.vmm.guest_program import Program
from vmm import (
    BootError,
    ConfigError,
    ConfigureBootSource,
    ConsoleConfig,
    EndKind,
    GetState,
    GetVmConfiguration,
    MicroVm,
    PauseMicroVm,
    SetVmConfiguration,
    StartMicroVm,
    StateError,
    VmConfig,
    VmmError,
    VmState,
    VmTimeout,
)
from vmm.console import ConsoleClosed
from vmm.devices.virtio.vsock.endpoint import VsockError
from vmm.rpc.client import RemoteVm
from vmm.rpc.wire import RpcError

SECONDS = 60


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that says hello and then counts for ever."""
    program = Program().print("hello\n").forever()
    return program.write(tmp_path_factory.mktemp("looping") / "Image")


@pytest.fixture
def running(looping: Path) -> Iterator[RemoteVm]:
    """A VM that runs."""
    with RemoteVm(VmConfig(kernel=looping, memory_mib=16)) as vm:
        vm.start()
        vm.console.expect("hello", SECONDS)
        yield vm


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_guest_prints_and_shuts_down(tmp_path: Path) -> None:
    kernel = Program().print("hello\n").reset().write(tmp_path / "Image")
    config = VmConfig(kernel=kernel, memory_mib=16, console=ConsoleConfig(milestones={"said": "hello"}))
    with RemoteVm(config) as vm:
        heard: list[bytes] = []
        vm.console.subscribe(heard.append)

        vm.start()
        end = vm.wait(SECONDS)

        assert vm.console.text == "hello\n"
        assert b"".join(heard) == b"hello\n"
        assert end == vm.end == vm.ended.result(SECONDS)
        assert (end.kind, end.detail) == (EndKind.SHUTDOWN, "the guest shut down")
        assert vm.state is VmState.STOPPED
        assert [each.name for each in vm.trace.milestones] == ["first instruction", "first console byte", "said"]
        assert vm.metrics().instructions > 0
        assert vm.metrics().vcpus[0].state == "exited"


def test_state_follows_every_action(running: RemoteVm) -> None:
    running.pause()
    assert running.state is VmState.PAUSED
    assert running.request(GetState()).result(SECONDS).state is VmState.PAUSED

    running.resume()
    assert running.state is VmState.RUNNING

    end = running.shutdown()
    assert (end.kind, running.state) == (EndKind.HOST, VmState.STOPPED)


def test_the_vm_is_in_another_process_with_a_thread_for_each_vcpu(running: RemoteVm) -> None:
    threads = {each.id for each in psutil.Process(running.pid).threads()}

    assert running.pid != os.getpid()
    assert set(running.thread_ids) == {"vcpu-0", "vm-loop"}
    assert set(running.thread_ids.values()) <= threads
    assert psutil.Process(running.pid).ppid() == os.getpid()
    assert running.metrics().memory.rss > 1 << 20


def test_one_process_and_no_more(running: RemoteVm) -> None:
    assert psutil.Process(running.pid).children(recursive=True) == []


def test_the_process_inherits_nothing_but_a_pipe(running: RemoteVm) -> None:
    for number in (0, 1):
        assert os.readlink(f"/proc/{running.pid}/fd/{number}") == "/dev/null"
    assert os.readlink(f"/proc/{running.pid}/fd/2").startswith("pipe:")
    environment = Path(f"/proc/{running.pid}/maps").read_text()
    assert "numba" not in environment


def test_configuration_is_changed_and_read_back_on_both_sides() -> None:
    with RemoteVm() as vm:
        vm.request(ConfigureBootSource("Image", "initrd.cpio", "quiet")).result(SECONDS)
        vm.request(SetVmConfiguration({"vcpus": 2, "memory_mib": 128})).result(SECONDS)

        wanted = VmConfig(vcpus=2, memory_mib=128, kernel=Path("Image"), initrd=Path("initrd.cpio"), cmdline="quiet")
        assert vm.request(GetVmConfiguration()).result(SECONDS).config == wanted
        assert vm.config == wanted


def refusal(vm: MicroVm | RemoteVm, action: object) -> tuple[type, str]:
    with pytest.raises(VmmError) as caught:
        vm.request(cast(Any, action)).result(SECONDS)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "action",
    [
        PauseMicroVm(),
        StartMicroVm(),
        SetVmConfiguration({"memory_mb": 128}),
        SetVmConfiguration({"vcpus": 99}),
        SetVmConfiguration({"console": {"milestones": {"x": "("}}}),
        "an action",
    ],
)
def test_an_error_is_the_same_in_both_arrangements(action: object) -> None:
    with MicroVm() as fused, RemoteVm() as remote:
        assert refusal(remote, action)[0] is refusal(fused, action)[0]
        if action != "an action":
            assert refusal(remote, action) == refusal(fused, action)


def test_a_kernel_that_cannot_be_loaded_leaves_the_vm_configured(tmp_path: Path) -> None:
    with RemoteVm(VmConfig(kernel=tmp_path / "missing", memory_mib=16)) as vm:
        with pytest.raises(BootError, match="missing"):
            vm.start()

        assert vm.state is VmState.CONFIGURED


def test_a_configuration_that_only_a_vm_can_refuse_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        RemoteVm(VmConfig(console=ConsoleConfig(milestones={"bad": "("})))


def test_waiting_ends_when_its_time_is_over(running: RemoteVm) -> None:
    with pytest.raises(VmTimeout, match="still running after"):
        running.wait(0.01)


def test_a_vm_that_was_not_started_cannot_be_waited_for() -> None:
    with RemoteVm() as vm, pytest.raises(StateError, match="start it first"):
        vm.wait(1)


def test_a_report_tells_where_the_harts_stand(running: RemoteVm) -> None:
    report = running.report()

    assert report.harts[0].registers["t6"] > 0
    assert report.console[-1] == "hello"
    assert running.state is VmState.RUNNING


def test_requests_from_many_threads_are_all_answered(running: RemoteVm) -> None:
    answers: list[object] = []

    def ask() -> None:
        answers.extend(running.request(GetState()).result(SECONDS).state for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert answers == [VmState.RUNNING] * 160


def test_typing_reaches_the_guest(tmp_path: Path) -> None:
    # Prints each byte that the serial port receives, until a full stop comes.
    kernel = Program().print(">").label("wait").load_immediate("s0", 0x1000_0000)
    kernel.put("lbu", rd="t0", rs1="s0", imm=5).put("andi", rd="t0", rs1="t0", imm=1)
    kernel.put("beq", rs1="t0", rs2="zero", imm="wait").put("lbu", rd="s1", rs1="s0", imm=0)
    kernel.put("sb", rs1="s0", rs2="s1", imm=0).put("addi", rd="t1", rs1="s1", imm=-ord("."))
    kernel.put("bne", rs1="t1", rs2="zero", imm="wait").reset()
    with RemoteVm(VmConfig(kernel=kernel.write(tmp_path / "Image"), memory_mib=16)) as vm:
        with pytest.raises(StateError, match="no machine is connected"):
            vm.console.write("too early")
        vm.start()
        vm.console.expect(">", SECONDS)
        text = "typed " * 2000 + "."

        vm.console.write(text)
        vm.wait(SECONDS)

        assert vm.console.text == ">" + text
        with pytest.raises(ConsoleClosed, match="the guest shut down"):
            vm.console.write("too late")


def test_it_can_be_awaited(looping: Path) -> None:
    async def use() -> EndKind:
        async with RemoteVm(VmConfig(kernel=looping, memory_mib=16)) as vm:
            await asyncio.wrap_future(vm.request(StartMicroVm()))
            ended = asyncio.wrap_future(vm.ended)
            vm.request(PauseMicroVm())
            os.kill(vm.pid, signal.SIGKILL)
            return (await ended).kind

    assert asyncio.run(use()) is EndKind.CRASH


def test_closing_leaves_no_process_no_thread_and_no_file(tmp_path: Path, looping: Path) -> None:
    os.chmod(tmp_path, 0o700)
    before = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    vm = RemoteVm(VmConfig(kernel=looping, memory_mib=16), tmp_path / "vmm.sock")
    vm.start()

    vm.close()
    vm.close()

    assert not is_alive(vm.pid)
    assert set(threading.enumerate()) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert list(tmp_path.iterdir()) == []
    assert vm.end is not None
    assert vm.end.kind is EndKind.HOST
    with pytest.raises(StateError, match="a VM that is closed"):
        vm.request(GetState()).result(SECONDS)


def test_a_killed_vmm_is_a_vm_that_ended_and_every_request_that_waits_fails(running: RemoteVm) -> None:
    told = threading.Event()
    running.ended.add_done_callback(lambda _: told.set())
    os.kill(running.pid, signal.SIGSTOP)
    waiting = [running.request(GetState()) for _ in range(3)]

    os.kill(running.pid, signal.SIGKILL)

    assert told.wait(SECONDS)
    end = running.ended.result(0)
    assert end.kind is EndKind.CRASH
    assert end.detail == f"the VMM process (process {running.pid}) was killed by SIGKILL"
    assert running.state is VmState.STOPPED
    for each in waiting:
        with pytest.raises(RpcError, match=r"GetState has no answer, since the VMM process .* SIGKILL"):
            each.result(SECONDS)
    with pytest.raises(RpcError, match="StartMicroVm has no answer"):
        running.start()
    with pytest.raises(ConsoleClosed, match="SIGKILL"):
        running.console.expect("more", SECONDS)
    assert running.thread_ids == {}
    assert running.shutdown() == end
    assert running.metrics().vcpus == () or running.metrics().instructions > 0


def test_after_a_killed_vmm_the_next_one_uses_the_same_socket(tmp_path: Path, looping: Path) -> None:
    os.chmod(tmp_path, 0o700)
    config = VmConfig(kernel=looping, memory_mib=16)
    with RemoteVm(config, tmp_path / "vmm.sock") as vm:
        os.kill(vm.pid, signal.SIGKILL)
        vm.ended.result(SECONDS)

        with RemoteVm(config, tmp_path / "vmm.sock") as again:
            again.start()
            again.console.expect("hello", SECONDS)
    assert list(tmp_path.iterdir()) == []


USER = """
import sys
from pathlib import Path
from vmm import VmConfig
from vmm.config import VsockConfig
from vmm.rpc.client import RemoteVm
vsock = VsockConfig(socket=Path(sys.argv[2]) / "vm.sock")
vm = RemoteVm(VmConfig(kernel=sys.argv[1], memory_mib=16, devices=(vsock,)), Path(sys.argv[2]) / "vmm.sock")
vm.start()
vm.console.expect("hello")
print(vm.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_vmm_whose_user_is_killed_ends_by_itself_and_leaves_nothing(
    tmp_path: Path, looping: Path, how: signal.Signals
) -> None:
    os.chmod(tmp_path, 0o700)
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(looping), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        vmm = psutil.Process(int(user.stdout.readline()))
        assert {each.name for each in tmp_path.iterdir()} == {"vm.sock", "vmm.sock"}

        user.send_signal(how)
        user.wait(SECONDS)

        vmm.wait(SECONDS)
    assert list(tmp_path.iterdir()) == []


def test_a_vmm_that_was_told_to_end_shuts_its_vm_down(running: RemoteVm) -> None:
    os.kill(running.pid, signal.SIGTERM)

    end = running.ended.result(SECONDS)

    assert (end.kind, end.detail) == (EndKind.HOST, "the host shut the VM down")
    running.close()
    assert not is_alive(running.pid)


def test_a_guest_that_prints_without_end_stops_nobody(tmp_path: Path) -> None:
    program = Program().load_immediate("t0", 0x1000_0000).load_immediate("t1", ord("x"))
    program.label("again").put("sb", rs1="t0", rs2="t1", imm=0).put("jal", rd="zero", imm="again")
    config = VmConfig(
        kernel=program.write(tmp_path / "Image"), memory_mib=16, console=ConsoleConfig(limit_bytes=1 << 16)
    )
    with RemoteVm(config) as vm:
        vm.start()
        vm.console.expect("x" * 10_000, SECONDS)

        assert vm.request(GetState()).result(SECONDS).state is VmState.RUNNING
        assert len(vm.console.output) <= 1 << 16
        assert vm.shutdown(SECONDS).kind is EndKind.HOST


def test_a_vm_without_vsock_says_how_to_get_one() -> None:
    with RemoteVm() as vm:
        with pytest.raises(VsockError, match="no vsock device"):
            vm.dial(1024)
        with pytest.raises(VsockError, match="no vsock device"):
            vm.listen(1024, lambda connection: None)


def test_a_process_that_cannot_start_tells_why_in_one_sentence(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)

    with pytest.raises(RpcError) as caught:
        RemoteVm(VmConfig(), tmp_path / "vmm.sock")

    assert str(caught.value).startswith("the VMM process did not start: the socket's directory")
    assert "chmod 700" in str(caught.value)
    assert "\n" not in str(caught.value)
