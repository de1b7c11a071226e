"""The file system device whose requests another process serves: what it promises, and what it does without one."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import signal
import socket
import threading
from pathlib import Path

import psutil
import pytest

from tests.vmm.devices.virtio.driver import BASE, Driver
from tests.vmm.devices.virtio.fs.client import Client, refused
from tests.vmm.vhost.conftest import descriptors, using
from vmm.config import VhostFsConfig
from vmm.devices.virtio.device import Host
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.protocol import Opcode
from vmm.devices.virtio.queue import DeviceError
from vmm.errors import ConfigError
from vmm.memory import GuestMemory
from vmm.rpc.wire import RpcError
from vmm.vhost.control import control_path
from vmm.vhost.frontend import VhostFsDevice
from vmm.vhost.process import FsProcess

SECONDS = 60


def test_the_device_is_a_file_system_with_a_tag(driver: Driver) -> None:
    assert driver.get(0x8) == 26
    assert bytes(driver.config(n, 1) for n in range(36)) == b"share".ljust(36, b"\0")
    assert driver.config(36, 4) == 1


def test_files_are_read_and_written_in_both_directions(client: Client, share: Path) -> None:
    handle = client.open(client.walk("hello"))
    assert client.read(handle, 0, 100) == b"from the host\n"

    made, written = client.create(b"new")
    assert client.write(written, 0, b"from the guest\n") == 15
    client.release(written)

    assert (share / "new").read_bytes() == b"from the guest\n"
    assert sorted(client.names()) == [b".", b"..", b"hello", b"new"]
    assert made.node != 0


def test_a_large_transfer_arrives_whole(client: Client, share: Path) -> None:
    data = os.urandom(1 << 20)
    (share / "large").write_bytes(data)
    handle = client.open(client.walk("large"))

    client.driver._next = client._mark
    header = client.header(Opcode.READ, 0, fuse.ARGUMENTS + fuse.READ_IN.size)
    body = fuse.READ_IN.pack(handle, 0, 1 << 20, 0, 0, 0)
    buffer = client.driver.add(1, [header, body], [16, *[4096] * 256], indirect=True)
    client.driver.notify(1)

    assert client.receive(buffer) == data


def test_errors_of_the_host_are_errors_in_the_guest(client: Client) -> None:
    with refused(errno.ENOENT):
        client.lookup(b"missing")
    with refused(errno.ENOTDIR):
        client.opendir(client.walk("hello"))


def test_what_is_written_is_told_before_the_guest_can_see_that_the_buffer_is_filled(client: Client) -> None:
    """Else a guest that looks by itself could run what the engine decoded of the old content."""
    driver = client.driver
    used = driver.queues[1].used
    told: list[tuple[int, int, int]] = []

    def listener(address: int, length: int) -> None:
        told.append((address, length, driver.memory.read_int(used + 2, 2)))

    handle = client.open(client.walk("hello"))
    before = driver.memory.read_int(used + 2, 2)
    driver.memory.subscribe(listener)
    body = fuse.READ_IN.pack(handle, 0, 4096, 0, 0, 0)
    buffer = client.send(Opcode.READ, 0, body, room=4096)
    told.clear()  # what the driver itself wrote
    assert client.receive(buffer) == b"from the host\n"
    driver.memory.unsubscribe(listener)

    # All of each range, also what is behind the answer, and every time before the used index moved.
    ranges = {(address, length) for address, length, index in told if index == before}
    assert set(buffer.parts) <= ranges or (buffer.parts[0][0], sum(length for _, length in buffer.parts)) in ranges


def test_many_requests_at_once_are_all_answered(client: Client, share: Path) -> None:
    for number in range(100):
        (share / f"file{number}").write_text(str(number))
    buffers = [client.post(Opcode.LOOKUP, fuse.ROOT, b"file%d\0" % number) for number in range(100)]

    done = client.driver.wait(1, 100)

    assert {id(each) for each in done} == {id(each) for each in buffers}
    sizes = {client.entry(client.results(each)).attributes["size"] for each in done}
    assert sizes == {1, 2}


def test_a_reset_ends_the_session_and_the_next_one_begins(client: Client) -> None:
    client.open(client.walk("hello"))
    node = client.walk("hello")

    client.driver.start(size=256)
    again = Client(client.driver)

    with refused(errno.ESTALE):
        again.getattr(node)
    assert again.read(again.open(again.walk("hello")), 0, 4) == b"from"


def test_a_paused_device_goes_on_where_it_was(client: Client, share: Path) -> None:
    handle = client.open(client.walk("hello"))
    with client.driver.device.lock:
        client.driver.device.pause()
    buffer = client.send(Opcode.READ, 0, fuse.READ_IN.pack(handle, 0, 100, 0, 0, 0))
    assert client.driver.memory.read_int(client.driver.queues[1].used + 2, 2) == client.driver.queues[1].next_used

    with client.driver.device.lock:
        client.driver.device.resume()

    assert client.receive(buffer) == b"from the host\n"


def test_a_request_that_waits_ends_with_a_pause(client: Client, share: Path) -> None:
    handle = client.open(client.walk("hello"), os.O_RDWR)
    with (share / "hello").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        lock = fuse.LK_IN.pack(handle, 1, 0, 100, fcntl.F_WRLCK, 1, 0)
        buffer = client.post(Opcode.SETLKW, client.walk("hello"), lock)

        with client.driver.device.lock:
            client.driver.device.pause()
            client.driver.device.resume()

        with refused(errno.EINTR):
            client.receive(buffer)


def test_directories_come_and_go_while_it_runs(private: Path, share: Path) -> None:
    with FsProcess(private / "fs.sock") as process, using(process.device("share", name="fs")) as driver:
        client, device = Client(driver), driver.device
        assert isinstance(device, VhostFsDevice)

        device.add("work", share, read_only=True)
        assert client.read(client.open(client.walk("work/hello")), 0, 100) == b"from the host\n"
        with refused(errno.EROFS):
            client.mkdir(b"no", parent=client.walk("work"))
        with pytest.raises(ConfigError, match=r"cannot be shared as 'work': File exists"):
            device.add("work", share)
        with pytest.raises(ConfigError, match="cannot be shared as 'gone': No such file"):
            device.add("gone", share / "gone")
        with pytest.raises(ConfigError, match=r"'a/b' is no name|Invalid argument"):
            device.add("a/b", share)

        device.remove("work")
        with refused(errno.ENOENT):
            client.lookup(b"work")
        with pytest.raises(ConfigError, match="shares nothing as 'work'"):
            device.remove("work")


def test_a_back_end_with_a_directory_of_its_own_takes_no_others(driver: Driver, share: Path) -> None:
    assert isinstance(driver.device, VhostFsDevice)
    with pytest.raises(ConfigError, match="shares a directory of its own"):
        driver.device.add("more", share)


def test_a_killed_back_end_fails_what_waits_and_all_that_follows(process: FsProcess, client: Client) -> None:
    device = client.driver.device
    assert isinstance(device, VhostFsDevice)
    told = threading.Event()
    process.ended.add_done_callback(lambda _: told.set())
    os.kill(process.pid, signal.SIGSTOP)
    buffers = [client.post(Opcode.LOOKUP, fuse.ROOT, b"hello\0") for _ in range(3)]

    os.kill(process.pid, signal.SIGKILL)

    for each in client.driver.wait(1, 3, SECONDS):
        assert each in buffers
        with refused(errno.EIO):
            client.results(each)
    with refused(errno.EIO):
        client.lookup(b"hello")
    client.tell(Opcode.FORGET, fuse.ROOT, fuse.FORGET_IN.pack(1))
    assert told.wait(SECONDS)
    assert process.ended.result(0) == f"the file system process (process {process.pid}) was killed by SIGKILL"
    assert "has gone" in device.failure
    with pytest.raises(ConfigError, match=r"can share nothing any more: the back end at .* has gone"):
        device.remove("anything")


def test_a_device_without_its_back_end_can_be_reset_paused_and_started_again(
    process: FsProcess, client: Client
) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.ended.result(SECONDS)

    with client.driver.device.lock:
        client.driver.device.pause()
        client.driver.device.resume()
    client.driver.start(size=512)

    with refused(errno.EIO):
        Client(client.driver)


def test_a_back_end_ends_with_its_front_end(process: FsProcess, driver: Driver) -> None:
    driver.loop.run(driver.device.close)

    assert process.ended.result(SECONDS) == f"the file system process (process {process.pid}) ended with status 0"
    assert not process.socket.exists()
    assert not control_path(process.socket).exists()


def test_nothing_is_left_behind(private: Path, share: Path) -> None:
    before, threads = descriptors(), set(threading.enumerate())
    with FsProcess(private / "fs.sock", path=share) as process:
        with using(process.device("share")) as driver:
            Client(driver).walk("hello")
        pid = process.pid

    assert descriptors() == before
    assert set(threading.enumerate()) == threads
    assert not psutil.pid_exists(pid)
    assert list(private.iterdir()) == []


def test_a_killed_back_end_leaves_no_socket_behind(private: Path, share: Path) -> None:
    with FsProcess(private / "fs.sock", path=share) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.ended.result(SECONDS)

    assert list(private.iterdir()) == []


def test_memory_that_is_not_shared_is_refused(process: FsProcess) -> None:
    device, loop = VhostFsDevice(process.device("share")), asyncio.new_event_loop()
    try:
        with GuestMemory(BASE, 1 << 20) as memory, pytest.raises(ConfigError, match="cannot reach this VM's memory"):
            device.connect(Host(memory, loop, lambda: None, lambda: None, lambda _: None, lambda _: None))
    finally:
        device.close()
        loop.close()


def test_a_socket_without_a_back_end_is_refused(private: Path) -> None:
    with pytest.raises(ConfigError, match=r"vhost-fs cannot be made: nobody answers .* start a back end there first"):
        VhostFsDevice(VhostFsConfig(tag="share", socket=private / "fs.sock"))


def test_more_queues_than_the_back_end_serves_are_refused(process: FsProcess) -> None:
    with pytest.raises(ConfigError, match="serves 2 queues, 4 are configured"):
        VhostFsDevice(VhostFsConfig(tag="share", socket=process.socket, queues=3))


def test_a_second_front_end_is_not_served(process: FsProcess, driver: Driver) -> None:
    with pytest.raises(ConfigError, match="has gone, it did not answer GET_FEATURES"):
        VhostFsDevice(process.device("other"))
    assert Client(driver).walk("hello")


def test_a_state_cannot_be_saved(client: Client) -> None:
    with pytest.raises(DeviceError, match="cannot be saved"):
        client.driver.device.save()


def test_a_request_too_short_for_a_header_stops_the_device_until_a_reset(client: Client) -> None:
    client.driver.add(1, [b"short"], [16])
    client.driver.notify(1)

    assert client.driver.interrupted.wait(SECONDS)
    while not client.driver.needs_reset:
        client.driver.acknowledge()
        assert client.driver.interrupted.wait(SECONDS)
    client.driver.start(size=512)
    assert Client(client.driver).walk("hello")


def test_a_mistake_from_before_a_reset_does_not_stop_the_device_after_it(client: Client) -> None:
    """The back end tells of it through every ring; here the loop sees that only when the driver has done its reset."""
    device, go_on = client.driver.device, threading.Event()
    client.driver.loop.loop.call_soon_threadsafe(go_on.wait)
    try:
        client.driver.add(1, [b"short"], [16])
        client.driver.notify(1)
        for forwarded in device._forwarded:
            assert select.select([forwarded.error], [], [], SECONDS)[0]
        client.driver.start(size=512)
    finally:
        go_on.set()

    assert Client(client.driver).walk("hello")
    assert not client.driver.needs_reset


def test_a_chain_outside_of_memory_never_reaches_the_back_end(process: FsProcess, client: Client) -> None:
    client.driver.describe(1, 0, BASE - 4096, 100, 0)
    client.driver.offer(1, 0)
    client.driver.notify(1)

    assert client.driver.needs_reset
    assert not process.ended.done()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"path": Path("/does/not/exist")}, "cannot be shared: No such file"), ({"queues": 9}, "fs queues is 9")],
)
def test_a_process_that_cannot_start_tells_why(private: Path, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(RpcError, match="the file system process did not start: ") as caught:
        FsProcess(private / "fs.sock", **arguments)

    assert sentence in str(caught.value)
    assert list(private.iterdir()) == []


def test_a_control_channel_answers_what_it_cannot_read_with_an_error(process: FsProcess, driver: Driver) -> None:
    from tests.vmm.rpc.test_attacks import connected

    with connected(control_path(process.socket)) as client:
        client.hello()
        client.send(b"nonsense")
        assert "is no JSON" in client.answer()["Failure"]["sentence"]
        client.ask(1, {"GetState": {}})
        assert "knows ManipulateFsBackend only, not GetState" in client.answer()["Failure"]["sentence"]
        action = {"device": "fs", "operation": "move", "entry": "x"}
        client.ask(2, {"ManipulateFsBackend": action})
        assert "it must be 'add' or 'remove'" in client.answer()["Failure"]["sentence"]
    with connected(control_path(process.socket)) as client:
        client.say({"Hello": {"protocol": 99, "version": "0"}})
        assert "both must come from one installation" in client.hear()["Refused"]["sentence"]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(control_path(process.socket)))
        silent.send(b"\0\0")
    assert Client(driver).walk("hello")
