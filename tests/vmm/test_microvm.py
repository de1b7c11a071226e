"""A VM with small guest programs: its life, its ends, its harts, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.guest_program import UART, Program
from vmm import (
    BootError,
    ConfigureBootSource,
    ConsoleTimeout,
    EndKind,
    EngineError,
    MicroVm,
    PauseMicroVm,
    StateError,
    VmConfig,
    VmState,
    VmTimeout,
)
from vmm.sbi import BASE, DBCN, HSM, IPI, RFENCE, TIME, SbiError
from vmm.trace import FIRST_CONSOLE_BYTE, FIRST_INSTRUCTION

ALL = (1 << 64) - 1
SSIE = 1 << 1
STIE = 1 << 5

MakeVm = Callable[..., MicroVm]


@pytest.fixture
def make_vm(tmp_path: Path) -> Any:
    """Makes VMs of programs, and closes them."""
    made: list[MicroVm] = []

    def make(program: Program, **settings: Any) -> MicroVm:
        kernel = program.write(tmp_path / f"Image{len(made)}")
        made.append(MicroVm(VmConfig(kernel=kernel, **{"memory_mib": 8, **settings})))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


def ended(vm: MicroVm) -> str:
    """Start, wait for the end, and give what was printed."""
    vm.start()
    vm.wait(60)
    return vm.console.text


def test_a_program_prints_and_shuts_down(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("debug ").print_uart("serial").reset())

    assert ended(vm) == "debug serial"
    assert vm.end is not None
    assert (vm.end.kind, vm.end.status, vm.end.reset_type) == (EndKind.SHUTDOWN, 0, 0)
    assert vm.state is VmState.STOPPED


@pytest.mark.parametrize(
    ("kind", "reason", "expected"),
    [(0, 1, EndKind.FAILURE), (1, 0, EndKind.REBOOT), (2, 0, EndKind.REBOOT)],
)
def test_the_end_says_what_the_guest_asked_for(make_vm: MakeVm, kind: int, reason: int, expected: EndKind) -> None:
    vm = make_vm(Program().reset(kind, reason))

    ended(vm)

    assert vm.end is not None
    assert (vm.end.kind, vm.end.reset_type, vm.end.reset_reason) == (expected, kind, reason)


def test_a_reset_after_a_panic_is_a_panic_with_a_report(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("[ 1.0] Kernel panic - not syncing: no init found\n").reset(1))

    ended(vm)

    assert vm.end is not None
    assert (vm.end.kind, vm.end.status) == (EndKind.PANIC, 2)
    assert vm.report().panic == "no init found"
    assert "Kernel panic" in vm.report().console[-1]


def test_the_console_is_expected_from_and_typed_to(make_vm: MakeVm) -> None:
    # Echoes one byte, increased by one, once it is there.
    echo = Program().print("ready\n").load_immediate("t0", UART)
    echo.label("poll").put("lbu", rd="t1", rs1="t0", imm=5).put("andi", rd="t1", rs1="t1", imm=1)
    echo.put("beq", rs1="t1", rs2="zero", imm="poll").put("lbu", rd="t2", rs1="t0", imm=0)
    echo.put("addi", rd="t2", rs1="t2", imm=1).put("sb", rs1="t0", rs2="t2", imm=0).reset()
    vm = make_vm(echo)

    vm.start()
    vm.console.expect("ready\n", timeout=30)
    vm.console.write("A")
    vm.console.expect("B", timeout=30)

    assert vm.wait(30).kind is EndKind.SHUTDOWN


def test_waiting_on_the_console_of_a_vm_that_ends_does_not_last(make_vm: MakeVm) -> None:
    vm = make_vm(Program().reset())
    vm.start()

    with pytest.raises(ConsoleTimeout, match="the guest shut down"):
        vm.console.expect("login", timeout=60)


def test_a_paused_vm_retires_nothing_and_runs_on_when_resumed(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("up").forever(), vcpus=2)
    vm.start()
    vm.console.expect("up", timeout=30)

    vm.pause()
    before = vm.metrics()
    time.sleep(0.05)
    assert (vm.state, before.vcpus[0].state, vm.metrics().instructions) == (
        VmState.PAUSED,
        "paused",
        before.instructions,
    )
    vm.resume()
    assert vm.state is VmState.RUNNING

    assert wait_until(lambda: vm.report().harts[0].instructions > before.instructions)


def test_guest_time_stands_still_while_the_vm_is_paused(make_vm: MakeVm) -> None:
    vm = make_vm(Program().forever())
    vm.start()

    vm.pause()
    guest_before, host_before = vm.machine.engine.time(), time.monotonic()
    time.sleep(0.2)
    assert vm.machine.engine.time() == guest_before
    vm.resume()
    guest_passed, host_passed = vm.machine.engine.time() - guest_before, time.monotonic() - host_before

    assert 0 <= guest_passed / 10_000_000 <= host_passed - 0.2


def test_a_pause_while_the_hart_sleeps_does_not_wake_it(make_vm: MakeVm) -> None:
    program = Program().load_immediate("t0", SSIE).put("csrrs", rd="zero", csr="sie", rs1="t0").print("z")
    vm = make_vm(program.put("wfi").print("woken").forever())
    vm.start()
    vm.console.expect("z", timeout=30)

    for _ in range(5):
        vm.pause()
        vm.resume()
    vm.pause()
    vm.machine.engine.harts[0].set_interrupt(1, True)
    before = vm.console.text
    vm.resume()
    vm.console.expect("woken", timeout=30)

    assert before == "z"


def test_pause_and_resume_need_their_states(make_vm: MakeVm) -> None:
    vm = make_vm(Program().forever())
    vm.start()

    with pytest.raises(StateError, match="ResumeMicroVm came to a VM that is running; it needs one that is paused"):
        vm.resume()
    vm.pause()
    with pytest.raises(StateError, match="PauseMicroVm came to a VM that is paused; it needs one that is running"):
        vm.pause()
    with pytest.raises(StateError, match="StartMicroVm came to a VM that is paused; it needs one that is configured"):
        vm.start()


def test_a_paused_vm_can_be_shut_down(make_vm: MakeVm) -> None:
    vm = make_vm(Program().forever(), vcpus=2)
    vm.start()
    vm.pause()

    assert vm.shutdown(30).kind is EndKind.HOST
    assert vm.shutdown(30).kind is EndKind.HOST


def test_a_loop_is_waited_for_in_vain_and_reported(make_vm: MakeVm) -> None:
    vm = make_vm(Program().forever())
    vm.start()

    with pytest.raises(VmTimeout, match=r"still running after 0\.1 s"):
        vm.wait(0.1)
    report = vm.report()

    (hart,) = report.harts
    assert hart.state == "started"
    assert any(line.address == hart.pc for line in hart.code)
    assert any(line.text.startswith("jal zero") for line in hart.code)
    assert vm.state is VmState.RUNNING


@pytest.mark.parametrize("clock", ["real", "deterministic"])
def test_a_jump_to_itself_with_interrupts_off_ends_the_vm_with_a_report(make_vm: MakeVm, clock: str) -> None:
    vm = make_vm(Program().hang(), clock=clock)
    vm.start()

    end = vm.wait(30)

    assert (end.kind, end.status) == (EndKind.HANG, 3)
    assert "jumps to itself at 0x" in end.detail
    assert "endless loop" in vm.report().harts[0].hint


def test_a_hart_that_hangs_does_not_end_the_vm_while_another_runs(make_vm: MakeVm) -> None:
    program = Program().start_hart(1, "hangs").load_immediate("s0", 300)
    program.label("works").ecall(BASE, 0).put("addi", rd="s0", rs1="s0", imm=-1)
    program.put("bne", rs1="s0", rs2="zero", imm="works").print("done").reset()
    program.label("hangs").hang()

    assert ended(make_vm(program, vcpus=2)) == "done"


def test_a_report_names_registers_and_code(make_vm: MakeVm) -> None:
    vm = make_vm(Program().load_immediate("s3", 0x1234_5678_9ABC_DEF0).print("x\n").forever())
    vm.start()
    vm.console.expect("x\n", timeout=30)

    report = vm.report()

    assert report.harts[0].registers["s3"] == 0x1234_5678_9ABC_DEF0
    assert report.harts[0].privilege == "S"
    text = str(report)
    assert "s3 123456789abcdef0" in text
    assert "=>" in text
    assert report.console == ("x",)


def test_a_jump_into_nothing_is_reported(make_vm: MakeVm) -> None:
    vm = make_vm(Program().load_immediate("t0", 0x4000_0000).put("jalr", rd="zero", rs1="t0", imm=0))

    ended(vm)

    assert vm.end is not None
    assert vm.end.kind is EndKind.CRASH
    assert "trap vector 0x0 and would trap for ever" in vm.report().reason
    assert vm.report().harts[0].csrs["scause"] == 1
    assert "no trap handler was set" in vm.report().harts[0].hint


def test_a_store_where_no_device_is_faults_in_the_guest_and_is_reported(make_vm: MakeVm) -> None:
    wild = Program().load_address("t0", "handler").put("csrrw", rd="zero", csr="stvec", rs1="t0")
    wild.load_immediate("t1", 0x4000_0000).put("sw", rs1="t1", rs2="zero", imm=0).forever()
    wild.put("addi", rd="zero", rs1="zero", imm=0).label("handler")
    wild.put("csrrs", rd="s1", csr="scause", rs1="zero").put("csrrs", rd="s2", csr="stval", rs1="zero").reset(0, 1)
    # stvec keeps its low two bits for the mode: the handler must be 4-aligned, as every instruction here is.
    vm = make_vm(wild)

    ended(vm)

    report = vm.report()
    assert (report.harts[0].registers["s1"], report.harts[0].registers["s2"]) == (7, 0x4000_0000)
    assert len(report.bus_faults) == 1
    assert "write of 4 bytes at 0x40000000" in report.bus_faults[0]
    assert report.bus_faults[0] in str(report)


def test_a_device_that_fails_ends_the_vm_and_not_the_process(make_vm: MakeVm) -> None:
    class Broken:
        def read(self, offset: int, width: int) -> int:
            raise ZeroDivisionError("device bug")

        def write(self, offset: int, width: int, value: int) -> None:
            raise ZeroDivisionError("device bug")

    program = Program().load_immediate("t0", UART)
    program.label("poll").put("lbu", rd="t1", rs1="t0", imm=5).put("andi", rd="t1", rs1="t1", imm=1)
    program.put("beq", rs1="t1", rs2="zero", imm="poll")
    vm = make_vm(program.load_immediate("t0", 0x2000_0000).put("lw", rd="t1", rs1="t0", imm=0).forever())
    vm.start()
    vm.machine.board.bus.attach(Broken(), 0x2000_0000, 0x1000, "broken")
    vm.console.write("g")

    end = vm.wait(30)

    assert (end.kind, end.status) == (EndKind.CRASH, 3)
    assert "ZeroDivisionError: device bug" in end.detail
    assert "device bug" in vm.report().trace
    assert vm.report().hart == 0


def test_all_harts_stopped_is_a_crash(make_vm: MakeVm) -> None:
    vm = make_vm(Program().ecall(HSM, 1), vcpus=2)

    vm.start()

    assert vm.wait(30).kind is EndKind.CRASH
    assert "every hart has stopped itself" in vm.report().reason
    assert [hart.state for hart in vm.report().harts] == ["stopped", "stopped"]


def test_harts_are_started_with_their_id_and_argument(make_vm: MakeVm) -> None:
    program = Program()
    for hart in (1, 2, 3):
        # Wait for each to stop again, so that the letters come in order.
        program.start_hart(hart, "secondary", opaque=ord("a") + hart)
        program.label(f"wait {hart}").ecall(HSM, 2, hart).put("addi", rd="a1", rs1="a1", imm=-1)
        program.put("bne", rs1="a1", rs2="zero", imm=f"wait {hart}")
    program.start_hart(3, "secondary", opaque=ord("!")).label("last").ecall(HSM, 2, 3)
    program.put("addi", rd="a1", rs1="a1", imm=-1).put("bne", rs1="a1", rs2="zero", imm="last").reset()
    program.label("secondary").put("addi", rd="s0", rs1="a1", imm=0).put("addi", rd="a0", rs1="a0", imm=ord("0"))
    program.ecall_with_registers(DBCN, 2).put("addi", rd="a0", rs1="s0", imm=0).ecall_with_registers(DBCN, 2)
    vm = make_vm(program.ecall(HSM, 1), vcpus=4)

    assert ended(vm) == "1b2c3d3!"


def test_starting_what_runs_is_already_available(make_vm: MakeVm) -> None:
    program = Program().start_hart(0, "here").label("here").put("sub", rd="a0", rs1="zero", rs2="a0")
    program.put("addi", rd="a0", rs1="a0", imm=ord("0")).ecall_with_registers(DBCN, 2).reset()

    assert ended(make_vm(program)) == str(-SbiError.ALREADY_AVAILABLE)


@pytest.mark.parametrize("clock", ["real", "deterministic"])
def test_a_suspended_hart_wakes_for_its_timer(make_vm: MakeVm, clock: str) -> None:
    program = Program().load_immediate("t0", STIE).put("csrrs", rd="zero", csr="sie", rs1="t0")
    program.put("csrrs", rd="a0", csr="time", rs1="zero").load_immediate("t0", 100_000)
    program.put("add", rd="a0", rs1="a0", rs2="t0").put("add", rd="s0", rs1="a0", rs2="zero")
    program.ecall_with_registers(TIME, 0).ecall(HSM, 3, 0)
    program.put("csrrs", rd="s1", csr="time", rs1="zero").put("sltu", rd="a0", rs1="s1", rs2="s0")
    program.put("addi", rd="a0", rs1="a0", imm=ord("0")).ecall_with_registers(DBCN, 2).reset()

    assert ended(make_vm(program, clock=clock)) == "0"


def test_a_non_retentive_suspend_resumes_at_its_address(make_vm: MakeVm) -> None:
    program = Program().load_immediate("t0", SSIE).put("csrrs", rd="zero", csr="sie", rs1="t0")
    program.put("csrrs", rd="zero", csr="sip", rs1="t0")
    program.load_immediate("a0", 0x8000_0000).load_address("a1", "resume").load_immediate("a2", ord("R"))
    program.ecall_with_registers(HSM, 3).print("not reached").reset()
    program.label("resume").put("addi", rd="a0", rs1="a1", imm=0).ecall_with_registers(DBCN, 2).reset()

    assert ended(make_vm(program)) == "R"


def test_an_ipi_wakes_another_hart(make_vm: MakeVm) -> None:
    program = Program().start_hart(1, "secondary").label("up").ecall(HSM, 2, 1)
    # 4 is SUSPENDED: only then is the interrupt needed.
    program.put("addi", rd="a1", rs1="a1", imm=-4).put("bne", rs1="a1", rs2="zero", imm="up")
    program.ecall(IPI, 0, 0b10, 0).forever()
    program.label("secondary").load_immediate("t0", SSIE).put("csrrs", rd="zero", csr="sie", rs1="t0")
    program.ecall(HSM, 3, 0).print("woken").reset()

    assert ended(make_vm(program, vcpus=2)) == "woken"


def test_remote_fences_return_while_the_other_harts_run_sleep_or_are_stopped(make_vm: MakeVm) -> None:
    program = Program().start_hart(1, "spins").start_hart(2, "sleeps")
    program.load_immediate("s0", 50).label("again")
    program.ecall(RFENCE, 0, 0, ALL).ecall(RFENCE, 1, 0, ALL, 0, 0).ecall(RFENCE, 1, 0b111, 0, 0x1000, 0x2000)
    program.put("addi", rd="s0", rs1="s0", imm=-1).put("bne", rs1="s0", rs2="zero", imm="again").print("done").reset()
    program.label("spins").put("jal", rd="zero", imm="spins")
    program.label("sleeps").put("wfi").put("jal", rd="zero", imm="sleeps")

    assert ended(make_vm(program, vcpus=4)) == "done"


def test_the_deterministic_clock_makes_equal_runs(make_vm: MakeVm) -> None:
    program = Program().load_immediate("t0", STIE).put("csrrs", rd="zero", csr="sie", rs1="t0")
    for _ in range(5):
        program.put("csrrs", rd="a0", csr="time", rs1="zero").load_immediate("t0", 10_000_000)
        program.put("add", rd="a0", rs1="a0", rs2="t0").ecall_with_registers(TIME, 0).put("wfi").print(".")
    program.reset()

    counts = set()
    for _ in range(3):
        vm = make_vm(program, clock="deterministic")
        assert ended(vm) == "....."
        counts.add(vm.metrics().instructions)

    assert len(counts) == 1


def test_an_enabled_trace_counts_exits_by_device_and_call(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("ab").print_uart("cde").reset(), trace=True)

    ended(vm)

    counts = {(each.kind, each.name): each.count for each in vm.trace.exits}
    assert counts["sbi call", "dbcn.console_write_byte"] == 2
    assert counts["mmio write", "uart"] == 3
    assert counts["sbi call", "srst.system_reset"] == 1
    assert [each.name for each in vm.trace.milestones][:2] == [FIRST_INSTRUCTION, FIRST_CONSOLE_BYTE]
    assert 0 < vm.trace.milestones[1].instructions <= vm.metrics().instructions


def test_a_trace_that_is_not_enabled_counts_no_exits_but_metrics_do(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("ab").print_uart("cde").reset())

    ended(vm)

    assert vm.trace.exits == ()
    assert vm.metrics().vcpus[0].exits == {"mmio write": 3, "sbi call": 3}


def test_metrics_outlive_the_vm(make_vm: MakeVm) -> None:
    vm = make_vm(Program().reset())
    ended(vm)
    vm.close()

    metrics = vm.metrics()

    assert metrics.instructions > 0
    assert metrics.uptime_seconds > 0
    assert metrics.vcpus[0].state == "exited"
    assert vm.end is not None


def test_the_machine_can_be_looked_at_until_the_vm_is_closed(make_vm: MakeVm) -> None:
    program = Program().load_immediate("t0", 0x8070_0000).load_immediate("t1", 0x1122)
    vm = make_vm(program.put("sd", rs1="t0", rs2="t1", imm=0).reset())
    ended(vm)

    assert vm.machine.memory.read_int(0x8070_0000, 8) == 0x1122
    assert vm.machine.engine.harts[0].x[6] == 0x1122
    vm.close()
    with pytest.raises(StateError, match="closed has no machine"):
        _ = vm.machine


@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_vm_leaves_no_thread_file_or_mapping(make_vm: MakeVm, vcpus: int) -> None:
    def left() -> tuple[set[str], int, int]:
        maps = Path("/proc/self/maps").read_text()
        guest_ram = len(re.findall(r"^[0-9a-f]+-[0-9a-f]+ rw-p 00000000 00:00 0 *$", maps, re.MULTILINE))
        return {thread.name for thread in threading.enumerate()}, len(os.listdir("/proc/self/fd")), guest_ram

    with make_vm(Program().forever(), vcpus=vcpus) as warm:
        warm.start()
    before = left()

    for _ in range(5):
        with make_vm(Program().print("up").forever(), vcpus=vcpus) as vm:
            vm.start()
            vm.console.expect("up", timeout=30)

    threads, files, mappings = left()
    assert threads == before[0]
    assert files == before[1]
    assert mappings <= before[2] + 2


def test_a_start_that_fails_can_be_tried_again_with_another_kernel(make_vm: MakeVm, tmp_path: Path) -> None:
    vm = make_vm(Program().print("second").reset())
    good = vm.config.kernel
    assert good is not None
    vm.request(ConfigureBootSource(tmp_path / "missing")).result(10)
    with pytest.raises(BootError, match="missing cannot be read"):
        vm.start()
    vm.request(ConfigureBootSource(good)).result(10)

    assert ended(vm) == "second"


def test_a_host_without_threads_for_all_harts_is_told_and_leaves_none(
    make_vm: MakeVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make_vm(Program().print("later").reset(), vcpus=3)
    start, before = threading.Thread.start, threading.active_count()

    def exhausted(thread: threading.Thread) -> None:
        if thread.name == "vcpu-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", exhausted)
        with pytest.raises(EngineError, match="no thread for each of 3 vCPUs: can't start new thread"):
            vm.start()

    assert vm.state is VmState.CONFIGURED
    assert threading.active_count() == before + 1  # the VM's loop
    assert ended(vm) == "later"


def test_close_from_the_vms_own_thread_is_refused_but_requests_are_not(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("x").forever())
    refused: list[str] = []

    def on_output(data: bytes) -> None:
        try:
            vm.pause()
        except StateError as error:
            refused.append(str(error))
            vm.request(PauseMicroVm())

    vm.console.subscribe(on_output)
    vm.start()

    assert wait_until(lambda: vm.state is VmState.PAUSED)
    assert "vcpu-0; use request() there" in refused[0]


def test_ctrl_c_while_waiting_leaves_no_thread(make_vm: MakeVm) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    before = threading.active_count()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    with make_vm(Program().forever(), vcpus=2) as vm:
        vm.start()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.wait(60)
    timer.join()

    assert threading.active_count() == before


def test_ctrl_c_while_the_vms_own_thread_starts_leaves_no_thread(
    make_vm: MakeVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, before = threading.Thread.start, threading.active_count()
    vm = make_vm(Program().forever())

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vm.start()
    vm.close()

    assert threading.active_count() == before


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_the_trace_keeps_the_last_exits_with_the_instructions_that_stopped(make_vm: MakeVm) -> None:
    vm = make_vm(Program().print("debug ").print_uart("serial").reset(), trace=True)

    assert ended(vm) == "debug serial"

    last = vm.trace.recent[-1]
    assert (last.kind, last.instruction) == ("sbi call", "ecall")
    stores = [each for each in vm.trace.recent if each.kind == "mmio write"]
    assert len(stores) == len("serial")
    assert all(each.instruction.startswith("sb ") and each.name == "uart" for each in stores)
    assert [each.seconds for each in vm.trace.recent] == sorted(each.seconds for each in vm.trace.recent)
