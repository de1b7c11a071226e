"""Values as JSON and back: every action and answer travels, and what is not part of the vocabulary does not."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import actions
from vmm.actions import EndKind, MachineEnd, SetVmConfiguration, VmmAction
from vmm.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    FsConfig,
    NetworkConfig,
    PortsConfig,
    VmConfig,
    VsockConfig,
)
from vmm.errors import ConfigError
from vmm.metrics import ProcessMemory, VcpuMetrics, VmMetrics
from vmm.report import CodeLine, CrashReport, HartReport
from vmm.rpc import wire
from vmm.rpc.codec import CodecError

VALUES = {
    "a configuration with devices of many kinds": VmConfig(
        vcpus=2,
        kernel=Path("/boot/Image"),
        console=ConsoleConfig(milestones={"shell": r"# $"}),
        devices=(
            BlockConfig(path=Path("disk"), read_only=True),
            VsockConfig(socket=Path("/run/vm.sock")),
            FsConfig(tag="shared"),
            NetworkConfig(forwards=("tcp 8080:80",)),
            PortsConfig(ports={"one": None, "two": Path("/run/two")}),
        ),
    ),
    "a path that is no UTF-8": Path("/tmp/\udcff\udc80"),
    "an end": MachineEnd(EndKind.PANIC, 1, 0, "the guest's kernel panicked: not syncing"),
    "metrics": VmMetrics(1.5, (VcpuMetrics(0, "running", 1 << 60, {"sbi": 3}, 0.25, 0.0),), ProcessMemory(1, 2)),
    "a report": CrashReport(
        "why", None, 1, (HartReport(0, "started", 4, "S", 9, {"ra": 2**64 - 1}, {}, (CodeLine(0, None, "?"),)),), ("a",)
    ),
    "changes of any kind": SetVmConfiguration(
        {"kernel": Path("Image"), "trace": True, "devices": (FsConfig(tag="a"),)}
    ),
    "bytes": b"\0\xff" * 9,
    "nested plain data": {"a": [1, 2.5, None, ("x", True)], 3: {"b": b""}},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_arrives_as_it_was_sent(value: object) -> None:
    arrived = wire.vocabulary().loads(wire.vocabulary().dumps(value))

    assert arrived == value
    assert type(arrived) is type(value) or isinstance(value, Mapping)


def sample(hint: Any) -> Any:
    """Some value of a declared type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return sample(arguments[-1] if arguments[-1] is not type(None) else arguments[0])
    if origin is tuple:
        return tuple(sample(each) for each in arguments if each is not Ellipsis)
    if origin is not None and issubclass(origin, Mapping):
        return {sample(arguments[0]): sample(arguments[1])}
    plain: dict[Any, Any] = {int: 1, str: "text", bool: True, float: 0.5, bytes: b"\1", Path: Path("/a"), Any: None}
    if hint in plain:
        return plain[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return made(kind)
    raise AssertionError(f"the test has no value for {hint!r}")


def made(kind: type) -> Any:
    """An instance of a dataclass, all fields given; of a configuration, one that is accepted."""
    if kind is DeviceConfig:
        return FsConfig(name="fs0", tag="shared")
    if kind is VmConfig:
        return VALUES["a configuration with devices of many kinds"]
    hints = typing.get_type_hints(kind)
    return kind(**{each.name: sample(hints[each.name]) for each in dataclasses.fields(kind) if each.init})


ACTIONS = sorted(
    (each for each in vars(actions).values() if isinstance(each, type) and issubclass(each, VmmAction)),
    key=lambda each: each.__name__,
)
ANSWERS = sorted(
    {
        argument
        for each in ACTIONS
        for base in getattr(each, "__orig_bases__", ())
        for argument in typing.get_args(base)
        if isinstance(argument, type)
    },
    key=lambda each: each.__name__,
)


@pytest.mark.parametrize("kind", [*ACTIONS, *ANSWERS])
def test_every_action_and_every_answer_of_the_vocabulary_travels(kind: type) -> None:
    value = made(kind)

    assert wire.vocabulary().loads(wire.vocabulary().dumps(value)) == value


def test_an_action_that_is_declared_later_needs_nothing_here() -> None:
    wire.vocabulary().dumps(actions.GetState())

    @dataclass(frozen=True, slots=True)
    class Found:
        places: tuple[Path, ...]

    @dataclass(frozen=True, slots=True)
    class LookForTreasure(VmmAction[Found]):
        depth: int

    # Fields are read by name, and a function's classes have none outside of it.
    Found.__annotations__["places"] = tuple[Path, ...]
    for value in (LookForTreasure(3), Found((Path("/island"),))):
        arrived = wire.vocabulary().loads(wire.vocabulary().dumps(value))
        assert repr(arrived) == repr(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", "is no JSON"),
        ('{"GetState": {}, "Empty": {}}', "must have one member"),
        ("{}", "must have one member"),
        ('{"os.system": {"command": "true"}}', "not part of the action vocabulary"),
        ('{"Path": "x"}', "not part of the action vocabulary"),
        ('{"GetState": 3}', "must come with an object of its fields"),
        ('{"GetState": {"verbose": true}}', "GetState has no field 'verbose'"),
        ('{"MachineEnd": {}}', "MachineEnd cannot be made"),
        ('{"MachineEnd": {"kind": "panic"}}', "kind of MachineEnd is 'panic', it must be of type EndKind"),
        ('{"MachineEnd": {"kind": {"EndKind": "PANIC"}, "detail": 3}}', "detail of MachineEnd is 3"),
        ('{"MachineEnd": {"kind": {"EndKind": "PANIC"}, "reset_type": true}}', "reset_type of MachineEnd is True"),
        ('{"EndKind": "TIRED"}', "EndKind has no member 'TIRED'"),
        ('{"path": 3}', "a path came as 3"),
        ('{"path": "a\\u0000b"}', "a path came as"),
        ('{"bytes": "ü"}', "must come as base64"),
        ('{"map": {"a": 1}}', "a map came as"),
        ('{"map": [[[1], 2]]}', "a key that cannot be one"),
        ('{"tuple": 1}', "a tuple came as 1"),
        ("9" * 5000, "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"tuple": [' * 900 + "]}" * 900, "values within values|is no JSON"),
    ],
)
def test_what_is_no_value_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(CodecError, match=sentence) as caught:
        wire.vocabulary().loads(text.encode())

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_configuration_that_is_refused_says_so_itself() -> None:
    with pytest.raises(ConfigError, match="vcpus is 99"):
        wire.vocabulary().loads(b'{"VmConfig": {"vcpus": 99}}')


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: None, RuntimeError("x"), [object()]])
def test_a_value_outside_the_vocabulary_does_not_travel(value: object) -> None:
    with pytest.raises(CodecError, match="cannot travel"):
        wire.vocabulary().dumps(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["tuple", "map", "path", "bytes", "GetState", "EndKind", "VmConfig"]), inner)
    ),
)


@given(JSON)
def test_any_json_is_a_value_or_an_error_in_one_sentence(data: Any) -> None:
    sentence = ""
    try:
        wire.vocabulary().loads(json.dumps(data).encode())
    except (CodecError, ConfigError) as error:
        sentence = str(error)

    assert "\n" not in sentence
