"""A container's configuration as the agent takes it: message ``grpc.Spec`` of the agent's API (protocol/oci.proto).

The message names its fields as Go would (``UID``, ``CgroupsPath``), the configuration as JSON does (``uid``,
``cgroupsPath``); they are the same but for upper and lower case, and ``ociVersion``, which is ``Version``. Two things
are of the host and mean nothing in the guest, so they are taken out: paths of namespaces (the guest makes its own; the
network namespace is the guest's whole network, so that one is left out), and names of AppArmor and SELinux. (Hooks
can only be there when they are empty.)
"""

from __future__ import annotations

from typing import Any

from kata_lab.oci.spec import SpecError, check_process, check_resources, check_spec
from kata_lab.protocol import proto

_RENAMED = {"ociversion": "version"}
_OF_THE_HOST = {"apparmorProfile", "selinuxLabel", "mountLabel", "hooks"}


def agent_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """The message ``grpc.Spec`` of a configuration, which is checked first.

    Raises:
        SpecError: as check_spec().
    """
    check_spec(spec)
    return _message("grpc.Spec", spec, "$")


def agent_process(process: dict[str, Any]) -> dict[str, Any]:
    """The message ``grpc.Process`` of an exec's process, which is checked first.

    Raises:
        SpecError: as check_process().
    """
    check_process(process)
    return _message("grpc.Process", process, "$")


def agent_resources(resources: dict[str, Any]) -> dict[str, Any]:
    """The message ``grpc.LinuxResources`` of a container's limits, which are checked first.

    Raises:
        SpecError: as check_resources().
    """
    check_resources(resources)
    return _message("grpc.LinuxResources", resources, "$")


def _message(name: str, value: dict[str, Any], path: str) -> dict[str, Any]:
    """A message of kind `name`; a value that says nothing and has no place in the message is left out."""
    fields = {field.lower(): (field, kind, label) for field, kind, label in _schema()[name].values()}
    message: dict[str, Any] = {}
    for key, item in value.items():
        lower = _RENAMED.get(key.lower(), key.lower())
        if key in _OF_THE_HOST or lower not in fields or item in (None, {}, []):
            continue
        field, kind, label = fields[lower]
        message[field] = _value(kind, label, item, f"{path}.{key}")
    return message


def _value(kind: str, label: str, item: Any, path: str) -> Any:
    if kind not in _schema():
        return item
    if kind == "grpc.LinuxNamespace":
        return [{"Type": each["type"]} for each in item if each["type"] != "network"]
    if kind == "grpc.LinuxDeviceCgroup":
        # A number that is not given stands for all, which is minus one; zero is a number.
        item = [{"major": -1, "minor": -1, **each} for each in item]
    if label == "many":
        return [_message(kind, each, path) for each in item]
    if not isinstance(item, dict):
        raise SpecError(f"{path} is {item!r}: it must be an object")
    return _message(kind, item, path)


def _schema() -> proto.Schema:
    return proto.load("oci.proto").messages
