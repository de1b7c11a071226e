"""What a VMM process makes of clients that are not what they should be: errors, and the VM goes on."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.guest_program import Program
from vmm import GetState, VmConfig, VmState
from vmm.rpc import wire
from vmm.rpc.client import RemoteVm
from vmm.rpc.endpoint import PrivateListener, connect, require_owner
from vmm.rpc.process import ServerProcess
from vmm.rpc.server import MAX_REQUESTS, MAX_STRANGERS
from vmm.rpc.wire import RpcError

SECONDS = 60
IS_ROOT = os.geteuid() == 0


class Client:
    """A client that sends what it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = connect(path, SECONDS)
        self.socket.settimeout(SECONDS)

    def send(self, data: bytes) -> None:
        self.socket.sendall(struct.pack(">I", len(data)) + data)

    def say(self, message: Any) -> None:
        self.send(json.dumps(message).encode())

    def hear(self) -> Any:
        """The next message as JSON; None at the end of the connection."""
        head = self._exactly(4)
        return None if head is None else json.loads(self._exactly(struct.unpack(">I", head)[0]) or b"")

    def answer(self) -> Any:
        """The next message that is no event."""
        while True:
            message = self.hear()
            if message is None or set(message) & {"Answer", "Failure", "Refused", "Welcome"}:
                return message

    def _exactly(self, length: int) -> bytes | None:
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                return None
            data += part
        return data

    def hello(self) -> None:
        self.say({"Hello": {"protocol": wire.PROTOCOL, "version": wire.version()}})
        assert "Welcome" in self.hear()

    def ask(self, number: int, action: Any) -> None:
        self.say({"Request": {"number": number, "action": action}})


@contextmanager
def connected(path: Path) -> Iterator[Client]:
    client = Client(path)
    try:
        yield client
    finally:
        client.socket.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    os.chmod(tmp_path, 0o700)
    return tmp_path / "vmm.sock"


@pytest.fixture
def process(path: Path) -> Iterator[ServerProcess]:
    with ServerProcess("vmm.rpc", [str(path)], "the VMM process") as made:
        yield made


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return Program().print("hello\n").forever().write(tmp_path / "Image")


@pytest.fixture
def owner(process: ServerProcess, path: Path, kernel: Path) -> Iterator[Client]:
    """The owner of a VM that runs."""
    with connected(path) as client:
        client.hello()
        config = {"VmConfig": {"kernel": {"path": str(kernel)}, "memory_mib": 16}}
        client.ask(1, {"CreateMicroVm": {"config": config}})
        assert client.answer() == {"Answer": {"number": 1, "value": {"Empty": {}}}}
        client.ask(2, {"StartMicroVm": {}})
        assert client.answer() == {"Answer": {"number": 2, "value": {"Empty": {}}}}
        yield client
        # Whatever was done to it, the VM runs.
        client.ask(99, {"GetState": {}})
        state = {"MachineState": {"state": {"VmState": "RUNNING"}, "end": None}}
        assert client.answer() == {"Answer": {"number": 99, "value": state}}
        assert not process.ended.done()


def test_the_socket_is_its_owners_alone(process: ServerProcess, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    os.chmod(tmp_path, mode)

    with pytest.raises(RpcError, match=f"has mode {mode:o} .* chmod 700"):
        PrivateListener(tmp_path / "vmm.sock")


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")

    with pytest.raises(RpcError, match="is no socket and is left alone"):
        PrivateListener(path)

    assert path.read_text() == "precious"


def test_a_socket_in_use_is_not_taken_over(process: ServerProcess, path: Path) -> None:
    with pytest.raises(RpcError, match="belongs to a running process"):
        ServerProcess("vmm.rpc", [str(path)], "the second VMM process")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)

    with pytest.raises(RpcError, match="it may have 107"):
        PrivateListener(tmp_path / ("s" * 120))


OTHER_USER = """
import os, socket, sys
connection = socket.socket(socket.AF_UNIX)
descriptor = os.open(os.path.dirname(sys.argv[1]), os.O_PATH)
stranger = int(sys.argv[3]) != os.geteuid()
if stranger:
    os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
try:
    connection.connect(f"/proc/self/fd/{descriptor}/{os.path.basename(sys.argv[1])}")
except PermissionError:
    print("refused by the file")
    sys.exit()
if not stranger:
    connection.sendall(bytes.fromhex(sys.argv[2]))
print(connection.recv(4096)[4:].decode())
"""


def test_a_peer_of_another_user_is_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    one, other = socket.socketpair()
    with one, other:
        assert require_owner(one).pid == os.getpid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        with pytest.raises(RpcError, match=f"belongs to user {uid}, the socket is for user {uid + 1} only"):
            require_owner(one)


