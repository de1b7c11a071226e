"""A configuration that goes to the agent and becomes a config.json there is the same again."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from kata_lab.oci.agent_message import agent_process, agent_resources, agent_spec
from kata_lab.protocol import proto, wire
from tests.kata_lab.agent.modules import guest_module

MESSAGES = proto.load("agent.proto").messages

FULL: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 0, "gid": 7, "additionalGids": [0, 8]},
        "args": ["/bin/sh", ""],
        "env": ["A=", "B=c d"],
        "cwd": "/tmp",
        "capabilities": {
            "bounding": ["CAP_KILL"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_CHOWN"],
            "permitted": ["CAP_KILL"],
            "ambient": ["CAP_CHOWN"],
        },
        "rlimits": [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
        "noNewPrivileges": True,
        "oomScoreAdj": -500,
    },
    "root": {"path": "/run/x", "readonly": True},
    "hostname": "h",
    "mounts": [{"destination": "/proc", "source": "proc", "type": "proc", "options": ["nosuid"]}],
    "annotations": {"Some.Key": "Value"},
    "linux": {
        "sysctl": {"kernel.msgmax": "5"},
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 0, "minor": 5, "access": "r"},
                {"allow": True, "type": "c", "major": 136, "access": "rwm"},
                {"allow": True, "type": "b", "access": "m"},
            ],
            "memory": {"limit": 1 << 33, "reservation": 5 << 20, "swap": -1},
            "cpu": {"shares": 2, "quota": -1, "period": 100000, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 5},
            "blockIO": {
                "weight": 100,
                "weightDevice": [{"major": 254, "minor": 0, "weight": 10}],
                "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1 << 40}],
                "throttleWriteBpsDevice": [{"major": 254, "minor": 0, "rate": 2}],
                "throttleReadIOPSDevice": [{"major": 254, "minor": 16, "rate": 3}],
                "throttleWriteIOPSDevice": [{"major": 254, "minor": 0, "rate": 0}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1 << 21}],
        },
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 0, "minor": 0, "fileMode": 0o640, "uid": 0, "gid": 5}],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_RISCV64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 0,
                    "args": [{"index": 0, "value": 0, "valueTwo": 5, "op": "SCMP_CMP_MASKED_EQ"}],
                }
            ],
        },
        "rootfsPropagation": "slave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
    },
}


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    """The guest's module."""
    return guest_module("bundle")


@pytest.fixture(scope="module")
def reader(bundle: ModuleType) -> Any:
    """Who reads requests in the guest."""
    return guest_module("requests").Reader(MESSAGES, bundle.DESCRIBED, bundle.key_of)


def _through(reader: Any, name: str, message: dict[str, Any]) -> Any:
    """As it comes out at the other side of the wire."""
    return reader.read(name, memoryview(wire.encode(MESSAGES, name, message)))


def test_a_full_configuration_comes_out_as_it_went_in(bundle: ModuleType, reader: Any) -> None:
    found = bundle.to_configuration(_through(reader, "grpc.Spec", agent_spec(FULL)), "name")
    assert found["linux"].pop("cgroupsPath") == "/kata/name"
    assert found == FULL


def test_a_small_configuration_gets_what_it_cannot_be_without(bundle: ModuleType, reader: Any) -> None:
    small: dict[str, Any] = {"process": {"args": ["x"], "cwd": "/"}}
    found = bundle.to_configuration(
        _through(reader, "grpc.Spec", {"Process": {"Args": ["x"]}, "Root": {"Path": "/r"}}), "n"
    )
    assert found["process"] == {**small["process"], "user": {"uid": 0, "gid": 0}}
    assert found["mounts"] == []
    assert [each["type"] for each in found["linux"]["namespaces"]] == ["pid", "mount", "ipc", "uts"]


def test_a_container_shares_the_pid_namespace_it_is_given(bundle: ModuleType, reader: Any) -> None:
    found = bundle.to_configuration(_through(reader, "grpc.Spec", agent_spec(FULL)), "n", "/proc/9/ns/pid")
    assert found["linux"]["namespaces"][-2:] == [
        {"type": "uts"},
        {"type": "pid", "path": "/proc/9/ns/pid"},
    ]


def test_network_namespaces_without_a_path_and_hooks_are_left_out(bundle: ModuleType, reader: Any) -> None:
    spec = agent_spec(FULL)
    spec["Linux"]["Namespaces"] = [{"Type": "network"}, {"Type": "network", "Path": "/x"}, {"Type": "ipc"}]
    spec["Hooks"] = {"Prestart": [{"Path": "/bin/evil"}]}
    found = bundle.to_configuration(_through(reader, "grpc.Spec", spec), "n")
    assert found["linux"]["namespaces"] == [{"type": "network", "path": "/x"}, {"type": "ipc"}]
    assert "hooks" not in found


def test_a_process_and_resources_alone_come_out_as_they_went_in(bundle: ModuleType, reader: Any) -> None:
    process = bundle.to_process(_through(reader, "grpc.Process", agent_process(FULL["process"])))
    assert process == FULL["process"]
    resources = FULL["linux"]["resources"]
    assert bundle.to_resources(_through(reader, "grpc.LinuxResources", agent_resources(resources))) == resources


def test_every_field_of_the_message_is_carried_or_left_out_knowingly(bundle: ModuleType, reader: Any) -> None:
    left_out = {*bundle._DROPPED, "UIDMappings", "GIDMappings", "CgroupsPath", "LeafWeight"}
    carried = set()

    def walk(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else ():
            carried.add(key.lower())
            walk(inner)
        for inner in value if isinstance(value, list) else ():
            walk(inner)

    walk(FULL)
    pending, seen = ["grpc.Spec"], set()
    while pending:
        name = pending.pop()
        for field, kind, _ in MESSAGES[name].values():
            if field in left_out or field == "Version":
                continue
            assert field.lower() in carried, f"{name}.{field} is not in the test's configuration"
            if kind in MESSAGES and kind not in seen:
                seen.add(kind)
                pending.append(kind)
