"""Configurations of containers: what is accepted, what is refused with which JSON path, and the agent's message."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kata_lab.oci import SpecError, agent_process, agent_resources, agent_spec, check_spec, load_spec
from kata_lab.protocol import proto, wire

SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 1000, "umask": 18, "additionalGids": [5, 6]},
        "args": ["sh", "-c", "true"],
        "env": ["PATH=/bin", "EMPTY="],
        "cwd": "/home",
        "capabilities": {
            name: ["CAP_KILL", "CAP_CHOWN"] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1 << 63}],
        "noNewPrivileges": True,
        "apparmorProfile": "engine-default",
        "oomScoreAdj": -5,
        "selinuxLabel": "a:b:c",
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "box-1",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["ro", "nosuid"]},
        {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rw"]},
    ],
    "hooks": {"prestart": [], "poststop": []},
    "annotations": {"io.example.note": "text"},
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "sysctl": {"net.core.somaxconn": "256", "kernel.shmmax": "65536"},
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": -1}],
            "memory": {"limit": 1 << 26, "swap": -1, "reservation": 0, "swappiness": 60, "disableOOMKiller": False},
            "cpu": {"shares": 1024, "quota": -1, "period": 100000, "cpus": "0-3,7", "mems": "0"},
            "pids": {"limit": 100},
            "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 9223372036854772000}],
            "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
            "unified": {},
        },
        "cgroupsPath": "/box/1",
        "namespaces": [
            {"type": "pid"},
            {"type": "network", "path": "/var/run/netns/x"},
            {"type": "ipc"},
            {"type": "uts"},
            {"type": "mount"},
            {"type": "user"},
        ],
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0}],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_RISCV64"],
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 0,
                    "args": [{"index": 0, "value": 1 << 32, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
                },
            ],
        },
        "rootfsPropagation": "rprivate",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "",
    },
}

Change = Callable[[dict[str, Any]], Any]


def _set(*path: str | int, to: Any) -> Change:
    def change(spec: dict[str, Any]) -> None:
        place: Any = spec
        for each in path[:-1]:
            place = place[each]
        place[path[-1]] = to

    return change


def _without(*path: str | int) -> Change:
    def change(spec: dict[str, Any]) -> None:
        place: Any = spec
        for each in path[:-1]:
            place = place[each]
        del place[path[-1]]

    return change


def test_configuration_that_uses_everything_is_accepted() -> None:
    check_spec(SPEC)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set("hoks", to=1), r"\$\.hoks is an unknown field"),
        (_set("process", "argz", to=[]), r"\$\.process\.argz is an unknown field: did you mean 'args'"),
        (_set("a\nb", to=1), r'\$\["a\\nb"\] is an unknown field'),
        (_set("ociVersion", to="2.0.0"), r"\$\.ociVersion is \"2\.0\.0\": it must be 1\.0, 1\.1"),
        (_without("ociVersion"), r"\$ has no field 'ociVersion'"),
        (_without("root"), r"\$ has no field 'root'"),
        (_without("process"), r"\$ has no field 'process'"),
        (_set("process", to=[]), r"\$\.process is a list of 0: it must be an object"),
        (_set("root", "path", to="../.."), r"\$\.root\.path is \"\.\./\.\.\": it must not contain '\.\.'"),
        (_set("root", "path", to=""), r"\$\.root\.path is \"\": it must not be empty"),
        (_set("root", "readonly", to=1), r"\$\.root\.readonly is 1: it must be true or false"),
        (_set("process", "cwd", to="tmp"), r"\$\.process\.cwd is \"tmp\": it must be an absolute path"),
        (_set("process", "cwd", to="/a/../../b"), r"\$\.process\.cwd .* must not contain '\.\.'"),
        (_set("process", "args", to=[]), r"\$\.process\.args is a list of 0: it must have 1 to"),
        (_set("process", "args", 0, to=7), r"\$\.process\.args\[0\] is 7: it must be a text"),
        (_set("process", "args", 0, to="a\0b"), r"\$\.process\.args\[0\] .* NUL"),
        (_set("process", "args", to=["x" * 100_000] * 30), r"together have 3000\d+ characters"),
        (_set("process", "env", 0, to="PATH"), r"\$\.process\.env\[0\] is \"PATH\": it must be NAME=value"),
        (_set("process", "env", 0, to="=x"), r"\$\.process\.env\[0\]"),
        (_set("process", "user", "uid", to=-1), r"\$\.process\.user\.uid is -1: it must be from 0 to 4294967294"),
        (_set("process", "user", "gid", to=1 << 32), r"\$\.process\.user\.gid is 4294967296"),
        (_set("process", "user", "gid", to=True), r"\$\.process\.user\.gid is true: it must be a whole number"),
        (_set("process", "user", "gid", to=1.0), r"\$\.process\.user\.gid is 1\.0: it must be a whole number"),
        (_set("process", "user", "umask", to=0), r"\$\.process\.user\.umask is 0: it must be from 18 to 18"),
        (_set("process", "user", "uid", to=10**4000), r"\$\.process\.user\.uid is a number of 13288 bits"),
        (
            _set("process", "capabilities", "bounding", 1, to="SYS_ADMIN"),
            r"\$\.process\.capabilities\.bounding\[1\] is \"SYS_ADMIN\".* did you mean 'CAP_SYS_ADMIN'",
        ),
        (
            _set("process", "rlimits", 0, "type", to="RLIMIT_NOFILES"),
            r"\$\.process\.rlimits\[0\]\.type .* did you mean 'RLIMIT_NOFILE'",
        ),
        (_set("process", "rlimits", 0, "hard", to=5), r"\$\.process\.rlimits\[0\]\.soft is 1024: .* hard limit, 5"),
        (_set("process", "rlimits", 0, "hard", to=1 << 64), r"\$\.process\.rlimits\[0\]\.hard is 18446744073709551616"),
        (_set("process", "oomScoreAdj", to=1001), r"\$\.process\.oomScoreAdj is 1001"),
        (_set("process", "scheduler", to={"policy": "SCHED_FIFO"}), r"\$\.process\.scheduler .* has no place"),
        (_set("hostname", to="a b"), r"\$\.hostname is \"a b\": it must be a host name"),
        (_set("mounts", 0, "destination", to="proc"), r"\$\.mounts\[0\]\.destination .* absolute"),
        (_set("mounts", 0, "destination", to="/../etc"), r"\$\.mounts\[0\]\.destination .* '\.\.'"),
        (_set("mounts", 1, "source", to="../../etc"), r"\$\.mounts\[1\]\.source .* '\.\.'"),
        (_without("mounts", 1, "source"), r"\$\.mounts\[1\] has no field 'source'"),
        (_set("mounts", 0, "options", to="ro"), r"\$\.mounts\[0\]\.options is \"ro\": it must be a list"),
        (_set("mounts", 0, "type", to="a/b"), r"\$\.mounts\[0\]\.type .* file system type"),
        (_set("hooks", "prestart", to=[{"path": "/bin/sh"}]), r"\$\.hooks .* not run on the host"),
        (_set("windows", to={"layerFolders": ["x"]}), r"\$\.windows .* only Linux"),
        (_set("linux", "personality", to={"domain": "LINUX32"}), r"\$\.linux\.personality .* leave it out"),
        (_set("linux", "namespaces", 0, "type", to="pidd"), r"\$\.linux\.namespaces\[0\]\.type .* did you mean 'pid'"),
        (_set("linux", "namespaces", 1, "type", to="pid"), r"\$\.linux\.namespaces\[1\]\.type .* given twice"),
        (_set("linux", "namespaces", 1, "path", to="netns"), r"\$\.linux\.namespaces\[1\]\.path .* absolute"),
        (
            _set("linux", "namespaces", to=[{"type": "uts"}]),
            r"\$\.linux\.uidMappings is given without a user namespace",
        ),
        (_set("linux", "sysctl", "kernel.panic", to="1"), r"\$\.linux\.sysctl .*\"kernel\.panic\".* namespace"),
        (_set("linux", "sysctl", "net/../x", to="1"), r"\"net/\.\./x\": it must be the name"),
        (_set("linux", "maskedPaths", 0, to="../x"), r"\$\.linux\.maskedPaths\[0\] .* absolute"),
        (_set("linux", "readonlyPaths", 0, to="/a/../b"), r"\$\.linux\.readonlyPaths\[0\] .* '\.\.'"),
        (_set("linux", "devices", 0, "path", to="/dev/../etc/x"), r"\$\.linux\.devices\[0\]\.path .* '\.\.'"),
        (_set("linux", "devices", 0, "path", to="/fuse"), r"\$\.linux\.devices\[0\]\.path .* beneath a directory"),
        (_set("linux", "devices", 0, "fileMode", to=0o10000), r"\$\.linux\.devices\[0\]\.fileMode is 4096"),
        (_without("linux", "devices", 0, "minor"), r"\$\.linux\.devices\[0\] has no field 'minor'"),
        (_set("linux", "cgroupsPath", to="../up"), r"\$\.linux\.cgroupsPath .* '\.\.'"),
        (_set("linux", "resources", "memory", "limit", to=1 << 63), r"\$\.linux\.resources\.memory\.limit"),
        (_set("linux", "resources", "cpu", "cpus", to="0-"), r"\$\.linux\.resources\.cpu\.cpus .* list such as"),
        (_set("linux", "resources", "unified", to={"memory.high": "1"}), r"\$\.linux\.resources\.unified .* no place"),
        (_set("linux", "resources", "devices", 0, "access", to="rx"), r"\$\.linux\.resources\.devices\[0\]\.access"),
        (_set("linux", "seccomp", "defaultAction", to="SCMP_ACT_DENY"), r"\$\.linux\.seccomp\.defaultAction"),
        (_set("linux", "seccomp", "listenerPath", to="/run/x"), r"\$\.linux\.seccomp\.listenerPath .* host"),
        (_set("linux", "rootfsPropagation", to="rprivat"), r"\$\.linux\.rootfsPropagation .* 'rprivate'"),
        (_set("annotations", "", to="x"), r"\$\.annotations \(a name in it\) is \"\""),
        (_set("annotations", "x", to=None), r"\$\.annotations\.x is null"),
        (_set("linux", "resources", "memory", to=None), r"\$\.linux\.resources\.memory is null: it must be an object"),
        (_set("process", "env", to=["A=b"] * 70_000), r"\$\.process\.env is a list of 70000"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_with_its_path(change: Change, complaint: str) -> None:
    spec = copy.deepcopy(SPEC)
    change(spec)

    with pytest.raises(SpecError, match=complaint) as caught:
        check_spec(spec)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_lacking_namespace_of_a_parameter_is_refused() -> None:
    spec = copy.deepcopy(SPEC)
    spec["linux"]["namespaces"] = [{"type": "user"}, {"type": "ipc"}, {"type": "uts"}]

    with pytest.raises(SpecError, match=r"'net\.core\.somaxconn' without a namespace 'network'"):
        check_spec(spec)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b'{"ociVersion": "1.0.0", "ociVersion": "1.0.0"}', "'ociVersion' is given twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
        (b" " * (5 << 20), "must have at most 4194304"),
        (b"[]", r"\$ is a list of 0"),
        (b"null", r"\$ is null"),
    ],
)
def test_file_that_is_no_configuration_is_refused(tmp_path: Path, text: bytes, complaint: str) -> None:
    (tmp_path / "config.json").write_bytes(text)

    with pytest.raises(SpecError, match=complaint):
        load_spec(tmp_path)


def test_bundle_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)


def test_bundle_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SPEC))

    assert load_spec(tmp_path) == SPEC


def _encoded(name: str, message: dict[str, Any]) -> dict[str, Any]:
    schema = proto.load("oci.proto").messages
    decoded: dict[str, Any] = wire.decode(schema, name, wire.encode(schema, name, message))
    return decoded


def test_message_of_the_agent_says_the_same() -> None:
    message = _encoded("grpc.Spec", agent_spec(SPEC))

    process, linux = message["Process"], message["Linux"]
    assert message["Version"] == "1.0.2-dev"
    assert process["User"] == {"UID": 1000, "GID": 1000, "AdditionalGids": [5, 6], "Username": ""}
    assert (process["Terminal"], process["ConsoleSize"]) == (True, {"Height": 24, "Width": 80})
    assert process["Capabilities"]["Ambient"] == ["CAP_KILL", "CAP_CHOWN"]
    assert process["Rlimits"] == [{"Type": "RLIMIT_NOFILE", "Hard": 1 << 63, "Soft": 1024}]
    assert (process["OOMScoreAdj"], process["NoNewPrivileges"], process["Cwd"]) == (-5, True, "/home")
    assert message["Root"] == {"Path": "rootfs", "Readonly": True}
    assert message["Mounts"][1]["options"] == ["rbind", "rw"]
    assert linux["Resources"]["Memory"]["Swap"] == -1
    assert linux["Resources"]["CPU"]["Cpus"] == "0-3,7"
    assert linux["Resources"]["HugepageLimits"][0]["Pagesize"] == "2MB"
    assert linux["Resources"]["BlockIO"]["ThrottleReadBpsDevice"][0]["Rate"] == 600
    assert linux["Sysctl"] == SPEC["linux"]["sysctl"]
    assert linux["Seccomp"]["Syscalls"][0]["errnoret"] is None
    assert linux["Seccomp"]["Syscalls"][1]["errnoret"] == 0
    assert linux["UIDMappings"] == [{"HostID": 1000, "ContainerID": 0, "Size": 1}]


def test_message_of_the_agent_names_nothing_of_the_host() -> None:
    message = _encoded("grpc.Spec", agent_spec(SPEC))

    assert message["Linux"]["Namespaces"] == [
        {"Type": name, "Path": ""} for name in ("pid", "ipc", "uts", "mount", "user")
    ]
    assert message["Hooks"] is None
    assert (message["Process"]["ApparmorProfile"], message["Process"]["SelinuxLabel"]) == ("", "")


def test_parts_of_a_configuration_become_messages() -> None:
    assert _encoded("grpc.Process", agent_process(SPEC["process"]))["Args"] == ["sh", "-c", "true"]
    assert _encoded("grpc.LinuxResources", agent_resources(SPEC["linux"]["resources"]))["Pids"] == {"Limit": 100}
    with pytest.raises(SpecError, match=r"\$\.cwd"):
        agent_process({**SPEC["process"], "cwd": "x"})
    with pytest.raises(SpecError, match=r"\$\.memry"):
        agent_resources({"memry": {}})


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        found += _places(item, (*path, name))
    return found


@settings(max_examples=200, deadline=None)
@given(place=st.sampled_from(_places(SPEC)), value=_VALUES)
def test_any_value_anywhere_is_refused_at_its_place_or_can_be_sent(place: tuple[str | int, ...], value: Any) -> None:
    spec = copy.deepcopy(SPEC)
    _set(*place, to=value)(spec)

    try:
        message = agent_spec(spec)
    except SpecError as error:
        refusal = str(error)
        message = {}
    else:
        refusal = ""

    assert "\n" not in refusal
    assert not refusal or refusal.startswith("config.json: $")
    _encoded("grpc.Spec", message)


@settings(max_examples=100, deadline=None)
@given(value=_VALUES)
def test_anything_at_all_is_refused(value: Any) -> None:
    with pytest.raises(SpecError):
        check_spec(value)


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(_places(SPEC)), name=st.text(max_size=10))
def test_unknown_field_is_refused_wherever_names_are_not_free(place: tuple[str | int, ...], name: str) -> None:
    spec = copy.deepcopy(SPEC)
    inner: Any = spec
    for each in place:
        inner = inner[each]
    if not isinstance(inner, dict) or place[-1] in ("annotations", "sysctl", "unified") or name in inner:
        return
    inner[name + "?"] = 1

    with pytest.raises(SpecError, match=r"unknown field|not run on the host"):
        check_spec(spec)