@pytest.mark.parametrize("user", [65534 if IS_ROOT else os.geteuid()])
def test_another_user_is_refused_by_the_file_and_even_without_it_by_the_process(
    owner: Client, path: Path, user: int
) -> None:
    """Only root can act as another user, who is refused before saying a word; for anybody else the attempt is one of
    their own, a second owner."""
    hello = json.dumps({"Hello": {"protocol": wire.PROTOCOL, "version": wire.version()}}).encode()
    frame = (struct.pack(">I", len(hello)) + hello).hex()

    def attempt() -> str:
        command = [sys.executable, "-S", "-c", OTHER_USER, str(path), frame, str(user)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout

    assert attempt() == "refused by the file\n" or not IS_ROOT
    os.chmod(path, 0o666)
    os.chmod(path.parent, 0o755)
    wanted = "belongs to user 65534, the socket is for user 0 only" if IS_ROOT else "the VM has an owner already"
    assert wanted in attempt()


@pytest.mark.parametrize(
    ("protocol", "version"), [(wire.PROTOCOL + 1, wire.version()), (wire.PROTOCOL, "99.0"), (None, None), ("x", [])]
)
def test_another_version_is_refused_by_name(process: ServerProcess, path: Path, protocol: Any, version: Any) -> None:
    with connected(path) as client:
        client.say({"Hello": {"protocol": protocol, "version": version, "what comes later": 1}})

        sentence = client.hear()["Refused"]["sentence"]
        assert client.hear() is None

    assert f"the VMM process is kata-lab {wire.version()} with protocol {wire.PROTOCOL}" in sentence
    assert f"the client is kata-lab {version} with protocol {protocol}" in sentence
    assert not process.ended.done()


def test_a_client_refuses_a_server_of_another_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "version", lambda: "99.0")

    with pytest.raises(RpcError, match=r"the client is kata-lab 99\.0 .* both must come from one installation"):
        RemoteVm(VmConfig(), path)

    assert not path.exists()


@pytest.mark.parametrize("words", [b"{}", b"GET / HTTP/1.1", b'{"Request": {}}', b"\xff\xfe", b'{"Hello": []}', b""])
def test_who_does_not_say_hello_is_dismissed_and_owns_nothing(process: ServerProcess, path: Path, words: bytes) -> None:
    with connected(path) as client:
        client.send(words)

        assert "Refused" in client.hear()
        assert client.hear() is None
    with connected(path) as client:
        client.hello()


def test_half_a_hello_is_not_waited_for(process: ServerProcess, path: Path) -> None:
    with connected(path) as silent, connected(path) as half:
        half.socket.sendall(b"\0\0\0\x40half")
        with connected(path) as client:
            client.hello()
        assert not process.ended.done()
        del silent


def test_many_silent_clients_are_not_all_kept(process: ServerProcess, path: Path) -> None:
    clients = [Client(path) for _ in range(MAX_STRANGERS + 4)]
    try:
        # The first ones are waited for; those beyond are dismissed at once.
        assert all(each.hear() is None for each in clients[MAX_STRANGERS:])
        for each in clients[1:]:
            each.socket.close()
        clients[0].hello()
    finally:
        for each in clients:
            each.socket.close()


def test_a_second_owner_is_refused(owner: Client, path: Path) -> None:
    with connected(path) as client:
        client.say({"Hello": {"protocol": wire.PROTOCOL, "version": wire.version()}})

        assert client.hear() == {
            "Refused": {"sentence": "the VM has an owner already; start a VMM process of your own"}
        }
        assert client.hear() is None


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is no JSON"),
        (b"\0" * 100, "is no JSON"),
        (b'{"Request": {"number": 7, "action": {"FormatDisk": {}}}}', "not part of the action vocabulary"),
        (b'{"Request": {"number": 7, "action": {"ShutdownMicroVm": {"now": 1}}}}', "ShutdownMicroVm has no field"),
        (b'{"Request": {"number": 7, "action": {"Empty": {}}}}', "action of Request is Empty()"),
        (b'{"Request": {"number": 7, "action": null}}', "action of Request is None"),
        (b'{"Request": {"number": 7, "action": {"VmmAction": {}}}}', "is no action"),
        (b'{"Request": {"number": "7", "action": {"GetState": {}}}}', "number of Request is '7'"),
        (b'{"Request": {"number": 7}}', "cannot be made"),
        (b'{"Answer": {"number": 7, "value": 1}}', "a client sends requests, not Answer"),
        (b'{"Hello": {"protocol": 1, "version": ""}}', "a client sends requests, not Hello"),
        (b'{"GetState": {}}', "came where a Message must be"),
        (b"[" * 3_000_000, "is no JSON"),
    ],
)
def test_a_malformed_request_gets_an_error_and_the_next_one_an_answer(
    owner: Client, data: bytes, sentence: str
) -> None:
    owner.send(data)

    failure = owner.answer()["Failure"]
    assert sentence in failure["sentence"]
    assert failure["number"] == (7 if b'"number": 7, "action"' in data or b'"number": 7}' in data[:26] else None)


