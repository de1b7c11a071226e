"""The configuration of a container, ``config.json``, checked before anything is done with it.

Follows the OCI runtime specification 1.1, config.md and config-linux.md; 1.0 is a part of it, and a later 1.x is read
as long as it uses nothing newer. Checking is strict: unknown fields, wrong types, numbers that the kernel's own types
do not hold, and paths that would leave the root are refused with their JSON path.

What is refused although the specification has it, since nobody would carry it out in a sandbox and silence would be a
lie (an empty value says nothing and passes):

==============================================  ====================================================================
field                                           why
==============================================  ====================================================================
``hooks``                                       programs of the host, run by whoever wrote the configuration
``windows``, ``solaris``, ``vm``, ``zos``       other kinds of containers
``domainname``, ``linux.personality``,          the agent's message has no place for them
``linux.timeOffsets``, ``linux.netDevices``,
``linux.memoryPolicy``, ``process.scheduler``,
``process.ioPriority``, ``execCPUAffinity``,
mappings of mounts, ``resources.unified``
``linux.intelRdt``, ``resources.rdma``          hardware that a guest has not
``seccomp.listenerPath``                        a socket of the host
==============================================  ====================================================================

``process.user.umask`` may be 18 (octal 022, what a container has anyway) and ``seccomp.defaultErrnoRet`` 1 (EPERM).
AppArmor and SELinux names are checked as texts, and mean nothing in a guest. Paths of namespaces are paths of the host;
see :mod:`kata_lab.oci.agent_message` for what becomes of them.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.oci import linux
from kata_lab.oci.shape import (
    INT64,
    UINT32,
    UINT64,
    Check,
    ShapeError,
    both,
    flag,
    list_of,
    map_of,
    matching,
    nearest,
    one_of,
    parse_json,
    record,
    refuse,
    text,
    whole,
)

MOST_BYTES: Final = 4 << 20
"""Of a config.json: as many as fit into one message to the agent."""

LONGEST_ARGUMENT: Final = 128 << 10
"""Characters of one argument or environment variable, about the kernel's MAX_ARG_STRLEN."""

MOST_IN_ALL: Final = 2 << 20
"""Characters of all arguments and variables together, as execve(2) limits them by default."""

LARGEST_ID: Final = UINT32 - 1
"""Of users and groups; the next one means "unchanged" to chown(2)."""

_NO_PLACE = "the agent's message has no place for it, so leave it out"
_NO_HARDWARE = "a guest has no such hardware, so leave it out"
_OTHER_PLATFORM = "only Linux containers run in a sandbox, so leave it out"


class SpecError(KataLabError):
    """A container's configuration that cannot be carried out; the message has the JSON path and what would be right."""


