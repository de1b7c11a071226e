"""vCPUs that come and go: what the VM is afterwards, whatever the guest's device manager does."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.guest_program import Program
from tests.vmm.hotplug_guest import (
    Behaviour,
    FakeGuest,
    after_doing_it,
    answer,
    die,
    hang,
    lie,
    obey,
    refuse,
    running,
    twice,
    wrong_type,
)
from vmm import ConfigError, EndKind, MicroVm, ShutdownMicroVm, StateError, VmConfig, VmState
from vmm.actions import GetUpcallState, InsertMemDevice, ResizeMemory, ResizeVcpu, SetVmConfiguration
from vmm.hotplug import HotplugError
from vmm.sbi import BASE, DBCN, HSM, IPI, RFENCE, HartState
from vmm.upcall import FRAME_SIZE, Cpus, Frame, FrameType

ALL = (1 << 64) - 1


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    """1 vCPU of at most 4."""
    with running(tmp_path) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VMM that waits for a guest for half a second where it would wait for many."""
    for name in ("REPLY_SECONDS", "HART_SECONDS", "LAG_SECONDS"):
        monkeypatch.setattr(f"vmm.hotplug.{name}", 0.5)


def resize(guest: FakeGuest, vcpus: int) -> int:
    return guest.vm.request(ResizeVcpu(vcpus)).result(60).vcpus


def state(guest: FakeGuest) -> tuple[Any, ...]:
    """What a failed request must leave as it was."""
    vm = guest.vm
    threads = sorted(name for name in vm.thread_ids if name.startswith("vcpu"))
    return vm.state, vm.config, threads, len(vm.machine.vcpus), guest.online


def wait_until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(6000):
        if condition():
            return
        done.wait(0.01)
    pytest.fail("it did not come about")


def test_vcpus_come_with_a_thread_each_and_go_with_it(guest: FakeGuest) -> None:
    before = threading.active_count()

    assert resize(guest, 4) == 4

    assert {f"vcpu-{number}" for number in range(4)} <= guest.vm.thread_ids.keys()
    assert guest.online == [0, 1, 2, 3]
    assert guest.vm.config.vcpus == len(guest.vm.metrics().vcpus) == 4

    assert resize(guest, 2) == 2

    assert guest.online == [0, 1]
    assert guest.vm.config.vcpus == len(guest.vm.machine.vcpus) == len(guest.vm.report().harts) == 2
    # One vCPU more than at first, and the device manager's own thread.
    assert threading.active_count() == before + 2


def test_what_an_unplugged_vcpu_did_still_counts(guest: FakeGuest) -> None:
    resize(guest, 2)
    resize(guest, 1)
    first = guest.vm.metrics()
    resize(guest, 2)
    second = guest.vm.metrics()

    assert [each.state for each in first.vcpus] == ["running", "unplugged"]
    assert first.vcpus[1].instructions > 0
    assert second.vcpus[1].instructions >= first.vcpus[1].instructions
    assert second.vcpus[1].run_seconds >= first.vcpus[1].run_seconds


def test_a_hart_that_was_stopped_begins_clean(guest: FakeGuest) -> None:
    for _ in range(10):
        resize(guest, 3)
        resize(guest, 1)
    assert guest.vm.console.text == "C" * 20


def test_the_number_that_there_is_asks_nothing_of_the_guest(guest: FakeGuest) -> None:
    assert resize(guest, 1) == 1
    assert guest.requests == []


@pytest.mark.parametrize("vcpus", [0, 5, -1, True, "2"])
def test_a_number_that_cannot_be_is_refused(guest: FakeGuest, vcpus: Any) -> None:
    with pytest.raises(ConfigError, match=f"vcpus is {vcpus!r}, it must be from 1 to 4, the VM's max_vcpus"):
        resize(guest, vcpus)
    assert guest.requests == []


def test_what_the_guest_refuses_is_told_and_changes_nothing(guest: FakeGuest) -> None:
    before = state(guest)
    guest.behaviours.append(refuse(errno.EIO))

    with pytest.raises(HotplugError, match=r"the VM has 1 vCPUs and not 3: the guest refused ADD_CPU.*EIO"):
        resize(guest, 3)

    assert state(guest) == before
    assert resize(guest, 3) == 3


def test_a_guest_that_keeps_its_cpu_keeps_it(guest: FakeGuest) -> None:
    resize(guest, 3)
    before = state(guest)
    guest.behaviours.append(refuse(errno.EBUSY))

    with pytest.raises(HotplugError, match=r"the VM has 3 vCPUs and not 1: the guest refused DEL_CPU.*EBUSY"):
        resize(guest, 1)

    assert state(guest) == before
    assert resize(guest, 1) == 1