def test_an_oversized_request_is_passed_over(owner: Client) -> None:
    length = wire.MAX_FRAME + 1
    owner.socket.sendall(struct.pack(">I", length))
    for _ in range(length // 4096):
        owner.socket.sendall(b"x" * 4096)
    owner.socket.sendall(b"x" * (length % 4096))

    assert f"a message of {length} bytes came" in owner.answer()["Failure"]["sentence"]


def test_a_request_sent_byte_by_byte_is_answered(owner: Client) -> None:
    data = b'{"Request": {"number": 5, "action": {"GetVmConfiguration": {}}}}'
    for byte in struct.pack(">I", len(data)) + data:
        owner.socket.sendall(bytes([byte]))

    assert owner.answer()["Answer"]["number"] == 5


def test_requests_beyond_the_limit_are_told_that_they_are_too_many(owner: Client) -> None:
    # A request that the VM is busy with holds up those behind it.
    owner.ask(100, {"GetReport": {}})
    for number in range(101, 100 + 4 * MAX_REQUESTS):
        owner.ask(number, {"GetReport": {}})

    answers = [owner.answer() for _ in range(4 * MAX_REQUESTS)]

    assert all("Answer" in each or "BusyError" in each["Failure"]["kind"] for each in answers)
    assert "Answer" in answers[0] or any("Answer" in each for each in answers)


def test_a_client_that_does_not_read_is_not_waited_for(owner: Client) -> None:
    data = b'{"Request": {"number": 1, "action": {"GetVmConfiguration": {}}}}'
    frame = struct.pack(">I", len(data)) + data
    owner.socket.setblocking(False)
    sent = 0
    try:
        while True:
            sent += owner.socket.send(frame * 100)
    except BlockingIOError:
        pass
    owner.socket.settimeout(SECONDS)
    # The rest of the message that was sent in part.
    answers = sent // len(frame)
    left = -sent % len(frame)
    for _ in range(answers):
        assert owner.answer() is not None
    if left:
        owner.socket.sendall(frame[-left:])
        assert owner.answer() is not None


def test_noise_of_many_kinds_does_not_stop_the_vm(owner: Client, path: Path) -> None:
    generator = random.Random(7)
    good = b'{"Request": {"number": 3, "action": {"GetState": {}}}}'
    for _ in range(200):
        data = bytearray(good)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        owner.send(bytes(data))
        assert owner.answer() is not None
    for _ in range(20):
        with connected(path) as stranger:
            stranger.socket.sendall(generator.randbytes(generator.randrange(1, 300)))


def test_the_owner_that_hangs_up_within_a_message_ends_the_vm(process: ServerProcess, path: Path) -> None:
    with connected(path) as client:
        client.hello()
        client.socket.sendall(b"\0\0\1\0half")

    assert process.ended.result(SECONDS) == f"the VMM process (process {process.pid}) ended with status 0"
    assert not path.exists()


def test_requests_before_there_is_a_vm_and_a_second_vm_are_refused(process: ServerProcess, path: Path) -> None:
    with connected(path) as client:
        client.hello()
        client.ask(1, {"GetState": {}})
        assert "CreateMicroVm goes first" in client.answer()["Failure"]["sentence"]
        for number, outcome in ((2, "Answer"), (3, "Failure")):
            client.ask(number, {"CreateMicroVm": {"config": {"VmConfig": {}}}})
            assert outcome in client.answer()


def test_a_server_that_is_no_vmm_process_is_not_believed(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as fake:
        fake.bind(str(path))
        fake.listen()
        with pytest.raises(RpcError, match="belongs to a running process"):
            RemoteVm(VmConfig(), path)


def test_the_state_of_a_vm_under_attack_is_told_to_its_client(path: Path, kernel: Path) -> None:
    with RemoteVm(VmConfig(kernel=kernel, memory_mib=16), path) as vm:
        vm.start()
        for _ in range(10):
            with connected(path) as stranger:
                stranger.socket.sendall(os.urandom(100))
        assert vm.request(GetState()).result(SECONDS).state is VmState.RUNNING
