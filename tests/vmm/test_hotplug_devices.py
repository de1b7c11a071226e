"""Devices and memory that come and go: what the VM is afterwards, whatever the guest's device manager does."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.hotplug_guest import (
    CONFIG_SPACE,
    Behaviour,
    FakeGuest,
    after_doing_it,
    answer,
    die,
    hang,
    lie,
    refuse,
    running,
)
from vmm import ConfigError, MicroVm, StateError, VmConfig, VmmError
from vmm.actions import (
    InsertBalloonDevice,
    InsertBlockDevice,
    InsertFsDevice,
    InsertNetworkDevice,
    InsertVsockDevice,
    ManipulateFsBackend,
    PrepareRemoveBlockDevice,
    RemoveBlockDevice,
    RemoveFsDevice,
    RemoveNetworkDevice,
    ResizeMemory,
    ResizeVcpu,
    UpdateBalloonDevice,
    UpdateBlockDevice,
    UpdateNetworkDevice,
    VmmAction,
)
from vmm.board.riscv_virt import virtio_address
from vmm.config import MIB, BalloonConfig, BlockConfig, FsConfig, NetworkConfig, VsockConfig
from vmm.devices.virtio.balloon import BalloonDevice
from vmm.devices.virtio.mmio import EmptySlot
from vmm.hotplug import HotplugError
from vmm.upcall import Frame, Mmio

PAGES = 256  #: in a MiB


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    """A VM with 8 slots, of which the vsock device has the first."""
    with running(tmp_path, hotplug_slots=3) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VMM that waits for a guest for half a second where it would wait for many."""
    for name in ("REPLY_SECONDS", "UNDO_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(f"vmm.hotplug.{name}", 0.5)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def ask(guest: FakeGuest, action: VmmAction[Any]) -> Any:
    return guest.vm.request(action).result(60)


def state(guest: FakeGuest) -> tuple[Any, ...]:
    """What a failed request must leave as it was."""
    vm = guest.vm
    filled = [number for number, slot in enumerate(vm.machine.board.slots) if not isinstance(slot, EmptySlot)]
    return vm.state, vm.config, list(vm.machine.devices), filled, open_files()


def open_files() -> list[str]:
    found = []
    for each in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{each}"))
        except FileNotFoundError:
            continue  # the directory itself
    return sorted(name for name in found if name.endswith(".img"))


def status(guest: FakeGuest, slot: int) -> int:
    return guest.vm.machine.board.bus.read(virtio_address(slot) + 0x70, 4)


def wait_until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(6000):
        if condition():
            return
        done.wait(0.01)
    pytest.fail("it did not come about")


def test_a_disk_comes_and_goes(guest: FakeGuest, disk: Path) -> None:
    before = state(guest)

    inserted = ask(guest, InsertBlockDevice(BlockConfig(path=disk)))

    assert (inserted.name, inserted.slot) == ("blk0", 1)
    assert status(guest, 1) == 15
    assert open_files() == [str(disk)]
    assert guest.vm.config.devices == (BlockConfig(path=disk, name="blk0"),)

    ask(guest, RemoveBlockDevice("blk0"))

    assert state(guest) == before


def test_a_slot_serves_many_devices(guest: FakeGuest, disk: Path) -> None:
    before = state(guest)
    for _ in range(50):
        assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 1
        ask(guest, RemoveBlockDevice("blk0"))
    assert state(guest) == before


def test_a_name_is_free_again_when_its_device_has_gone(guest: FakeGuest, tmp_path: Path) -> None:
    disks = [tmp_path / f"{number}.img" for number in range(3)]
    for each in disks:
        each.write_bytes(bytes(512))
    first, second = (ask(guest, InsertBlockDevice(BlockConfig(path=each))).name for each in disks[:2])
    ask(guest, RemoveBlockDevice(first))

    third = ask(guest, InsertBlockDevice(BlockConfig(path=disks[2]))).name

    assert (first, second, third) == ("blk0", "blk1", "blk0")


def test_a_device_whose_name_is_taken_is_refused(guest: FakeGuest, disk: Path) -> None:
    with pytest.raises(ConfigError, match="the VM has a device 'agent' already; give the new one a name of its own"):
        ask(guest, InsertBlockDevice(BlockConfig(path=disk, name="agent")))


def test_an_action_takes_only_its_own_kind_of_device(guest: FakeGuest, disk: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"InsertNetworkDevice was given BlockConfig.* it must be a NetworkConfig"):
        ask(guest, InsertNetworkDevice(BlockConfig(path=disk)))
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    with pytest.raises(ConfigError, match="RemoveFsDevice names 'blk0', which is no such device; the VM has agent, bl"):
        ask(guest, RemoveFsDevice("blk0"))
    with pytest.raises(ConfigError, match="RemoveBlockDevice names 'sda', which is no such device"):
        ask(guest, RemoveBlockDevice("sda"))


def test_a_vm_whose_slots_are_filled_says_so(guest: FakeGuest, tmp_path: Path) -> None:
    for number in range(7):
        path = tmp_path / f"{number}.img"
        path.write_bytes(bytes(512))
        ask(guest, InsertBlockDevice(BlockConfig(path=path)))
    path = tmp_path / "more.img"
    path.write_bytes(bytes(512))
    before = state(guest)

    with pytest.raises(ConfigError, match="blk7 needs a virtio-mmio slot, but all 8 of them are filled"):
        ask(guest, InsertBlockDevice(BlockConfig(path=path)))

    assert state(guest) == before


def test_a_disk_whose_file_is_not_there_leaves_nothing(guest: FakeGuest, tmp_path: Path) -> None:
    before = state(guest)

    with pytest.raises(VmmError, match=r"missing\.img"):
        ask(guest, InsertBlockDevice(BlockConfig(path=tmp_path / "missing.img")))

    assert state(guest) == before
    assert guest.requests == []


def test_what_the_guest_refuses_is_told_and_leaves_nothing(guest: FakeGuest, disk: Path) -> None:
    before = state(guest)
    guest.behaviours.append(refuse(errno.ENODEV))

    with pytest.raises(HotplugError, match=r"blk0 was not inserted: the guest refused ADD_MMIO base=0x10002000.*NODEV"):
        ask(guest, InsertBlockDevice(BlockConfig(path=disk)))

    assert state(guest) == before
    assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 1


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize(
    "behaviour", [pytest.param(die, id="killed"), pytest.param(answer(b"\xff" * 3000), id="garbage")]
)
def test_an_insertion_that_is_lost_leaves_nothing(
    guest: FakeGuest, impatient: None, disk: Path, behaviour: Behaviour, done: bool
) -> None:
    before = state(guest)
    guest.behaviours.append(after_doing_it(behaviour) if done else behaviour)

    with pytest.raises(HotplugError, match=r"blk0 was not inserted: ADD_MMIO.*was sent, but not answered rightly"):
        ask(guest, InsertBlockDevice(BlockConfig(path=disk)))

    assert state(guest) == before
    assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 1
    assert status(guest, 1) == 15


def test_a_guest_that_only_says_that_it_has_the_device_is_caught(guest: FakeGuest, disk: Path) -> None:
    before = state(guest)
    guest.behaviours.append(lie)

    with pytest.raises(HotplugError, match="blk0 was not inserted: the guest says that it has the device, but no driv"):
        ask(guest, InsertBlockDevice(BlockConfig(path=disk)))

    assert state(guest) == before


def test_a_slot_whose_driver_does_not_let_go_is_left_alone_until_it_does(
    guest: FakeGuest, impatient: None, disk: Path
) -> None:
    before = state(guest)
    # The driver has it, the manager dies, and refuses to give it up.
    guest.behaviours.extend([after_doing_it(die), refuse(errno.EBUSY)])
    with pytest.raises(HotplugError):
        ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    assert state(guest) == before

    guest.busy.add(virtio_address(1))
    assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 2
    ask(guest, RemoveBlockDevice("blk0"))

    guest.busy.clear()
    assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 1


def test_a_disk_in_use_stays(guest: FakeGuest, disk: Path) -> None:
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    guest.busy.add(virtio_address(1))
    before = state(guest)

    for action in (PrepareRemoveBlockDevice("blk0"), RemoveBlockDevice("blk0")):
        with pytest.raises(HotplugError, match=r"blk0 stays: the guest refused DEL_MMIO.*EBUSY"):
            ask(guest, action)
        assert state(guest) == before

    guest.busy.clear()
    ask(guest, PrepareRemoveBlockDevice("blk0"))
    assert (status(guest, 1), open_files()) == (0, [str(disk)])
    ask(guest, RemoveBlockDevice("blk0"))
    assert open_files() == []


def test_a_guest_that_only_says_that_it_let_go_is_caught(guest: FakeGuest, disk: Path) -> None:
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    before = state(guest)
    guest.behaviours.append(lie)

    with pytest.raises(HotplugError, match="blk0 stays: the guest says that it has given the device up, but its driv"):
        ask(guest, RemoveBlockDevice("blk0"))

    assert state(guest) == before


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_a_removal_that_is_lost_leaves_the_device_in_use(guest: FakeGuest, disk: Path, done: bool) -> None:
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    before = state(guest)
    guest.behaviours.append(after_doing_it(die) if done else die)

    with pytest.raises(HotplugError, match=r"blk0 stays: DEL_MMIO.* was sent, but not answered rightly"):
        ask(guest, RemoveBlockDevice("blk0"))

    assert state(guest) == before
    assert status(guest, 1) == 15
    ask(guest, RemoveBlockDevice("blk0"))


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_a_pause_ends_an_insertion_which_is_undone_when_the_vm_runs(guest: FakeGuest, disk: Path, done: bool) -> None:
    before = state(guest)
    guest.behaviours.append(after_doing_it(hang) if done else hang)
    request = guest.vm.request(InsertBlockDevice(BlockConfig(path=disk)))
    assert guest.asked.wait(60)

    guest.vm.pause()

    with pytest.raises(HotplugError, match=r"blk0 was not inserted: .*the VM was paused"):
        request.result(60)
    with pytest.raises(StateError, match="RemoveBlockDevice came to a VM that is paused"):
        ask(guest, RemoveBlockDevice("blk0"))
    guest.released.set()
    guest.vm.resume()
    wait_until(lambda: state(guest) == before)
    assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 1


def test_a_slot_stays_filled_while_its_driver_stands_still_in_the_middle(guest: FakeGuest, disk: Path) -> None:
    def half(fake: FakeGuest, request: Frame) -> bytes | None:
        assert isinstance(request.body, Mmio)
        fake.vm.machine.board.bus.write(request.body.base + 0x70, 4, 3)
        return hang(fake, request)

    before = state(guest)
    guest.behaviours.append(half)
    request = guest.vm.request(InsertBlockDevice(BlockConfig(path=disk)))
    assert guest.asked.wait(60)
    guest.vm.pause()
    with pytest.raises(HotplugError, match="was sent, but not answered: the VM was paused"):
        request.result(60)

    assert status(guest, 1) == 3
    guest.released.set()
    guest.vm.resume()

    wait_until(lambda: state(guest) == before)
    assert [each.type.name for each in guest.requests] == ["ADD_MMIO", "DEL_MMIO"]


def test_a_slot_that_the_guest_has_got_already_is_cleaned_before_it_is_used_again(guest: FakeGuest, disk: Path) -> None:
    guest.behaviours.extend([refuse(errno.EEXIST), refuse(errno.EBUSY)])
    with pytest.raises(HotplugError, match="EEXIST"):
        ask(guest, InsertBlockDevice(BlockConfig(path=disk)))

    assert ask(guest, InsertBlockDevice(BlockConfig(path=disk))).slot == 1
    assert [each.type.name for each in guest.requests] == ["ADD_MMIO", "DEL_MMIO", "DEL_MMIO", "ADD_MMIO"]


def test_a_device_that_the_guest_has_not_got_can_be_removed(guest: FakeGuest, disk: Path) -> None:
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    guest.vm.machine.board.bus.write(virtio_address(1) + 0x70, 4, 0)
    guest.behaviours.append(refuse(errno.ENODEV))

    ask(guest, RemoveBlockDevice("blk0"))

    assert guest.vm.config.devices == ()


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_a_pause_ends_a_removal_and_the_device_stays(guest: FakeGuest, disk: Path, done: bool) -> None:
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    before = state(guest)
    guest.asked.clear()
    guest.behaviours.append(after_doing_it(hang) if done else hang)
    request = guest.vm.request(RemoveBlockDevice("blk0"))
    assert guest.asked.wait(60)

    guest.vm.pause()
    with pytest.raises(HotplugError, match=r"blk0 stays: .*the VM was paused"):
        request.result(60)
    guest.released.set()
    guest.vm.resume()

    wait_until(lambda: status(guest, 1) == 15 and state(guest) == before)
    wait_until(lambda: _removed(guest, "blk0"))


def _removed(guest: FakeGuest, name: str) -> bool:
    """Removed at last; not while the guest still undoes what went before."""
    try:
        ask(guest, RemoveBlockDevice(name))
    except VmmError:
        return False
    return True


def test_a_shutdown_ends_an_insertion_and_closes_what_it_had(guest: FakeGuest, disk: Path) -> None:
    guest.behaviours.append(after_doing_it(hang))
    request = guest.vm.request(InsertBlockDevice(BlockConfig(path=disk)))
    assert guest.asked.wait(60)

    guest.vm.shutdown(60)

    with pytest.raises(HotplugError, match=r"blk0 was not inserted: .*the VM has ended"):
        request.result(60)
    guest.vm.close()
    assert open_files() == []


def test_a_disk_that_grew_is_looked_at_again(guest: FakeGuest, disk: Path) -> None:
    ask(guest, InsertBlockDevice(BlockConfig(path=disk)))
    with disk.open("r+b") as file:
        file.truncate(3 * MIB)

    assert ask(guest, UpdateBlockDevice("blk0")).size == 3 * MIB

    sectors = guest.vm.machine.board.bus.read(virtio_address(1) + CONFIG_SPACE, 4)
    assert sectors == 3 * MIB // 512
    with pytest.raises(ConfigError, match="UpdateBlockDevice names 'agent', which is no such device"):
        ask(guest, UpdateBlockDevice("agent"))


def test_a_share_comes_with_entries_that_come_and_go(guest: FakeGuest, tmp_path: Path) -> None:
    name = ask(guest, InsertFsDevice(FsConfig(tag="shared"))).name
    ask(guest, ManipulateFsBackend(name, "add", "here", tmp_path, read_only=True))

    with pytest.raises(ConfigError, match="cannot be shared as 'here'"):
        ask(guest, ManipulateFsBackend(name, "add", "here", tmp_path))
    ask(guest, ManipulateFsBackend(name, "remove", "here"))
    with pytest.raises(ConfigError, match="shares nothing as 'here'"):
        ask(guest, ManipulateFsBackend(name, "remove", "here"))
    with pytest.raises(ConfigError, match="the operation is 'mount', it must be 'add' or 'remove'"):
        ask(guest, ManipulateFsBackend(name, "mount", "here"))
    with pytest.raises(ConfigError, match="'here' cannot be added to fs0: give the path of what it is"):
        ask(guest, ManipulateFsBackend(name, "add", "here"))
    ask(guest, RemoveFsDevice(name))


def test_a_network_interface_comes_and_goes(guest: FakeGuest, tmp_path: Path) -> None:
    before = state(guest)
    name = ask(guest, InsertNetworkDevice(NetworkConfig(backend="socket", socket=tmp_path / "net"))).name
    assert (tmp_path / "net").exists()

    ask(guest, RemoveNetworkDevice(name))

    assert state(guest) == before


def test_a_cable_is_plugged_out_and_in(guest: FakeGuest, tmp_path: Path) -> None:
    name = ask(guest, InsertNetworkDevice(NetworkConfig(backend="socket", socket=tmp_path / "net"))).name
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(os.fspath(tmp_path / "net"))
        wait_until(lambda: link(guest) == 1)

        ask(guest, UpdateNetworkDevice(name, link_up=False))
        assert link(guest) == 0

        ask(guest, UpdateNetworkDevice(name, link_up=True))
        assert link(guest) == 1


def link(guest: FakeGuest) -> int:
    """The bit of the interface's status that says whether its link is up."""
    return guest.vm.machine.board.bus.read(virtio_address(1) + CONFIG_SPACE + 6, 2)


def test_sockets_do_not_come_to_a_vm_that_runs(guest: FakeGuest) -> None:
    with pytest.raises(HotplugError, match="vsock0 cannot come to a VM that runs: its guest hears of devices through"):
        ask(guest, InsertVsockDevice(VsockConfig()))


def test_before_the_start_devices_are_a_matter_of_configuration(tmp_path: Path) -> None:
    with MicroVm() as vm:
        for action in (
            InsertVsockDevice(VsockConfig()),
            InsertBlockDevice(BlockConfig(path=tmp_path / "a")),
            InsertBlockDevice(BlockConfig(path=tmp_path / "b")),
            InsertBalloonDevice(BalloonConfig()),
        ):
            answered = vm.request(action).result(10)
            assert answered.slot is None
        vm.request(RemoveBlockDevice("blk0")).result(10)

        assert [each.name for each in vm.config.devices] == ["vsock0", "blk1", "balloon0"]
        with pytest.raises(ConfigError, match="RemoveFsDevice names 'blk1', which is no such device"):
            vm.request(RemoveFsDevice("blk1")).result(10)
        with pytest.raises(StateError, match="PrepareRemoveBlockDevice came to a VM that is configured; it needs"):
            vm.request(PrepareRemoveBlockDevice("blk1")).result(10)


# Memory.


@pytest.fixture
def large(tmp_path: Path) -> Iterator[FakeGuest]:
    """8 MiB of at most 16; the balloon, whose driver is bound, is in slot 0."""
    with running(tmp_path, max_memory_mib=16) as made:
        made.bind(virtio_address(0))
        give_up(made, 8)
        yield made


def give_up(guest: FakeGuest, mib: int) -> None:
    guest.vm.machine.board.bus.write(virtio_address(0) + CONFIG_SPACE + 4, 4, mib * PAGES)


def target(guest: FakeGuest) -> int:
    return guest.vm.machine.board.bus.read(virtio_address(0) + CONFIG_SPACE, 4) // PAGES


def test_the_balloon_begins_with_what_the_vm_has_not_got(large: FakeGuest) -> None:
    assert large.vm.machine.memory.size == 16 * MIB
    assert target(large) == 8
    assert large.vm.config.devices == (BalloonConfig(name="balloon0", deflate_on_oom=False),)


def test_memory_is_there_when_the_guest_has_got_it(large: FakeGuest) -> None:
    request = large.vm.request(ResizeMemory(12))
    wait_until(lambda: target(large) == 4)
    for mib in (7, 6, 5):
        give_up(large, mib)
        assert not request.done()
    give_up(large, 4)

    assert request.result(60).memory_mib == 12
    assert large.vm.config.memory_mib == 12


def test_a_guest_that_gives_up_only_a_part_is_told_of_and_gets_it_back(large: FakeGuest, impatient: None) -> None:
    before = large.vm.config
    request = large.vm.request(ResizeMemory(4))
    wait_until(lambda: target(large) == 12)
    give_up(large, 9)

    with pytest.raises(HotplugError, match="back to 8 MiB of memory instead of 4: the guest gave up 1 of 4 MiB"):
        request.result(60)

    assert (target(large), large.vm.config) == (8, before)
    give_up(large, 8)
    request = large.vm.request(ResizeMemory(16))
    wait_until(lambda: target(large) == 0)
    give_up(large, 0)
    assert request.result(60).memory_mib == 16


def test_a_guest_without_the_driver_is_told_of(tmp_path: Path, impatient: None) -> None:
    with running(tmp_path, max_memory_mib=16) as guest:
        with pytest.raises(HotplugError, match="instead of 12: the guest has no driver for balloon0"):
            ask(guest, ResizeMemory(12))
        assert target(guest) == 8


@pytest.mark.parametrize("memory", [0, 17, "8", True])
def test_memory_that_cannot_be_is_refused(large: FakeGuest, memory: Any) -> None:
    with pytest.raises(ConfigError, match=f"memory_mib is {memory!r}, it must be from 1 to 16, the VM's"):
        ask(large, ResizeMemory(memory))


def test_a_vm_without_a_balloon_is_told_and_can_get_one(guest: FakeGuest) -> None:
    with pytest.raises(HotplugError, match="memory comes and goes by a balloon, and the VM has none; insert one first"):
        ask(guest, ResizeMemory(4))
    name = ask(guest, InsertBalloonDevice(BalloonConfig())).name
    balloon = guest.vm.machine.device(name)
    assert isinstance(balloon, BalloonDevice)

    request = guest.vm.request(ResizeMemory(6))
    wait_until(lambda: balloon.target_mib == 2)
    guest.vm.machine.board.bus.write(virtio_address(1) + CONFIG_SPACE + 4, 4, 2 * PAGES)

    assert request.result(60).memory_mib == 6


@pytest.mark.parametrize("what", ["pause", "shutdown"])
def test_a_pause_or_shutdown_ends_the_waiting_for_memory(large: FakeGuest, what: str) -> None:
    request = large.vm.request(ResizeMemory(12))
    wait_until(lambda: target(large) == 4)

    getattr(large.vm, what)()

    with pytest.raises(HotplugError, match=r"goes back to 8 MiB .* the VM (was paused|has ended) meanwhile"):
        request.result(60)
    assert large.vm.config.memory_mib == 8


def test_the_balloon_takes_more_than_what_the_vm_has_not_got(large: FakeGuest) -> None:
    ask(large, UpdateBalloonDevice("balloon0", 3))
    assert target(large) == 11

    ask(large, UpdateBalloonDevice("balloon0", 1))
    assert target(large) == 9

    with pytest.raises(ConfigError, match="must be a whole number from 0 to 16"):
        ask(large, UpdateBalloonDevice("balloon0", 60))


def test_cpus_and_devices_share_one_order(guest: FakeGuest, disk: Path) -> None:
    requests: list[Any] = [
        guest.vm.request(ResizeVcpu(2)),
        guest.vm.request(InsertBlockDevice(BlockConfig(path=disk))),
        guest.vm.request(ResizeVcpu(1)),
        guest.vm.request(RemoveBlockDevice("blk0")),
    ]
    for request in requests:
        request.result(60)

    assert [each.type.name for each in guest.requests] == ["ADD_CPU", "ADD_MMIO", "DEL_CPU", "DEL_MMIO"]


def test_a_configuration_with_a_hidden_maximum_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_memory_mib is 64, it must be from 256"):
        VmConfig(max_memory_mib=64)