def load_spec(bundle: Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of a bundle.

    Args:
        bundle: directory of the bundle, or the file itself.

    Raises:
        SpecError: unreadable, no JSON, a field given twice, or what check_spec() refuses.
    """
    path = bundle / "config.json" if bundle.is_dir() else bundle
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path} cannot be read ({error.strerror}): a bundle has a config.json") from error
    try:
        spec = parse_json(data, str(path), MOST_BYTES)
    except ShapeError as error:
        raise SpecError(str(error)) from error
    check_spec(spec, str(path))
    assert isinstance(spec, dict)
    return spec


def check_spec(spec: Any, origin: str = "config.json") -> None:
    """Check a whole configuration, plain JSON; `origin` names it in messages.

    Raises:
        SpecError: as the module says.
    """
    _run(_spec, spec, origin)


def check_process(process: Any, origin: str = "process") -> None:
    """Check what an exec runs: the object ``process`` of a configuration.

    Raises:
        SpecError: as the module says.
    """
    _run(_process, process, origin)


def check_resources(resources: Any, origin: str = "resources") -> None:
    """Check what an update sets: the object ``linux.resources`` of a configuration.

    Raises:
        SpecError: as the module says.
    """
    _run(_resources, resources, origin)


def _run(check: Check, value: Any, origin: str) -> None:
    try:
        check(value, "$")
    except ShapeError as error:
        raise SpecError(f"{origin}: {error}") from error


def _absolute(value: Any, path: str) -> None:
    """A path from the root, without steps upwards."""
    text(empty=False)(value, path)
    if not value.startswith("/"):
        raise refuse(path, value, "it must be an absolute path")
    _within(value, path)


def _within(value: str, path: str) -> None:
    if ".." in value.split("/"):
        raise refuse(path, value, "it must not contain '..', which could lead out of the root")


def _relative_or_absolute(value: Any, path: str) -> None:
    """A path of the host, from the root or from the bundle's directory."""
    text(empty=False)(value, path)
    _within(value, path)


_id = whole(0, LARGEST_ID)
_number = whole(-INT64, INT64)
_device_number = whole(-1, UINT32)


def _variable(value: Any, path: str) -> None:
    text(longest=LONGEST_ARGUMENT)(value, path)
    if "=" not in value[1:]:
        raise refuse(path, value, "it must be NAME=value")


def _capability(value: Any, path: str) -> None:
    one_of(*linux.CAPABILITIES, what="capability")(value, path)


def _rlimits(value: Any, path: str) -> None:
    limit = record(
        {
            "type": one_of(*linux.RLIMITS, what="limit"),
            "soft": whole(0, UINT64),
            "hard": whole(0, UINT64),
        },
        required=("type", "soft", "hard"),
    )
    list_of(limit)(value, path)
    seen: set[str] = set()
    for index, each in enumerate(value):
        if each["type"] in seen:
            raise refuse(f"{path}[{index}].type", each["type"], "this limit is given twice")
        if each["soft"] > each["hard"]:
            raise refuse(f"{path}[{index}].soft", each["soft"], f"it must be at most the hard limit, {each['hard']}")
        seen.add(each["type"])


def _fits_exec(value: Any, path: str) -> None:
    size = sum(len(each) + 1 for name in ("args", "env") for each in value.get(name, ()))
    if size > MOST_IN_ALL:
        raise ShapeError(
            f"{path}.args and {path}.env together have {size} characters: a program takes at most {MOST_IN_ALL}"
        )


_user = record(
    {
        "uid": _id,
        "gid": _id,
        "umask": whole(0o22, 0o22),
        "additionalGids": list_of(_id, most=65536),
        "username": text(),
    },
    required=("uid", "gid"),
)

_process: Final = both(
    record(
        {
            "terminal": flag,
            "consoleSize": record({"height": whole(0, 65535), "width": whole(0, 65535)}, required=("height", "width")),
            "user": _user,
            "args": list_of(text(longest=LONGEST_ARGUMENT), least=1, most=65536),
            "env": list_of(_variable, most=65536),
            "cwd": _absolute,
            "capabilities": record(
                {
                    name: list_of(_capability)
                    for name in ("bounding", "effective", "inheritable", "permitted", "ambient")
                }
            ),
            "rlimits": _rlimits,
            "noNewPrivileges": flag,
            "apparmorProfile": text(),
            "oomScoreAdj": whole(-1000, 1000),
            "selinuxLabel": text(),
        },
        required=("args", "cwd", "user"),
        refused={
            "commandLine": _OTHER_PLATFORM,
            "scheduler": _NO_PLACE,
            "ioPriority": _NO_PLACE,
            "execCPUAffinity": _NO_PLACE,
        },
    ),
    _fits_exec,
)

_mapping = record(
    {"containerID": whole(0, UINT32), "hostID": whole(0, UINT32), "size": whole(1, UINT32)},
    required=("containerID", "hostID", "size"),
)


def _mount(value: Any, path: str) -> None:
    record(
        {
            "destination": _absolute,
            "type": matching(r"[a-zA-Z0-9_.-]*", "it must be the name of a file system type", longest=64),
            "source": text(),
            "options": list_of(text(empty=False)),
        },
        required=("destination",),
        refused={"uidMappings": _NO_PLACE, "gidMappings": _NO_PLACE},
    )(value, path)
    if value.get("type") == "bind" or {"bind", "rbind"} & set(value.get("options", ())):
        if "source" not in value:
            raise ShapeError(f"{path} has no field 'source': a bind mount must have one")
        _relative_or_absolute(value["source"], f"{path}.source")


def _namespaces(value: Any, path: str) -> None:
    one = record({"type": one_of(*linux.NAMESPACES, what="namespace"), "path": _absolute_or_empty}, required=("type",))
    list_of(one)(value, path)
    seen: set[str] = set()
    for index, each in enumerate(value):
        if each["type"] in seen:
            raise refuse(f"{path}[{index}].type", each["type"], "this namespace is given twice")
        seen.add(each["type"])


def _absolute_or_empty(value: Any, path: str) -> None:
    if value != "":
        _absolute(value, path)


def _device(value: Any, path: str) -> None:
    record(
        {
            "path": _absolute,
            "type": one_of("c", "b", "u", "p", what="type of device"),
            "major": whole(0, (1 << 12) - 1),
            "minor": whole(0, (1 << 20) - 1),
            "fileMode": whole(0, 0o7777),
            "uid": _id,
            "gid": _id,
        },
        required=("path", "type"),
    )(value, path)
    if posixpath.normpath(value["path"]).count("/") < 2:
        raise refuse(f"{path}.path", value["path"], "it must be beneath a directory, such as /dev")
    for name in ("major", "minor"):
        if value["type"] != "p" and name not in value:
            raise ShapeError(f"{path} has no field {name!r}: a device of type {value['type']!r} must have one")


def _sysctl_name(value: Any, path: str) -> None:
    matching(r"[\w-]+([./][\w:-]+)+", "it must be the name of a system parameter, such as net.core.somaxconn")(
        value, path
    )
    name = value.replace("/", ".")
    known = linux.IPC_SYSCTLS | linux.UTS_SYSCTLS
    if name not in known and not name.startswith(("net.", "fs.mqueue.")):
        raise refuse(
            path,
            value,
            "only parameters of a namespace can be set: net.…, fs.mqueue.…, and some of kernel.…, "
            + nearest(name, known),
        )


_sizes = whole(-1, INT64)
_cpu_list = matching(r"(\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*)?", 'it must be a list such as "0-3,7"')
_throttle = list_of(
    record(
        {"major": whole(0, INT64), "minor": whole(0, INT64), "rate": whole(0, UINT64)},
        required=("major", "minor", "rate"),
    )
)
_weight = whole(0, 1000)

_resources: Final = record(
    {
        "devices": list_of(
            record(
                {
                    "allow": flag,
                    "type": one_of("a", "b", "c", what="type of device"),
                    "major": _device_number,
                    "minor": _device_number,
                    "access": matching(r"[rwm]{0,3}", 'it must be made of the letters "r", "w" and "m"'),
                },
                required=("allow",),
            )
        ),
        "memory": record(
            {
                "limit": _sizes,
                "reservation": _sizes,
                "swap": _sizes,
                "kernel": _sizes,
                "kernelTCP": _sizes,
                "swappiness": whole(0, 100),
                "disableOOMKiller": flag,
            },
            refused={
                "useHierarchy": "every cgroup of version 2 has a hierarchy, so leave it out",
                "checkBeforeUpdate": _NO_PLACE,
            },
        ),
        "cpu": record(
            {
                "shares": whole(0, 1 << 18),
                "quota": whole(-1, INT64),
                "period": whole(0, 1_000_000),
                "realtimeRuntime": _number,
                "realtimePeriod": whole(0, UINT64),
                "cpus": _cpu_list,
                "mems": _cpu_list,
            },
            refused={"burst": _NO_PLACE, "idle": _NO_PLACE},
        ),
        "pids": record({"limit": whole(-1, INT64)}, required=("limit",)),
        "blockIO": record(
            {
                "weight": _weight,
                "leafWeight": _weight,
                "weightDevice": list_of(
                    record(
                        {
                            "major": whole(0, INT64),
                            "minor": whole(0, INT64),
                            "weight": _weight,
                            "leafWeight": _weight,
                        },
                        required=("major", "minor"),
                    )
                ),
                "throttleReadBpsDevice": _throttle,
                "throttleWriteBpsDevice": _throttle,
                "throttleReadIOPSDevice": _throttle,
                "throttleWriteIOPSDevice": _throttle,
            }
        ),
        "hugepageLimits": list_of(
            record(
                {"pageSize": matching(r"\d+[KMG]B", 'it must be a size such as "2MB"'), "limit": whole(0, UINT64)},
                required=("pageSize", "limit"),
            )
        ),
        "network": record(
            {
                "classID": whole(0, UINT32),
                "priorities": list_of(
                    record(
                        {"name": text(longest=15, empty=False), "priority": whole(0, UINT32)},
                        required=("name", "priority"),
                    )
                ),
            }
        ),
    },
    refused={"rdma": _NO_HARDWARE, "unified": _NO_PLACE},
)

_seccomp = record(
    {
        "defaultAction": one_of(*linux.SECCOMP_ACTIONS, what="action"),
        "defaultErrnoRet": whole(1, 1),
        "architectures": list_of(one_of(*linux.SECCOMP_ARCHITECTURES, what="architecture")),
        "flags": list_of(one_of(*linux.SECCOMP_FLAGS, what="flag")),
        "syscalls": list_of(
            record(
                {
                    "names": list_of(matching(r"\w+", "it must be the name of a system call"), least=1),
                    "action": one_of(*linux.SECCOMP_ACTIONS, what="action"),
                    "errnoRet": whole(0, 4095),
                    "args": list_of(
                        record(
                            {
                                "index": whole(0, 5),
                                "value": whole(0, UINT64),
                                "valueTwo": whole(0, UINT64),
                                "op": one_of(*linux.SECCOMP_OPERATORS, what="comparison"),
                            },
                            required=("index", "value", "op"),
                        )
                    ),
                },
                required=("names", "action"),
            )
        ),
    },
    required=("defaultAction",),
    refused={
        "listenerPath": "it names a socket of the host, which a guest cannot reach, so leave it out",
        "listenerMetadata": "there is no listener, so leave it out",
    },
)

_linux = record(
    {
        "uidMappings": list_of(_mapping),
        "gidMappings": list_of(_mapping),
        "sysctl": map_of(_sysctl_name, text()),
        "resources": _resources,
        "cgroupsPath": both(text(), lambda value, path: _within(value, path)),
        "namespaces": _namespaces,
        "devices": list_of(_device),
        "seccomp": _seccomp,
        "rootfsPropagation": one_of("", *linux.PROPAGATIONS, what="propagation"),
        "maskedPaths": list_of(_absolute),
        "readonlyPaths": list_of(_absolute),
        "mountLabel": text(),
    },
    refused={
        "intelRdt": _NO_HARDWARE,
        "personality": _NO_PLACE,
        "timeOffsets": _NO_PLACE,
        "netDevices": _NO_PLACE,
        "memoryPolicy": _NO_PLACE,
    },
)

_top = record(
    {
        "ociVersion": matching(
            r"1\.\d{1,4}\.\d{1,4}([-+][\w.+-]*)?", "it must be 1.0, 1.1 or a later 1.x of the specification"
        ),
        "process": _process,
        "root": record({"path": _relative_or_absolute, "readonly": flag}, required=("path",)),
        "hostname": matching(
            r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)?",
            "it must be a host name: letters, digits, '-' and '.'",
            longest=64,
        ),
        "mounts": list_of(_mount),
        "annotations": map_of(text(empty=False), text(longest=1 << 18)),
        "linux": _linux,
    },
    required=("ociVersion", "process", "root"),
    refused={
        "hooks": "programs that a configuration brings are not run on the host, so leave it out",
        "domainname": _NO_PLACE,
        "solaris": _OTHER_PLATFORM,
        "windows": _OTHER_PLATFORM,
        "vm": _OTHER_PLATFORM,
        "zos": _OTHER_PLATFORM,
        "freebsd": _OTHER_PLATFORM,
    },
)


