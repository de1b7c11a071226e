"""Pods as Kubernetes describes them (Kubernetes API v1, Pod), as far as a sandbox on one machine has a use for it.

Understood: ``apiVersion: v1``, ``kind: Pod``, ``metadata`` (name, labels, annotations), and of ``spec``: hostname,
restartPolicy, volumes (emptyDir without fields, hostPath with path and type Directory, File or DirectoryOrCreate) and
containers (name, image, command, args, env with values, workingDir, tty, stdin, volumeMounts with mountPath and
readOnly, resources.limits of cpu and memory, and resources.requests, which mean nothing where nobody schedules;
securityContext with runAsUser, runAsGroup, readOnlyRootFilesystem, capabilities). Everything else is refused with its
path, since silence would be a lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError

RESTART_POLICIES: Final = {"Never": "never", "OnFailure": "on-failure", "Always": "always"}
MOST_BYTES: Final = 1 << 20

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[^=\0]+")
_MEMORY = re.compile(r"(\d{1,15})(Ki|Mi|Gi|Ti|k|M|G|T)?")
_CPU = re.compile(r"(\d{1,6})m|(\d{1,4}(?:\.\d{1,3})?)")
_MULTIPLES: Final = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}

Check = Callable[[Any, str], Any]


class ManifestError(KataLabError):
    """A pod that cannot be run as it is described; the message has the path in the YAML file."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory that containers share: of the host, or the pod's own and empty at first if ``path`` is None."""

    name: str
    path: Path | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """Where a container sees a volume."""

    volume: str
    place: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class PodContainer:
    """A container of a pod; ``wishes`` as of :class:`kata_lab.oci.Wishes`, without volumes."""

    name: str
    image: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    wishes: dict[str, Any]
    mounts: tuple[VolumeMount, ...]
    stdin: bool


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod."""

    name: str
    hostname: str
    restart: str
    volumes: tuple[Volume, ...]
    containers: tuple[PodContainer, ...]


def parse_manifest(text: str, origin: str) -> list[Pod]:
    """The pods of a YAML file, which may have several documents.

    Args:
        text: the file's.
        origin: names it in messages.

    Raises:
        ManifestError: it is no YAML, or no pod that can be run.
    """
    import yaml

    if len(text) > MOST_BYTES:
        raise ManifestError(f"{origin} has {len(text)} characters: a pod's description has at most {MOST_BYTES}")
    try:
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
    except yaml.YAMLError as error:
        raise ManifestError(f"{origin} is no YAML: {' '.join(str(error).split())}") from error
    if not documents:
        raise ManifestError(f"{origin} has no pod: it must have a document with kind: Pod")
    pods = []
    for document in documents:
        try:
            pods.append(_pod(document))
        except _Refused as error:
            raise ManifestError(f"{origin}: {error}") from None
    return pods


class _Refused(Exception):
    pass


def _object(value: Any, path: str, fields: Mapping[str, Check], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check an object's fields; what is missing is missing in the answer."""
    if not isinstance(value, dict):
        raise _Refused(f"{path} is {value!r}: it must be an object")
    for name in value:
        if name not in fields:
            known = ", ".join(fields)
            raise _Refused(f"{path}.{name} is not understood: {path} may have {known}")
    for name in required:
        if value.get(name) is None:
            raise _Refused(f"{path} has no {name}: it must have one")
    return {name: check(value[name], f"{path}.{name}") for name, check in fields.items() if value.get(name) is not None}


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise _Refused(f"{path} is {value!r}: it must be a text (in quotes, if it looks like something else)")
    return value


def _flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise _Refused(f"{path} is {value!r}: it must be true or false")
    return value


def _name(value: Any, path: str) -> str:
    if not _NAME.fullmatch(_text(value, path)):
        raise _Refused(f"{path} is {value!r}: it must be 1 to 63 small letters, digits and '-', without '-' at an end")
    return str(value)


