"""Hotplug through ACPI and PCI in a real QEMU guest, and what becomes of it when something fails; no time is judged."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from kata_lab.bench.acpi import AcpiError, AcpiGuest, Hotplug
from kata_lab.image.library import Image

T = TypeVar("T")


@dataclass(frozen=True)
class Booted:
    """A guest, and the event loop in which it lives."""

    guest: AcpiGuest
    run: Callable[[Awaitable[T]], T]


def booted() -> Iterator[Booted]:
    with asyncio.Runner() as runner:

        async def boot() -> AcpiGuest:
            return await AcpiGuest().__aenter__()

        async def end() -> None:
            await guest.__aexit__(None, None, None)

        async def awaited(what: Awaitable[T]) -> T:
            return await what

        guest = runner.run(boot())
        try:
            yield Booted(guest, lambda what: runner.run(awaited(what)))
        finally:
            runner.run(end())


@pytest.fixture(scope="module")
def machine() -> Iterator[Booted]:
    yield from booted()


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """Another guest, with two more vCPUs and a shared directory; it does not survive the tests."""
    for each in booted():
        each.run(each.guest.add_share(tmp_path_factory.mktemp("shared")))
        each.run(each.guest.add_vcpus(2))
        yield each


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


def names(hotplug: Hotplug) -> list[str]:
    times = [step.seconds for step in hotplug.steps]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == hotplug.seconds == float(hotplug)
    return [step.name for step in hotplug.steps]


def test_vcpus_come_online_and_the_steps_are_told(machine: Booted) -> None:
    before = machine.guest.vcpus

    added = machine.run(machine.guest.add_vcpus(2))

    steps = names(added)
    assert steps[0] == "request sent"
    assert steps[-1] == f"cpu 0-{before + 1} is in use"
    assert {f"QEMU answered for {name}" for name in added.devices} <= set(steps)
    assert {f"the kernel found cpu cpu{number}" for number in (before, before + 1)} <= set(steps)
    assert machine.guest.vcpus == before + 2


def test_a_disk_is_read_by_the_guest_and_goes_again(machine: Booted, disk: Path) -> None:
    added = machine.run(machine.guest.add_disk(disk))
    (name,) = added.devices
    assert names(added)[-1] == f"disk {name} is in use"
    assert machine.guest.disks == (name,)

    removed = machine.run(machine.guest.remove_disk(name))

    assert names(removed)[-1] == f"QEMU removed {name}"
    assert not machine.guest.disks


def test_memory_grows_and_shrinks_by_blocks(machine: Booted) -> None:
    block = machine.guest.block_mib

    grown = machine.run(machine.guest.resize_memory(2 * block))
    shrunk = machine.run(machine.guest.resize_memory(-2 * block))

    assert len([step for step in names(grown) if step.startswith("memory ")]) == 2
    assert names(shrunk)[-1] == f"QEMU removed {grown.devices[0]}"


def test_a_shared_directory_is_mounted_by_the_guest_and_its_server_ends(machine: Booted, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()

    added = machine.run(machine.guest.add_share(tmp_path / "shared"))
    assert names(added)[-1] == f"share {added.devices[0]} is in use"
    assert machine.guest.shares == added.devices
    machine.run(machine.guest.remove_share())

    assert not machine.guest.shares
    assert servers() == []


def test_memory_that_is_no_multiple_of_a_block_is_refused(machine: Booted) -> None:
    with pytest.raises(AcpiError, match=r"cannot grow by 64 MiB: its kernel takes multiples of 128 MiB"):
        machine.run(machine.guest.resize_memory(64))


def test_memory_that_was_not_added_is_not_taken(machine: Booted) -> None:
    with pytest.raises(AcpiError, match="128 MiB cannot be taken from the guest: no piece was added"):
        machine.run(machine.guest.resize_memory(-128))


def test_a_device_that_qemu_refuses_is_told_and_the_guest_goes_on(machine: Booted) -> None:
    with pytest.raises(AcpiError, match=r"QEMU refuses device_add: .*space"):
        machine.run(machine.guest.resize_memory(1024 * machine.guest.block_mib))

    machine.run(machine.guest.resize_memory(machine.guest.block_mib))
    machine.run(machine.guest.resize_memory(-machine.guest.block_mib))


def test_a_disk_without_a_file_is_refused_and_another_takes_its_port(
    machine: Booted, disk: Path, tmp_path: Path
) -> None:
    with pytest.raises(AcpiError, match=r"QEMU refuses blockdev-add: .*No such file"):
        machine.run(machine.guest.add_disk(tmp_path / "absent"))

    machine.run(machine.guest.add_disk(disk))
    machine.run(machine.guest.remove_disk())


def test_a_disk_that_is_not_there_cannot_be_removed(machine: Booted) -> None:
    with pytest.raises(AcpiError, match="there is no disk to remove for 'disk99': it has none"):
        machine.run(machine.guest.remove_disk("disk99"))


def test_a_share_that_is_no_directory_is_refused(machine: Booted, disk: Path) -> None:
    with pytest.raises(AcpiError, match="cannot be shared: it is not a directory"):
        machine.run(machine.guest.add_share(disk))


def test_more_vcpus_than_there_is_room_for_are_refused(machine: Booted) -> None:
    with pytest.raises(AcpiError, match=r"8 vCPUs cannot be added: the guest has \d of 8"):
        machine.run(machine.guest.add_vcpus(8))


def test_two_requests_at_once_are_carried_out_one_after_the_other(machine: Booted, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 20))

    async def both() -> None:
        await asyncio.gather(machine.guest.add_disk(disk), machine.guest.add_disk(other))
        assert len(machine.guest.disks) == 2
        await asyncio.gather(machine.guest.remove_disk(), machine.guest.remove_disk())

    machine.run(both())

    assert not machine.guest.disks


def test_a_request_outside_of_the_guests_life_is_refused() -> None:
    with pytest.raises(AcpiError, match="the guest does not run: ask within 'async with"):
        asyncio.run(AcpiGuest().add_vcpus(1))


def test_a_vcpu_goes_and_nothing_is_added_after_it(doomed: Booted, disk: Path) -> None:
    removed = doomed.run(doomed.guest.remove_vcpus(1))

    assert names(removed)[-1] == f"QEMU removed {removed.devices[0]}"
    assert doomed.guest.vcpus == 2
    with pytest.raises(AcpiError, match="a disk cannot be added once a vCPU was removed"):
        doomed.run(doomed.guest.add_disk(disk))


def test_qemu_killed_in_the_middle_of_a_request_is_told_in_one_sentence_and_leaves_nothing(doomed: Booted) -> None:
    async def killed() -> None:
        os.kill(doomed.guest.pid, signal.SIGSTOP)
        request = asyncio.create_task(doomed.guest.remove_vcpus(1))
        await asyncio.wait({request}, timeout=0.1)
        os.kill(doomed.guest.pid, signal.SIGKILL)
        await request

    directory = Path(os.readlink(f"/proc/{doomed.guest.pid}/cwd"))
    assert servers() != []
    with pytest.raises(AcpiError, match=r"^QEMU was killed by signal 9 before answering device_del[^.]*$"):
        doomed.run(killed())
    doomed.run(doomed.guest.__aexit__(None, None, None))

    assert not directory.exists()
    assert servers() == []


def test_a_guest_whose_kernel_is_missing_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    absent = Image("0" * 32, tmp_path / "image", {"format_of_root": "initramfs", "command_line": ""})

    async def boot() -> None:
        async with AcpiGuest(image=absent):
            pass

    with pytest.raises(AcpiError, match=r"QEMU ended with status 1 before .*kernel"):
        asyncio.run(boot())

    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_qemu_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    async def boot() -> None:
        async with AcpiGuest():
            pass

    with pytest.raises(AcpiError, match=r"no qemu-system-x86_64 .* install the package qemu-system-x86"):
        asyncio.run(boot())


def test_room_for_one_vcpu_is_refused() -> None:
    with pytest.raises(AcpiError, match="room for 1 vCPUs: it can for 2 to 64"):
        AcpiGuest(max_vcpus=1)


def servers() -> list[str]:
    """The servers of shared directories that this process has started."""
    return [each.name() for each in psutil.Process().children(recursive=True) if each.name() == "virtiofsd"]