WRONG_MAGIC = b"\1" + Frame(FrameType.ADD_CPU, None, -1).encode()[1:]
WRONG_SIZE = Frame(FrameType.ADD_CPU, None, -1).encode()[:4] + b"\x09" + bytes(FRAME_SIZE - 5)
MISBEHAVIOURS = [
    pytest.param(die, id="killed"),
    pytest.param(hang, id="hung"),
    pytest.param(answer(WRONG_MAGIC), id="wrong magic"),
    pytest.param(answer(WRONG_SIZE), id="wrong size"),
    pytest.param(answer(b"\xff" * 5000), id="garbage"),
    pytest.param(wrong_type, id="wrong type"),
]


@pytest.mark.parametrize("behaviour", MISBEHAVIOURS)
@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize(("before", "wanted"), [(1, 3), (3, 1)])
def test_a_request_that_is_lost_leaves_the_vm_as_it_was(
    guest: FakeGuest, impatient: None, behaviour: Behaviour, done: bool, before: int, wanted: int
) -> None:
    resize(guest, before)
    seen = state(guest)
    guest.behaviours.append(after_doing_it(behaviour) if done else behaviour)
    guest.asked.clear()

    request = guest.vm.request(ResizeVcpu(wanted))
    assert guest.asked.wait(60)
    if behaviour is hang:
        threading.Timer(1.5, guest.released.set).start()
    with pytest.raises(HotplugError, match=f"the VM has {before} vCPUs and not {wanted}: (ADD|DEL)_CPU.* was sent"):
        request.result(60)

    assert state(guest) == seen
    assert resize(guest, wanted) == wanted
    assert len(guest.online) == wanted


def test_a_reply_that_comes_twice_spoils_nothing(guest: FakeGuest) -> None:
    guest.behaviours.append(twice)

    assert resize(guest, 2) == 2
    assert resize(guest, 4) == 4