def _mappings_and_namespaces(value: Any, path: str) -> None:
    wanted = value.get("linux", {})
    kinds = {each["type"] for each in wanted.get("namespaces", ())}
    for name in ("uidMappings", "gidMappings"):
        if wanted.get(name) and "user" not in kinds:
            raise ShapeError(
                f"{path}.linux.{name} is given without a user namespace: add one to {path}.linux.namespaces"
            )
    for name in wanted.get("sysctl", ()):
        plain = name.replace("/", ".")
        needed = "network" if plain.startswith("net.") else "uts" if plain in linux.UTS_SYSCTLS else "ipc"
        if needed not in kinds:
            raise ShapeError(
                f"{path}.linux.sysctl has {name!r} without a namespace {needed!r}: add one, or leave it out"
            )
    if value.get("hostname") and "uts" not in kinds:
        raise refuse(f"{path}.hostname", value["hostname"], "it needs a namespace 'uts' of the container's own")


def _hooks(value: Any, path: str) -> None:
    """Lists of hooks may be there as long as they are empty, as engines write them."""
    hooks = value.get("hooks") if isinstance(value, dict) else None
    if isinstance(hooks, dict) and not any(hooks.values()):
        value = {name: item for name, item in value.items() if name != "hooks"}
    _top(value, path)


_spec: Final = both(_hooks, _mappings_and_namespaces)
