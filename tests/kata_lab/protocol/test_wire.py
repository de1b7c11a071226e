"""Messages on the wire, with Google's own implementation as the referee."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc
from hypothesis import given, settings
from hypothesis import strategies as st

from kata_lab.protocol.proto import PLACE, SCALARS, ProtoError, load
from kata_lab.protocol.wire import WireError, decode, encode

FILES = ("agent.proto", "health.proto", "task.proto", "ttrpc.proto")
INTERFACE = load(*FILES)
RANGES = {"int32": (-(1 << 31), (1 << 31) - 1), "int64": (-(1 << 63), (1 << 63) - 1)}
RANGES |= {"uint32": (0, (1 << 32) - 1), "uint64": (0, (1 << 64) - 1), "enum": (0, 1)}


@pytest.fixture(scope="module")
def referee(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Full name → message class, as protoc understands the same interface files."""
    out = tmp_path_factory.mktemp("protoc") / "set"
    arguments = ["protoc", f"-I{PLACE}", f"--descriptor_set_out={out}", "--include_imports", *FILES]
    assert protoc.main(arguments) == 0
    pool = descriptor_pool.DescriptorPool()
    for each in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.Add(each)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def scalars(kind: str) -> st.SearchStrategy[Any]:
    match kind:
        case "string":
            return st.text(max_size=20)
        case "bytes":
            return st.binary(max_size=20)
        case "bool":
            return st.booleans()
    return st.integers(*RANGES[kind])


def messages(name: str, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    fields = {}
    for field, kind, label in INTERFACE.messages[name].values():
        if kind in SCALARS or kind == "enum":
            one = scalars(kind)
        elif depth < 3:
            one = messages(kind, depth + 1)
        else:
            continue
        if label == "many":
            one = st.lists(one, max_size=3)
        elif label not in ("one", "optional"):
            one = st.dictionaries(scalars(label), one, max_size=3)
        fields[field] = one
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize(
    "name",
    ["grpc.CreateContainerRequest", "grpc.StatsContainerResponse", "containerd.task.v2.StateResponse", "ttrpc.Request"],
)
def test_bytes_are_those_of_the_referee_and_read_back(name: str, referee: Any) -> None:
    @settings(max_examples=60, deadline=None)
    @given(messages(name))
    def check(message: dict[str, Any]) -> None:
        ours = encode(INTERFACE.messages, name, message)
        theirs = referee(name).FromString(ours)
        decoded = decode(INTERFACE.messages, name, theirs.SerializeToString(deterministic=True))
        assert decoded == decode(INTERFACE.messages, name, ours)
        assert decode(INTERFACE.messages, name, encode(INTERFACE.messages, name, decoded)) == decoded

    check()


def test_referee_reads_the_values_that_were_written(referee: Any) -> None:
    message = {
        "container_id": "böx",
        "OCI": {
            "Process": {"Args": ["sh", ""], "User": {"UID": 5, "AdditionalGids": [0, 300]}, "OOMScoreAdj": -5},
            "Annotations": {"a": "b"},
            "Linux": {"Seccomp": {"Syscalls": [{"Names": ["x"], "errnoret": 0}]}},
        },
    }

    read = referee("grpc.CreateContainerRequest").FromString(
        encode(INTERFACE.messages, "grpc.CreateContainerRequest", message)
    )

    assert json_format.MessageToDict(read, preserving_proto_field_name=True) == {
        "container_id": "böx",
        "OCI": {
            "Process": {"Args": ["sh", ""], "User": {"UID": 5, "AdditionalGids": [0, 300]}, "OOMScoreAdj": "-5"},
            "Annotations": {"a": "b"},
            "Linux": {"Seccomp": {"Syscalls": [{"Names": ["x"], "errnoret": 0}]}},
        },
    }


def test_what_was_not_sent_has_its_default() -> None:
    decoded = decode(INTERFACE.messages, "grpc.ExecProcessRequest", b"")

    assert decoded == {"container_id": "", "exec_id": "", "string_user": None, "process": None}


def test_unknown_fields_are_skipped() -> None:
    data = bytes([0xA0, 1, 5, 0xA1, 1, *range(8), 0xA5, 1, *range(4), 0xA2, 1, 2, 1, 1, 8, 7])

    assert decode(INTERFACE.messages, "grpc.WaitProcessResponse", data) == {"status": 7}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"containr_id": "a"}, "has no field 'containr_id'; it has container_id"),
        ({"container_id": 5}, "container_id is 5, it must be text"),
        ({"exec_id": b"a"}, "exec_id is b'a', it must be text"),
        ({"signal": -1}, "signal is -1, it must be a whole number from 0 to 4294967295"),
        ({"signal": True}, "signal is True"),
    ],
)
def test_message_that_the_schema_does_not_describe_is_refused(message: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        encode(INTERFACE.messages, "grpc.SignalProcessRequest", message)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for name in ("grpc.CreateContainerRequest", "grpc.CgroupStats", "ttrpc.Response"):
        try:
            decoded = decode(INTERFACE.messages, name, data)
        except WireError:
            continue
        encode(INTERFACE.messages, name, decoded)


def test_deep_nesting_is_refused() -> None:
    schema = {"m": {1: ("m", "m", "one")}}
    data = b""
    for _ in range(40):
        data = bytes([10, len(data)]) + data

    with pytest.raises(WireError, match="nested deeper than 16"):
        decode(schema, "m", data)


def test_services_are_those_of_the_originals() -> None:
    agent, task = INTERFACE.services["grpc.AgentService"], INTERFACE.services["containerd.task.v2.Task"]

    assert len(agent) == 38
    assert agent["WaitProcess"].response == "grpc.WaitProcessResponse"
    assert agent["UpdateInterface"].response == "types.Interface"
    assert len(task) == 17
    assert set(INTERFACE.services["grpc.Health"]) == {"Check", "Version"}


def test_missing_interface_file_is_named() -> None:
    with pytest.raises(ProtoError, match=r"no interface file 'nothing\.proto'"):
        load("nothing.proto")
