"""The configurations of devices: what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from vmm import ConfigError, VmConfig
from vmm.config import (
    DEVICE_CONFIGS,
    BalloonConfig,
    BlockConfig,
    DeviceConfig,
    EntropyConfig,
    FsConfig,
    NetworkConfig,
    PortsConfig,
    VsockConfig,
    device_from_dict,
)

# What each kind needs at least.
LEAST: dict[str, dict[str, Any]] = {
    "blk": {"path": "disk.img"},
    "vsock": {},
    "fs": {"path": "share", "tag": "home"},
    "net": {},
    "balloon": {},
    "rng": {},
    "console": {"ports": {"agent": None}},
    "vhost-fs": {"tag": "home", "socket": "fs.sock"},
}


def test_every_kind_is_known() -> None:
    assert set(DEVICE_CONFIGS) == set(LEAST)


@pytest.mark.parametrize("kind", LEAST)
def test_plain_data_makes_the_configuration_of_its_kind(kind: str) -> None:
    config = device_from_dict({"kind": kind, **LEAST[kind]})

    assert type(config) is DEVICE_CONFIGS[kind]
    assert config == DEVICE_CONFIGS[kind](**LEAST[kind])
    assert config.name == ""


@pytest.mark.parametrize("kind", LEAST)
def test_configuration_is_frozen_and_takes_names_only(kind: str) -> None:
    config = DEVICE_CONFIGS[kind](**LEAST[kind])

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"
    with pytest.raises(TypeError):
        DEVICE_CONFIGS[kind]("disk.img")


def test_paths_may_be_given_as_text() -> None:
    assert BlockConfig(path="a").path == Path("a")
    assert VsockConfig(socket="b").socket == Path("b")
    assert FsConfig(path="c", tag="t").path == Path("c")
    assert NetworkConfig(backend="socket", socket="d").socket == Path("d")
    ports: Any = {"first": None, "second": "e"}
    assert dict(PortsConfig(ports=ports).ports) == {"first": None, "second": Path("e")}


@pytest.mark.parametrize("kind", [None, "block", "BLK", "", 5, ["blk"], {"blk": 1}])
def test_unknown_kind_is_refused_with_all_that_are_known(kind: object) -> None:
    with pytest.raises(ConfigError) as refused:
        device_from_dict({"kind": kind})

    assert str(refused.value) == (
        f"a device's kind is {kind!r}, it must be one of 'blk', 'vsock', 'fs', 'net', 'balloon', 'rng', 'console',"
        " 'vhost-fs'"
    )


@pytest.mark.parametrize("kind", LEAST)
def test_unknown_field_is_refused_with_the_likely_one(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"a {kind} device has no field 'nme': did you mean 'name'"):
        device_from_dict({"kind": kind, **LEAST[kind], "nme": "x"})


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize("name", [5, None, "x" * 65])
def test_name_that_is_no_short_text_is_refused(kind: str, name: object) -> None:
    with pytest.raises(ConfigError, match=r"a device's name is .*, it must be text of at most 64 characters"):
        device_from_dict({"kind": kind, **LEAST[kind], "name": name})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("blk", {"path": None}, "blk path is missing, it must be a path"),
        ("blk", {"path": ""}, "blk path is '', it must be the path of a file"),
        ("blk", {"path": 7}, "blk path is 7, it must be the path"),
        ("blk", {"format": "qcow2"}, "blk format is 'qcow2', it must be one of 'raw', 'overlay'"),
        ("blk", {"format": None}, "blk format is None, it must be one of"),
        ("blk", {"format": ["raw"]}, r"blk format is \['raw'\], it must be one of"),
        ("blk", {"read_only": 1}, "blk read_only is 1, it must be True or False"),
        ("blk", {"serial": "x" * 21}, "blk serial is 'x*', it must be at most 20 characters of ASCII"),
        ("blk", {"serial": "ü"}, "blk serial is 'ü', it must be at most 20 characters of ASCII"),
        ("blk", {"serial": 5}, "blk serial is 5"),
        ("blk", {"queues": 0}, "blk queues is 0, it must be from 1 to 8"),
        ("blk", {"queues": 9}, "blk queues is 9, it must be from 1 to 8"),
        ("blk", {"queues": "2"}, "blk queues is '2', it must be a whole number from 1 to 8"),
        ("blk", {"queues": True}, "blk queues is True, it must be a whole number"),
        ("vsock", {"socket": 5}, "vsock socket is 5, it must be the path"),
        ("vsock", {"socket": "x" * 200}, "vsock socket 'x*' is a path of 200 bytes, it may have"),
        ("vsock", {"cid": 2}, "vsock cid is 2, it must be from 3 to 4294967294"),
        ("vsock", {"cid": 0xFFFF_FFFF}, "vsock cid is 4294967295, it must be from 3 to 4294967294"),
        ("vsock", {"cid": 3.0}, "vsock cid is 3.0, it must be a whole number"),
        ("fs", {"tag": ""}, "fs tag is '', it must have 1 to 36 bytes"),
        ("fs", {"tag": "ü" * 19}, "fs tag is 'ü*', it must have 1 to 36 bytes"),
        ("fs", {"tag": "a\0b"}, r"fs tag is 'a\\x00b', it must have 1 to 36 bytes"),
        ("fs", {"tag": b"home"}, "fs tag is b'home'"),
        ("fs", {"read_only": "no"}, "fs read_only is 'no', it must be True or False"),
        ("fs", {"cache": "metadata"}, "fs cache is 'metadata', it must be one of 'none', 'auto', 'always'"),
        ("fs", {"queues": 0}, "fs queues is 0, it must be from 1 to 8"),
        ("net", {"backend": "slirp"}, "net backend is 'slirp', it must be one of 'passt', 'tap', 'socket'"),
        ("net", {"tap": "x" * 16}, "net tap is 'x*', an interface's name has at most 15 bytes"),
        ("net", {"tap": None}, "net tap is None"),
        ("net", {"backend": "socket"}, "net socket is missing, it must be a path"),
        ("net", {"socket": "x"}, "net socket is 'x', but the backend is 'passt': use 'socket'"),
        ("net", {"mac": "02:00:00:00:00"}, "net mac is '02:00:00:00:00', it must look like '02:00:00:00:00:01'"),
        ("net", {"mac": "02-00-00-00-00-01"}, "it must look like '02:00:00:00:00:01'"),
        ("net", {"mac": "01:00:00:00:00:01"}, "a group address; the first byte must be even"),
        ("net", {"mac": 1}, "net mac is 1, it must look like"),
        ("net", {"mtu": 67}, "net mtu is 67, it must be from 68 to 65520"),
        ("net", {"mtu": 65521}, "net mtu is 65521, it must be from 68 to 65520"),
        ("net", {"mtu": False}, "net mtu is False, it must be a whole number"),
        ("net", {"mtu": None}, "net mtu is None, it must be a whole number"),
        ("net", {"forwards": ["sctp 80"]}, "net forward 'sctp 80' must look like 'tcp 8080:80'"),
        ("net", {"forwards": ["tcp 70000:80"]}, "net forward 'tcp 70000:80' must look like"),
        ("net", {"forwards": ["tcp 0"]}, "net forward 'tcp 0' must look like"),
        ("net", {"forwards": [8080]}, "net forward 8080 must look like"),
        ("net", {"forwards": "tcp 80"}, "net forwards is 'tcp 80', it must be a list"),
        ("net", {"forwards": None}, "net forwards is None, it must be a list"),
        ("net", {"backend": "tap", "forwards": ["tcp 80"]}, "net forwards need the backend 'passt', not 'tap'"),
        ("net", {"queues": 9}, "net queues is 9, it must be from 1 to 8"),
        ("balloon", {"target_mib": -1}, "balloon target_mib is -1, it must be from 0 to 1048576 MiB"),
        ("balloon", {"deflate_on_oom": 0}, "balloon deflate_on_oom is 0, it must be True or False"),
        ("balloon", {"free_page_reporting": None}, "balloon free_page_reporting is None, it must be True or False"),
        ("balloon", {"statistics_seconds": 86_401}, "balloon statistics_seconds is 86401, it must be from 0 to 86400"),
        ("rng", {"bytes_per_second": -1}, "rng bytes_per_second is -1, it must be from 0 to"),
        ("rng", {"bytes_per_second": 1.5}, "rng bytes_per_second is 1.5, it must be a whole number"),
        ("console", {"ports": {}}, "console ports is {}, it must map 1 to 31 names to sockets"),
        ("console", {"ports": ["agent"]}, "it must map 1 to 31 names to sockets"),
        ("console", {"ports": {str(n): None for n in range(32)}}, "it must map 1 to 31 names to sockets"),
        ("console", {"ports": {"": None}}, "console port '' must have a name of 1 to 64 bytes, without a slash"),
        ("console", {"ports": {"a/b": None}}, "console port 'a/b' must have a name"),
        ("console", {"ports": {"x" * 65: None}}, "must have a name of 1 to 64 bytes"),
        ("console", {"ports": {5: None}}, "console port 5 must have a name"),
        ("console", {"ports": {"a": 5}}, "console port 'a' is 5, it must be the path"),
        ("console", {"columns": 0}, "console columns is 0, it must be from 1 to 65535"),
        ("console", {"rows": 1 << 16}, "console rows is 65536, it must be from 1 to 65535"),
    ],
)
def test_value_that_cannot_work_is_refused_in_one_sentence(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        device_from_dict({"kind": kind, **LEAST[kind], **changes})

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("blk", {"format": "overlay", "read_only": True, "serial": "x" * 20, "queues": 8}),
        ("vsock", {"cid": 0xFFFF_FFFE}),
        ("fs", {"tag": "ü" * 18, "cache": "always", "read_only": True}),
        ("net", {"mac": "02:00:00:00:00:01", "mtu": 1500, "forwards": ["tcp 8080:80", "udp 5353"]}),
        ("net", {"backend": "tap", "tap": "x" * 15}),
        ("balloon", {"target_mib": 64, "statistics_seconds": 86_400}),
        ("rng", {"bytes_per_second": 1 << 40}),
        ("console", {"ports": {str(n): None for n in range(31)}}),
    ],
)
def test_value_at_the_limit_is_taken(kind: str, changes: dict[str, Any]) -> None:
    config = device_from_dict({"kind": kind, **LEAST[kind], **changes})

    for name, value in changes.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


# Devices of a VM.


def test_devices_without_names_are_numbered_by_kind() -> None:
    config = VmConfig(devices=(EntropyConfig(), BalloonConfig(), EntropyConfig(), EntropyConfig(name="mine")))

    assert [each.name for each in config.devices] == ["rng0", "balloon0", "rng1", "mine"]


def test_devices_may_be_plain_data() -> None:
    config = VmConfig.from_dict({"devices": [{"kind": "rng"}, {"kind": "blk", "path": "disk.img", "name": "root"}]})

    assert config.devices == (EntropyConfig(name="rng0"), BlockConfig(path=Path("disk.img"), name="root"))


def test_changed_copy_keeps_the_devices() -> None:
    config = VmConfig(devices=(EntropyConfig(), EntropyConfig()))

    assert config.replace(vcpus=2).devices == config.devices


@pytest.mark.parametrize(
    "names",
    [["same", "same"], ["rng1", ""], ["", "rng0"]],
)
def test_two_devices_of_one_name_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"two devices are called '\w+'; give each a name of its own"):
        VmConfig(devices=tuple(EntropyConfig(name=name) for name in names))


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("blk", "devices is 'blk', it must be a list of device configurations"),
        (None, "devices is None, it must be a list"),
        ({"kind": "rng"}, "devices is .*, it must be a list"),
        (["rng"], "device 'rng' must be a device configuration such as BlockConfig"),
        ([EntropyConfig], "must be a device configuration such as BlockConfig"),
        ([DeviceConfig()], "must be a device configuration such as BlockConfig"),
        ([{"kind": "gpu"}], "a device's kind is 'gpu', it must be one of"),
        ([EntropyConfig()] * 33, "33 devices are too many, a VM has at most 32"),
    ],
)
def test_devices_that_are_none_are_refused(devices: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VmConfig(devices=devices)
