"""The probe on a real guest: it hears the driver, stops it at a request, and lets it go for whoever wants the VM."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kata_lab.lab.device_exercise import capture_request, check_reading
from kata_lab.lab.machines import LabError
from kata_lab.lab.queue_view import QueueView
from kata_lab.lab.slot_probe import SlotProbe
from kata_lab.lab.virtqueue_view import Frame
from kata_lab.shell import GuestShell, ShellError, boot_image
from vmm.actions import VmState
from vmm.config import BlockConfig
from vmm.devices.virtio.blk import HEADER, SECTOR
from vmm.microvm import MicroVm

READ = "dd if=/dev/vda of=/tmp/block bs=4096 skip=3 count=1 iflag=direct 2> /dev/null && head -c 9 /tmp/block"
Guest = tuple[MicroVm, GuestShell]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "disk"
    path.write_bytes(b"".join(f"sector {number} ".encode().ljust(SECTOR, b".") for number in range(8192)))
    return path


@pytest.fixture(scope="module")
def guest(disk: Path) -> Iterator[Guest]:
    with boot_image("toolbox", devices=[BlockConfig(name="disk", path=disk)], memory_mib=256) as booted:
        yield booted


def test_a_request_is_seen_before_and_after_the_device_served_it(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe, probe.stop(lambda: shell.run(READ, check=True)) as request:
        header, data = request.walk.readable[0], request.walk.writable[0]
        memory = vm.machine.memory
        assert HEADER.unpack(header.data)[2] * SECTOR == 3 * 4096
        assert not memory.read(data.address, 9).startswith(b"sector")

        after = request.serve()

        assert memory.read(data.address, 9) == b"sector 24"
        assert (after.view["used_index"] - request.before.view["used_index"]) % 65536 == 1
        assert (request.before.interrupt_status, after.interrupt_status) == (0, 1)
        assert after.waiting == ()
        assert request.still
        assert request.serve() is after
        assert request.go_on().output == "sector 24"
        assert request.go_on().output == "sector 24"
        assert not request.still
    assert [(access.write, access.offset) for access in probe.accesses] == [(True, 0x50), (False, 0x60), (True, 0x64)]


def test_a_request_that_is_let_go_was_served(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe:
        request = probe.stop(lambda: shell.run(READ, check=True))
        assert request.go_on().output == "sector 24"
        with pytest.raises(LabError, match="has gone on already"):
            request.serve()


def test_only_the_request_that_was_meant_is_stopped(guest: Guest) -> None:
    vm, shell = guest

    def at_sector_24(frame: Frame) -> bool:
        return HEADER.unpack(frame.waiting[0].readable[0].data)[2] == 24

    with SlotProbe(vm, "disk") as probe:
        other = READ.replace("skip=3", "skip=5")
        with probe.stop(lambda: shell.run(f"{other}; {READ}", check=True), when=at_sector_24) as request:
            assert HEADER.unpack(request.walk.readable[0].data)[2] == 24
            assert request.go_on().output == "sector 40sector 24"


def test_work_without_a_request_is_told(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe:
        with pytest.raises(LabError, match="without any such request to 'disk'"):
            probe.stop(lambda: shell.run("true"))
        with pytest.raises(ShellError, match="ended with status 1"):
            probe.stop(lambda: shell.run("false", check=True))


def test_a_condition_that_raises_stops_nothing(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe, pytest.raises(LabError, match="`when` raised ZeroDivisionError"):
        probe.stop(lambda: shell.run(READ, check=True), when=lambda frame: bool(1 // 0))
    assert vm.state is VmState.RUNNING


def test_a_pause_lets_the_guest_go(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe, probe.stop(lambda: shell.run(READ, check=True)) as request:
        vm.pause()
        vm.resume()

        assert not request.still
        assert request.go_on().output == "sector 24"


def test_a_second_stop_lets_the_first_go(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe:
        first = probe.stop(lambda: shell.run(READ, check=True))
        second = probe.stop(lambda: shell.run(READ, check=True))

        assert first.go_on().output == "sector 24"
        assert second.still
        assert second.go_on().output == "sector 24"


def test_a_probe_that_is_taken_out_leaves_the_slot_as_it_was(guest: Guest) -> None:
    vm, _ = guest
    before = vm.machine.board.bus.attachments
    with SlotProbe(vm, "disk") as probe:
        assert vm.machine.board.bus.attachments[0].name == before[0].name
        with SlotProbe(vm, "disk"):
            probe.close()  # the second has taken its place
    probe.close()

    assert vm.machine.board.bus.attachments == before


def test_a_device_that_is_not_there_is_refused_with_those_that_are(guest: Guest) -> None:
    with pytest.raises(LabError, match="no device 'disc'; it has disk"):
        SlotProbe(guest[0], "disc")


def test_a_live_view_follows_the_queue(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, shell = guest
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    with SlotProbe(vm, "disk") as probe, QueueView(probe) as view:
        shell.run("dd if=/dev/vda of=/dev/null bs=4096 count=50 iflag=direct", check=True)
        deadline = time.monotonic() + 10
        while "50 buffers used, 50 notifications, 50 interrupts" not in view._screen.value:
            assert time.monotonic() < deadline
            time.sleep(0.01)

        assert (view.buffers, view.notifications, view.interrupts) == (50, 50, 50)
        assert "application/vnd.jupyter.widget-view+json" in view._repr_mimebundle_()
        view.close()
        shell.run(READ, check=True)
        assert (view.notifications, view.interrupts) == (50, 50)
        view.close()


def test_without_widgets_a_live_view_is_the_picture_of_now(guest: Guest) -> None:
    vm, shell = guest
    with SlotProbe(vm, "disk") as probe, QueueView(probe) as view:
        shell.run(READ, check=True)
        bundle = view._repr_mimebundle_()

    assert "1 buffers used, 1 notifications, 1 interrupts." in bundle["text/plain"]
    assert "<svg" in bundle["text/html"]
    assert not any("widget" in kind for kind in bundle)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_captured_request_is_the_one_that_the_device_saw(guest: Guest, seed: int) -> None:
    vm, shell = guest
    device = vm.machine.device("disk")
    with SlotProbe(vm, "disk") as probe:
        queue = device.queues[0]
        queue.tracing = True
        captured = capture_request(probe, shell, seed)
        queue.tracing = False
        kind, sectors, _, _, first = queue.recent[-1].detail.split()

    feedback = check_reading(captured, kind, int(first), SECTOR * int(sectors), captured.pieces[2][0])

    assert feedback.passed, feedback


def test_the_end_of_the_vm_lets_the_guest_go(tmp_path: Path) -> None:
    own = tmp_path / "disk"
    own.write_bytes(bytes(1 << 20))
    with boot_image("toolbox", devices=[BlockConfig(name="disk", path=own)], memory_mib=256) as (vm, shell):
        probe = SlotProbe(vm, "disk")
        request = probe.stop(lambda: shell.run(READ, check=True))

        vm.shutdown(30)

        assert not request.still
        with pytest.raises(ShellError):
            request.go_on()
    probe.close()
    assert not any(thread.name == "lab-request" for thread in threading.enumerate())