def test_a_device_manager_that_stays_away_is_told_and_the_guest_gets_no_hart(
    guest: FakeGuest, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.hotplug.UNDO_SECONDS", 0.5)
    before = state(guest)
    guest.behaviours.append(hang)

    with pytest.raises(HotplugError, match="is undone when the guest answers again"):
        resize(guest, 2)

    assert state(guest) == before
    guest.released.set()
    assert resize(guest, 2) == 2


def test_a_guest_that_only_says_that_its_cpus_came_is_caught(guest: FakeGuest, impatient: None) -> None:
    before = state(guest)
    guest.behaviours.append(lie)

    with pytest.raises(HotplugError, match="the guest says that its CPUs are online, but hart 1, 2 does not run"):
        resize(guest, 3)

    assert state(guest) == before
    assert resize(guest, 3) == 3


def test_a_guest_that_only_says_that_its_cpus_went_is_caught(guest: FakeGuest, impatient: None) -> None:
    resize(guest, 3)
    before = state(guest)
    guest.behaviours.append(lie)

    with pytest.raises(HotplugError, match="says that its CPUs are offline, but hart 1, 2 runs"):
        resize(guest, 1)

    assert state(guest) == before
    assert resize(guest, 1) == 1


def test_one_cpu_of_two_that_goes_comes_back(guest: FakeGuest, impatient: None) -> None:
    def one_of_two(fake: FakeGuest, request: Frame) -> bytes | None:
        fake.carry_out(Frame(FrameType.DEL_CPU, Cpus(1)))
        return lie(fake, request)

    resize(guest, 3)
    before = state(guest)
    guest.behaviours.append(one_of_two)

    with pytest.raises(HotplugError, match="says that its CPUs are offline, but hart 1 runs"):
        resize(guest, 1)

    assert state(guest) == before


def test_a_host_without_threads_is_told_and_the_guest_is_not_asked(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(guest)
    start = threading.Thread.start

    def exhausted(thread: threading.Thread) -> None:
        if thread.name == "vcpu-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", exhausted)
        with pytest.raises(HotplugError, match="no thread for vCPU 2: can't start new thread"):
            resize(guest, 4)

    assert state(guest) == before
    assert guest.requests == []
    assert resize(guest, 4) == 4


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize(("before", "wanted"), [(1, 2), (2, 1)])
def test_a_pause_ends_the_request_and_the_vm_is_as_it_was_once_it_runs(
    guest: FakeGuest, before: int, wanted: int, done: bool
) -> None:
    resize(guest, before)
    guest.behaviours.append(after_doing_it(hang) if done else hang)
    guest.asked.clear()
    request = guest.vm.request(ResizeVcpu(wanted))
    assert guest.asked.wait(60)

    guest.vm.pause()

    message = f"the VM has {before} vCPUs and not {wanted}: .* not answered: the VM was paused; .* when the VM runs"
    with pytest.raises(HotplugError, match=message):
        request.result(60)
    assert guest.vm.state is VmState.PAUSED
    assert guest.vm.config.vcpus == before
    with pytest.raises(StateError, match="ResizeVcpu came to a VM that is paused; it needs one that is configured or"):
        resize(guest, 3)

    guest.released.set()
    guest.vm.resume()

    assert resize(guest, before) == before
    wait_until(lambda: len(guest.online) == len(guest.vm.machine.vcpus) == before)
    assert resize(guest, wanted) == wanted


def test_a_shutdown_ends_the_request_and_those_behind_it(guest: FakeGuest) -> None:
    guest.behaviours.append(hang)
    requests = [guest.vm.request(ResizeVcpu(vcpus)) for vcpus in (2, 3)]
    assert guest.asked.wait(60)

    end = guest.vm.request(ShutdownMicroVm()).result(60)

    assert end.detail == "the host shut the VM down"
    with pytest.raises(HotplugError, match="not answered: the VM has ended"):
        requests[0].result(60)
    with pytest.raises(StateError, match="ResizeVcpu came too late, since the VM has ended"):
        requests[1].result(60)
    assert not [name for name in guest.vm.thread_ids if name.startswith("vcpu")]


def test_a_guest_that_shuts_down_ends_the_request(tmp_path: Path) -> None:
    ends = Program().put("jal", rd="zero", imm="main").reset().label("main").forever()
    with running(tmp_path, ends) as guest:
        # Hart 1 shuts down as soon as it is started.
        guest.behaviours.append(after_doing_it(hang))
        request = guest.vm.request(ResizeVcpu(2))

        assert guest.vm.wait(60).kind is EndKind.SHUTDOWN
        with pytest.raises(HotplugError, match="the VM has ended"):
            request.result(60)
        assert not [name for name in guest.vm.thread_ids if name.startswith("vcpu")]


def test_a_cpu_that_came_all_the_same_and_is_not_given_back_is_counted(guest: FakeGuest, impatient: None) -> None:
    def one_of_two(fake: FakeGuest, request: Frame) -> bytes | None:
        fake.carry_out(Frame(FrameType.ADD_CPU, Cpus(1)))
        return None

    guest.behaviours.extend([one_of_two, refuse(errno.EBUSY)])

    with pytest.raises(HotplugError, match="the VM has 2 vCPUs and not 3: ADD_CPU count=2 was sent, but not answered"):
        resize(guest, 3)

    assert guest.vm.config.vcpus == len(guest.vm.machine.vcpus) == len(guest.online) == 2
    assert resize(guest, 1) == 1


def test_what_was_asked_for_and_cannot_be_undone_is_done(guest: FakeGuest, impatient: None) -> None:
    guest.behaviours.extend([after_doing_it(die), refuse(errno.EBUSY)])

    assert resize(guest, 2) == 2
    assert guest.vm.config.vcpus == len(guest.vm.machine.vcpus) == len(guest.online) == 2


def test_other_actions_do_not_wait_for_a_guest_that_hangs(guest: FakeGuest) -> None:
    guest.behaviours.append(hang)
    request = guest.vm.request(ResizeVcpu(2))
    assert guest.asked.wait(60)

    assert guest.vm.report().harts[0].state == "started"
    assert guest.vm.request(GetUpcallState()).result(60).state == "ServiceBusy"
    assert not request.done()
    guest.released.set()


def test_two_requests_at_once_are_carried_out_in_their_order(guest: FakeGuest) -> None:
    requests = [guest.vm.request(ResizeVcpu(vcpus)) for vcpus in (4, 2, 3)]

    assert [request.result(60).vcpus for request in requests] == [4, 2, 3]
    assert [(each.type.name, each.body) for each in guest.requests] == [
        ("ADD_CPU", Cpus(3)),
        ("DEL_CPU", Cpus(2)),
        ("ADD_CPU", Cpus(1)),
    ]


def test_who_gives_up_waiting_does_not_stop_the_request(guest: FakeGuest) -> None:
    first, second = (guest.vm.request(ResizeVcpu(vcpus)) for vcpus in (4, 3))
    first.cancel()

    assert second.result(60).vcpus == 3
    assert guest.online == [0, 1, 2]


def test_every_request_leaves_a_record(guest: FakeGuest) -> None:
    guest.behaviours.append(refuse(errno.EIO))
    with pytest.raises(HotplugError):
        resize(guest, 2)
    resize(guest, 2)

    failed, done = guest.vm.hotplugs

    assert (failed.action, done.action, done.error) == (ResizeVcpu(2), ResizeVcpu(2), "")
    assert "the guest refused ADD_CPU" in failed.error
    assert [step.name for step in done.steps] == ["threads started", "guest answered", "harts run"]
    times = [done.requested_at, *(step.seconds for step in done.steps), done.answered_at]
    assert times == sorted(times)
    assert guest.vm.upcall is not None
    assert len(guest.vm.upcall.frames) == 4 + 1  # with the greeting


def test_whatever_happens_the_vm_can_be_resized_afterwards(guest: FakeGuest, impatient: None) -> None:
    chance = random.Random(5)
    kinds: list[Behaviour] = [obey, obey, die, after_doing_it(die), twice, refuse(errno.EBUSY), lie]
    for _ in range(12):
        guest.behaviours.clear()
        guest.behaviours.extend(chance.choices(kinds, k=3))
        requests = [guest.vm.request(ResizeVcpu(chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
        if chance.random() < 0.5:
            guest.vm.pause()
            guest.vm.resume()
        else:
            guest.vm.report()
        for request in requests:
            assert isinstance(request.exception(60), HotplugError | StateError | None)
    guest.behaviours.clear()

    # What was to be undone may still be.
    wait_until(lambda: guest.vm.request(ResizeVcpu(4)).exception(60) is None)
    for vcpus in (1, 3):
        assert resize(guest, vcpus) == len(guest.vm.machine.vcpus) == len(guest.online) == vcpus


def test_before_the_start_a_resize_amends_the_configuration() -> None:
    with MicroVm(VmConfig(max_vcpus=4, memory_mib=64, max_memory_mib=128)) as vm:
        assert vm.request(ResizeVcpu(3)).result(10).vcpus == 3
        assert vm.request(ResizeMemory(100)).result(10).memory_mib == 100
        with pytest.raises(ConfigError, match="max_vcpus is 4, it must be from 5 to 32"):
            vm.request(ResizeVcpu(5)).result(10)
        with pytest.raises(HotplugError, match="a memory device of 64 MiB is refused"):
            vm.request(InsertMemDevice(64)).result(10)

        assert (vm.config.vcpus, vm.config.memory_mib) == (3, 100)


def test_a_vm_without_vsock_is_told_what_is_missing(tmp_path: Path) -> None:
    kernel = Program().forever().write(tmp_path / "Image")
    with MicroVm(VmConfig(kernel=kernel, memory_mib=8, max_vcpus=2)) as vm:
        vm.start()
        with pytest.raises(HotplugError, match="the guest is asked through a vsock device, and the VM needs one"):
            vm.request(ResizeVcpu(2)).result(30)
        with pytest.raises(HotplugError, match="a memory device of 64 MiB is refused, since no kernel"):
            vm.request(InsertMemDevice(64)).result(30)
        assert len(vm.thread_ids) == 2


def ended(tmp_path: Path, made: Program, **settings: Any) -> str:
    kernel = made.write(tmp_path / "Image")
    with MicroVm(VmConfig(kernel=kernel, memory_mib=8, **settings)) as vm:
        vm.start()
        vm.wait(60)
        return vm.console.text


def test_a_hart_that_is_not_plugged_in_cannot_be_started(tmp_path: Path) -> None:
    made = Program().start_hart(1, "other").put("addi", rd="a0", rs1="a0", imm=ord("0")).ecall_with_registers(DBCN, 2)
    made.start_hart(2, "other").put("sub", rd="a0", rs1="zero", rs2="a0")
    made.put("addi", rd="a0", rs1="a0", imm=ord("0")).ecall_with_registers(DBCN, 2)
    made.ecall(HSM, 2, 2).put("addi", rd="a0", rs1="a1", imm=ord("0")).ecall_with_registers(DBCN, 2).reset()
    made.label("other").forever()

    # SBI_SUCCESS, SBI_ERR_INVALID_PARAM, and the state of a hart that is stopped.
    assert ended(tmp_path, made, vcpus=2, max_vcpus=3) == f"03{HartState.STOPPED.value}"


def test_fences_and_interrupts_for_all_harts_do_not_wait_for_those_that_are_not_there(tmp_path: Path) -> None:
    made = Program().ecall(RFENCE, 0, 0, ALL).ecall(RFENCE, 1, 0, ALL, 0, 0).ecall(RFENCE, 0, 0b1110, 0)
    made.ecall(IPI, 0, 0b1110, 0).ecall(IPI, 0, 0, ALL).ecall(BASE, 0).print("done").reset()

    assert ended(tmp_path, made, vcpus=1, max_vcpus=4) == "done"


def test_the_maximum_can_be_set_by_an_action() -> None:
    with MicroVm() as vm:
        vm.request(SetVmConfiguration({"max_vcpus": 8, "max_memory_mib": 512, "hotplug_slots": 10})).result(10)

        assert (vm.config.harts, vm.config.memory_bytes, vm.config.spare_memory_mib) == (8, 512 << 20, 256)
        assert [each.name for each in vm.config.devices] == ["balloon0"]
