"""The guest's reader of requests, with wire.py as the referee."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kata_lab.protocol import proto, wire
from tests.kata_lab.agent.modules import guest_module
from tests.kata_lab.protocol.test_wire import messages

MESSAGES = proto.load("agent.proto", "health.proto", "ttrpc.proto").messages
KINDS = ("grpc.CreateContainerRequest", "grpc.StatsContainerResponse", "grpc.WriteStreamRequest", "ttrpc.Request")


@pytest.fixture(scope="module")
def requests() -> ModuleType:
    """The guest's module."""
    return guest_module("requests")


def _as_referee(reader: Any, kind: str, data: bytes) -> bool:
    """Whether both read the same, or both refuse; whether that was a message."""
    try:
        expected = wire.decode(MESSAGES, kind, data)
    except wire.WireError:
        with pytest.raises(wire.WireError):
            reader.read(kind, memoryview(data))
        return False
    assert reader.read(kind, memoryview(data)) == expected
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_read_as_the_referee_reads_them(requests: ModuleType, kind: str) -> None:
    reader = requests.Reader(MESSAGES)

    @settings(max_examples=60, deadline=None)
    @given(messages(kind))
    def check(message: dict[str, Any]) -> None:
        assert _as_referee(reader, kind, wire.encode(MESSAGES, kind, message))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_read_or_refused_as_by_the_referee(requests: ModuleType, kind: str) -> None:
    reader = requests.Reader(MESSAGES)

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=100))
    def check(data: bytes) -> None:
        _as_referee(reader, kind, data)

    check()


def test_a_message_that_is_cut_off_or_changed_is_read_as_by_the_referee(requests: ModuleType) -> None:
    kind = "grpc.CreateContainerRequest"
    reader = requests.Reader(MESSAGES)
    described = {"Process": {"Args": ["a", "ä"], "User": {"AdditionalGids": [1, 300]}}, "Annotations": {"a": "b"}}
    whole = wire.encode(MESSAGES, kind, {"container_id": "c", "OCI": described, "storages": [{"options": ["ro"]}]})
    for at in range(len(whole)):
        _as_referee(reader, kind, whole[:at])
        for value in (0, 7, 0x7F, 0x80, 0xFF):
            _as_referee(reader, kind, whole[:at] + bytes([value]) + whole[at + 1 :])


def test_deep_nesting_is_refused(requests: ModuleType) -> None:
    data = b""
    for _ in range(40):
        data = bytes([10, len(data)]) + data
    with pytest.raises(wire.WireError, match="nested deeper than 16"):
        requests.Reader({"m": {1: ("m", "m", "one")}}).read("m", memoryview(data))


def test_a_described_message_has_other_names_and_only_what_says_something(requests: ModuleType) -> None:
    names = {"UID": ("uid", True), "Path": ("path", False), "Hooks": (None, False)}
    reader = requests.Reader(MESSAGES, ["grpc.Spec"], lambda field: names.get(field, (field.lower(), False)))
    spec = {"Process": {"User": {"GID": 0}, "Cwd": ""}, "Root": {"Path": "/"}, "Hooks": {"Prestart": [{"Path": "x"}]}}
    request = {"container_id": "c", "OCI": spec}
    data = wire.encode(MESSAGES, "grpc.CreateContainerRequest", request)
    found = reader.read("grpc.CreateContainerRequest", memoryview(data))
    assert found["OCI"] == {"process": {"user": {"uid": 0}}, "root": {"path": "/"}}
    assert found["storages"] == []
    # A field that is sent twice is what it was sent as last.
    assert reader.read("grpc.Root", memoryview(bytes([10, 1, 47, 10, 0]))) == {}
