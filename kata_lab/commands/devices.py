"""Devices of a VM as the command line names them: ``--disk root.img,ro``, ``--net tcp=8080:80``, ``--device rng``.

A device is words with commas between them: one without a name where the option has one (a path, say), flags, and
``name=value``; a comma that belongs to a word is written twice. Names are those of the fields of the configuration
classes in :mod:`vmm.config`, of which some have a short form here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kata_lab.commands import UsageError
from vmm.config import DEVICE_CONFIGS, DeviceConfig, FsConfig, PortsConfig, device_from_dict

_COMMA = re.compile(r"(?<!,),(?!,)")
_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True)
class _Form:
    """What an option is short for.

    Attributes:
        kind: of the device.
        example: how the option looks.
        first: field that the first word gives, empty for none.
        flags: word → the field that it sets, and to what.
        names: short name → field.
    """

    kind: str
    example: str
    first: str = ""
    flags: Mapping[str, tuple[str, object]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


_READ_ONLY = {"ro": ("read_only", True)}
_BACKENDS = {name: ("backend", name) for name in ("passt", "tap", "socket")}
FORMS: Mapping[str, _Form] = {
    "disk": _Form("blk", "disk.img,ro,serial=data", "path", {**_READ_ONLY, "overlay": ("format", "overlay")}),
    "share": _Form("fs", "work=/srv/work,ro,cache=always", flags=_READ_ONLY),
    "net": _Form("net", "passt,tcp=8080:80", flags=_BACKENDS),
    "vsock": _Form("vsock", "vm.sock,cid=3", "socket"),
    "balloon": _Form(
        "balloon", "target=64,statistics=5", names={"target": "target_mib", "statistics": "statistics_seconds"}
    ),
    "rng": _Form("rng", "rate=1024", names={"rate": "bytes_per_second"}),
    "port": _Form("console", "agent=agent.sock"),
    "device": _Form("", "blk,path=disk.img,read_only=on"),
}
"""Options by their name without dashes."""


def parse_devices(options: Sequence[tuple[str, str]]) -> tuple[DeviceConfig, ...]:
    """The devices of a command line, in its order; all ports are one device.

    Args:
        options: name of an option without its dashes, and what was given to it.

    Raises:
        UsageError: words that make no device, or a path on the host that is not there.
        ConfigError: a value that the device refuses.
    """
    devices: list[DeviceConfig] = []
    ports: dict[str, str] = {}
    tags: list[str] = []
    for option, text in options:
        if option != "port":
            device = _parse(option, text)
            if isinstance(device, FsConfig):
                if device.tag in tags:
                    raise _refusal(option, text, f"there is a tag {device.tag!r} already: each must have its own")
                tags.append(device.tag)
            devices.append(device)
            continue
        name, equals, socket = text.partition("=")
        if not (name and equals and socket):
            raise _refusal(option, text, "it must be a name and the path of a socket")
        if name in ports:
            raise _refusal(option, text, f"there is a port {name!r} already: each must have a name of its own")
        ports[name] = socket
    if ports:
        devices.append(PortsConfig(ports={name: Path(socket) for name, socket in ports.items()}))
    return tuple(devices)


def _parse(option: str, text: str) -> DeviceConfig:
    form = FORMS[option]
    words = [word.replace(",,", ",") for word in _COMMA.split(text)] if text else []
    kind = form.kind
    values: dict[str, Any] = {}
    if option == "device":
        kind = words.pop(0) if words else ""
        if kind not in DEVICE_CONFIGS:
            raise _refusal(option, text, f"it must begin with a kind, one of {', '.join(DEVICE_CONFIGS)}")
    elif option == "share":
        tag, equals, directory = words.pop(0).partition("=") if words else ("", "", "")
        if not (tag and equals and directory):
            raise _refusal(option, text, "it must begin with a tag and a directory")
        values = {"tag": tag, "path": directory}
    elif form.first:
        if not words or not words[0]:
            raise _refusal(option, text, f"it must begin with a {form.first}")
        values[form.first] = words.pop(0)
    fields = {each.name: each for each in dataclasses.fields(DEVICE_CONFIGS[kind])}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            if name not in form.flags:
                known = f", it knows {' and '.join(form.flags)}" if form.flags else ""
                raise _refusal(option, text, f"{word!r} is no flag of it{known}")
            target, setting = form.flags[name]
            values[target] = setting
        elif kind == "net" and name in ("tcp", "udp"):
            values["forwards"] = (*values.get("forwards", ()), f"{name} {value}")
        else:
            if kind == "net" and name in ("tap", "socket"):
                values["backend"] = name
            name = form.names.get(name, name)
            values[name] = _value(option, text, fields.get(name), name, value)
    _check_paths(option, text, kind, values)
    return device_from_dict({"kind": kind, **values})


def _value(option: str, text: str, each: dataclasses.Field[Any] | None, name: str, value: str) -> object:
    """A value as the field's type has it; one of an unknown field is left for the configuration to refuse."""
    if each is None or isinstance(each.default, str) or each.default is None:
        return value
    if isinstance(each.default, bool):
        if value not in _SWITCH:
            raise _refusal(option, text, f"{name} is {value!r}, it must be on or off")
        return _SWITCH[value]
    if isinstance(each.default, int):
        if not value.isdecimal():
            raise _refusal(option, text, f"{name} is {value!r}, it must be a whole number")
        return int(value)
    raise _refusal(option, text, f"{name} cannot be given here")


def _check_paths(option: str, text: str, kind: str, values: Mapping[str, Any]) -> None:
    path = values.get("path")
    if path is None:
        if kind == "fs":
            raise _refusal(option, text, "it must have the path of a directory")
        return
    if kind == "blk" and Path(path).is_dir():
        raise _refusal(option, text, f"{path!r} is a directory")
    if kind == "blk" and not Path(path).exists():
        raise _refusal(option, text, f"there is no file {path!r}")
    if kind == "fs" and not Path(path).is_dir():
        raise _refusal(option, text, f"there is no directory {path!r}")


def _refusal(option: str, text: str, problem: str) -> UsageError:
    return UsageError(f"--{option} {text!r} makes no device: {problem}, as in --{option} {FORMS[option].example}")
