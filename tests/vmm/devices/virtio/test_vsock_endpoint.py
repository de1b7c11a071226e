"""The unix socket of a socket device: who may have its path, and clients that do not say what they want."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import stat
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.test_vsock import client
from tests.vmm.devices.virtio.vsock_guest import guest_of
from vmm.config import VsockConfig
from vmm.devices.virtio import build_device
from vmm.devices.virtio.vsock.endpoint import VsockError, dialled
from vmm.devices.virtio.vsock.packet import REQUEST
from vmm.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vsock"


def test_the_socket_is_private_and_goes_with_the_device(path: Path) -> None:
    device = build_device(VsockConfig(socket=path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)

    device.close()
    device.close()

    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    build_device(VsockConfig(socket=path)).close()

    assert not path.exists()


def test_the_socket_of_a_living_process_is_refused(path: Path) -> None:
    device = build_device(VsockConfig(socket=path))

    with pytest.raises(VsockError, match="belongs to a running process; name another path"):
        build_device(VsockConfig(socket=path))

    assert path.exists()
    device.close()


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")

    with pytest.raises(VsockError, match="is no socket and is left alone"):
        build_device(VsockConfig(socket=path))

    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(VsockError, match="No such file or directory"):
        build_device(VsockConfig(socket=path / "below"))


def test_a_socket_that_somebody_put_in_its_place_stays(path: Path) -> None:
    device = build_device(VsockConfig(socket=path))
    path.unlink()
    path.write_text("another's")

    device.close()

    assert path.read_text() == "another's"


def test_a_path_too_long_for_a_socket_address_is_refused() -> None:
    VsockConfig(socket=Path("/" + "x" * 95))
    with pytest.raises(ConfigError, match="is a path of 97 bytes, it may have 96"):
        VsockConfig(socket=Path("/" + "x" * 96))


def test_a_path_is_not_needed() -> None:
    device = build_device(VsockConfig())
    device.close()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"connect 1\n",
        b"CONNECT 1 2\n",
        b"x" * 32,
        b"CONNECT 00000000000000000000000000000001\n",
    ],
)
def test_a_client_that_says_something_else_is_closed(path: Path, line: bytes) -> None:
    with guest_of(VsockConfig(socket=path)) as guest, client(path, line) as host:
        with contextlib.suppress(ConnectionResetError):  # it has sent more than was read
            assert host.recv(64) == b""
        guest.expect_nothing()


def test_a_client_that_says_nothing_is_closed_after_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.GREETING_SECONDS", 0.05)
    with guest_of(VsockConfig(socket=path)), client(path, b"CONNECT 1") as host, pytest.raises(ConnectionResetError):
        host.recv(64)


def test_silent_clients_do_not_keep_others_out_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.GREETING_SECONDS", 0.2)
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.MAX_GREETINGS", 2)
    with guest_of(VsockConfig(socket=path)) as guest:
        silent = [client(path, b"") for _ in range(5)]
        with client(path, b"CONNECT 1024\n"):
            assert guest.expect(REQUEST).dst_port == 1024
        for each in silent:
            each.close()


def test_closing_the_device_closes_all_clients(path: Path) -> None:
    with guest_of(VsockConfig(socket=path)) as guest:
        asking = client(path, b"CONNECT 1024\n")
        guest.expect(REQUEST)
        silent = client(path, b"")

    with asking, silent:
        assert asking.recv(64) == b""
        assert silent.recv(64) == b""


@pytest.mark.parametrize("first", ["made", "cancelled"])
def test_a_connection_is_hung_up_if_nobody_waits_any_more_when_it_is_made(first: str) -> None:
    ours, theirs = socket.socketpair()

    async def give_up() -> None:
        future: concurrent.futures.Future[socket.socket] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        waiting = asyncio.create_task(dialled(future))
        await asyncio.sleep(0)
        steps = [lambda: future.set_result(ours), waiting.cancel]
        for step in steps if first == "made" else reversed(steps):
            step()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with theirs:
        asyncio.run(give_up())

        theirs.settimeout(10)
        assert theirs.recv(1) == b""