def _id(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise _Refused(f"{path} is {value!r}: it must be a whole number from 0 to {(1 << 31) - 1}")
    return value


def _place(value: Any, path: str) -> str:
    if not _text(value, path).startswith("/") or ":" in value or ".." in value.split("/") or not value.strip("/"):
        raise _Refused(f"{path} is {value!r}: it must be an absolute path beneath / without '..' and ':'")
    return str(value)


def _one_of(*allowed: str) -> Check:
    def check(value: Any, path: str) -> str:
        if value not in allowed:
            raise _Refused(f"{path} is {value!r}: it must be {' or '.join(allowed)}")
        return str(value)

    return check


def _list(each: Check) -> Check:
    def check(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _Refused(f"{path} is {value!r}: it must be a list")
        return [each(item, f"{path}[{index}]") for index, item in enumerate(value)]

    return check


def _named(each: Check) -> Check:
    """A list of objects whose names differ."""

    def check(value: Any, path: str) -> list[Any]:
        found: list[Any] = _list(each)(value, path)
        names = [item["name"] for item in found]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _Refused(f"{path}[{index}].name is {name!r}, which is there already: names must differ")
        return found

    return check


def _texts(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Refused(f"{path} is {value!r}: it must be an object")
    return {_text(name, path): _text(each, f"{path}.{name}") for name, each in value.items()}


def _memory(value: Any, path: str) -> int:
    match = _MEMORY.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise _Refused(f"{path} is {value!r}: it must be an amount of memory such as 64Mi")
    return int(match[1]) * _MULTIPLES[match[2] or ""]


def _cpu(value: Any, path: str) -> float:
    match = _CPU.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise _Refused(f"{path} is {value!r}: it must be a number of processors such as 0.5, or 500m")
    return int(match[1]) / 1000 if match[1] else float(match[2])


def _quantities(value: Any, path: str) -> dict[str, Any]:
    return _object(value, path, {"cpu": _cpu, "memory": _memory})


def _resources(value: Any, path: str) -> dict[str, Any]:
    return _object(value, path, {"limits": _quantities, "requests": _quantities})


def _variable(value: Any, path: str) -> str:
    found = _object(value, path, {"name": _text, "value": _text}, ("name",))
    if not _VARIABLE.fullmatch(found["name"]):
        raise _Refused(f"{path}.name is {found['name']!r}: it must be a name without '='")
    return f"{found['name']}={found.get('value', '')}"


def _volume_mount(value: Any, path: str) -> dict[str, Any]:
    return _object(value, path, {"name": _name, "mountPath": _place, "readOnly": _flag}, ("name", "mountPath"))


def _capabilities(value: Any, path: str) -> dict[str, Any]:
    return _object(value, path, {"add": _list(_text), "drop": _list(_text)})


def _security(value: Any, path: str) -> dict[str, Any]:
    fields: dict[str, Check] = {
        "runAsUser": _id,
        "runAsGroup": _id,
        "readOnlyRootFilesystem": _flag,
        "capabilities": _capabilities,
    }
    found = _object(value, path, fields)
    if "runAsGroup" in found and "runAsUser" not in found:
        raise _Refused(f"{path} has runAsGroup alone: it must have runAsUser with it")
    return found


def _container(value: Any, path: str) -> dict[str, Any]:
    fields: dict[str, Check] = {
        "name": _name,
        "image": _text,
        "command": _list(_text),
        "args": _list(_text),
        "env": _list(_variable),
        "workingDir": _text,
        "tty": _flag,
        "stdin": _flag,
        "volumeMounts": _list(_volume_mount),
        "resources": _resources,
        "securityContext": _security,
    }
    return _object(value, path, fields, ("name", "image"))


def _empty(value: Any, path: str) -> dict[str, Any]:
    return _object(value, path, {})


def _host_path(value: Any, path: str) -> dict[str, Any]:
    kinds = _one_of("", "Directory", "File", "DirectoryOrCreate")
    return _object(value, path, {"path": _place, "type": kinds}, ("path",))


def _volume(value: Any, path: str) -> dict[str, Any]:
    found = _object(value, path, {"name": _name, "emptyDir": _empty, "hostPath": _host_path}, ("name",))
    if len(found) != 2:
        raise _Refused(f"{path} must have emptyDir: {{}} or hostPath, and not both")
    return found


def _pod_spec(value: Any, path: str) -> dict[str, Any]:
    fields: dict[str, Check] = {
        "containers": _named(_container),
        "volumes": _named(_volume),
        "restartPolicy": _one_of(*RESTART_POLICIES),
        "hostname": _name,
    }
    found = _object(value, path, fields, ("containers",))
    if not found["containers"]:
        raise _Refused(f"{path}.containers is empty: it must have one")
    return found


def _metadata(value: Any, path: str) -> dict[str, Any]:
    return _object(value, path, {"name": _name, "labels": _texts, "annotations": _texts}, ("name",))


def _pod(value: Any) -> Pod:
    fields: dict[str, Check] = {
        "apiVersion": _one_of("v1"),
        "kind": _one_of("Pod"),
        "metadata": _metadata,
        "spec": _pod_spec,
    }
    found = _object(value, "$", fields, tuple(fields))
    name, spec = found["metadata"]["name"], found["spec"]
    volumes = []
    for each in spec.get("volumes", []):
        host = each.get("hostPath")
        volumes.append(Volume(each["name"], None if host is None else Path(host["path"]), (host or {}).get("type", "")))
    known = {each.name for each in volumes}
    containers = []
    for index, each in enumerate(spec["containers"]):
        mounts = []
        for number, mount in enumerate(each.get("volumeMounts", [])):
            if mount["name"] not in known:
                path = f"$.spec.containers[{index}].volumeMounts[{number}].name"
                raise _Refused(f"{path} is {mount['name']!r}: it must be a volume of the pod, {_choices(known)}")
            mounts.append(VolumeMount(mount["name"], mount["mountPath"], mount.get("readOnly", False)))
        containers.append(
            PodContainer(
                name=each["name"],
                image=each["image"],
                args=tuple(each.get("args", ())),
                env=tuple(each.get("env", ())),
                wishes=_wishes(each),
                mounts=tuple(mounts),
                stdin=each.get("stdin", False),
            )
        )
    restart = RESTART_POLICIES[spec.get("restartPolicy", "Always")]
    return Pod(name, spec.get("hostname", name), restart, tuple(volumes), tuple(containers))


def _wishes(container: Mapping[str, Any]) -> dict[str, Any]:
    security = container.get("securityContext", {})
    limits = container.get("resources", {}).get("limits", {})
    wishes: dict[str, Any] = {**limits}
    if "cpu" in wishes:
        wishes["cpus"] = wishes.pop("cpu")
    if "command" in container:
        wishes["entrypoint"] = container["command"]
    if "workingDir" in container:
        wishes["cwd"] = container["workingDir"]
    if container.get("tty"):
        wishes["tty"] = True
    if "runAsUser" in security:
        group = f":{security['runAsGroup']}" if "runAsGroup" in security else ""
        wishes["user"] = f"{security['runAsUser']}{group}"
    if security.get("readOnlyRootFilesystem"):
        wishes["read_only"] = True
    for name, wish in (("add", "cap_add"), ("drop", "cap_drop")):
        if security.get("capabilities", {}).get(name):
            wishes[wish] = security["capabilities"][name]
    return wishes


def _choices(names: set[str]) -> str:
    return " or ".join(sorted(names)) if names else "of which it has none"
