"""From the agent API's ``Spec`` message to the OCI runtime's config.json (runtime-spec 1.0, config.md).

The message's names are those of the configuration with a capital in front and some abbreviations in capitals. A message
cannot say whether a number was given, so that defaults stand for what was not said and are left out, where zero means
nothing. Left out of the configuration: hooks, whose programs are the host's; labels of AppArmor and SELinux, which the
guest's kernel does not have; and limits that control groups of version 2 do not know.
"""

# Where lowering the first letter is not all.
_NAMES = {
    "Version": "ociVersion",
    "UID": "uid",
    "GID": "gid",
    "UIDMappings": "uidMappings",
    "GIDMappings": "gidMappings",
    "OOMScoreAdj": "oomScoreAdj",
    "CPU": "cpu",
    "Pagesize": "pageSize",
    "ClassID": "classID",
    "errnoret": "errnoRet",
    "HostID": "hostID",
    "ContainerID": "containerID",
}
# Numbers, flags and lists which mean something when they are zero or empty.
_ALWAYS = ("UID", "GID", "Allow", "Hard", "Soft", "Args", "Index", "Value", "HostID", "ContainerID", "errnoret") + (
    "Major",
    "Minor",
    "Rate",
)
_DROPPED = (
    "Solaris",
    "Windows",
    "Hooks",
    "Kernel",
    "KernelTCP",
    "Swappiness",
    "DisableOOMKiller",
    "RealtimeRuntime",
    "RealtimePeriod",
    "Network",
    "IntelRdt",
    "ApparmorProfile",
    "SelinuxLabel",
    "MountLabel",
    "Username",
)
_KEEP_KEYS = ("Annotations", "Sysctl")
_DEFAULT_NAMESPACES = ("pid", "mount", "ipc", "uts")


def to_json(message):
    """A message as the object of the configuration that it stands for."""
    out = {}
    for name, value in message.items():
        if value is None or name in _DROPPED or (not value and name not in _ALWAYS):
            continue
        if isinstance(value, dict) and name not in _KEEP_KEYS:
            value = to_json(value)
            if not value:
                continue
        elif isinstance(value, list):
            value = [to_json(each) if isinstance(each, dict) else each for each in value]
        if name == "FileMode":
            value &= 0o7777
        out[_NAMES.get(name) or name[0].lower() + name[1:]] = value
    return out


def _device_rule(rule):
    """A rule of the device cgroup: minus one stands for every number, as the configuration has it when it says none."""
    found = to_json(rule)
    named = rule["Type"] in ("b", "c") and (rule["Major"] or rule["Minor"])
    for name in ("major", "minor"):
        if not named or found[name] < 0:
            del found[name]
    return found


def to_resources(message):
    """A ``LinuxResources`` message as the configuration's ``linux.resources``."""
    resources = to_json(message)
    if message["Devices"]:
        resources["devices"] = [_device_rule(each) for each in message["Devices"]]
    return resources


def to_process(message):
    """A ``Process`` message as the configuration's ``process``."""
    process = to_json(message)
    process.setdefault("user", {"uid": 0, "gid": 0})
    process.setdefault("cwd", "/")
    process.setdefault("args", [])
    return process


def to_configuration(spec, container_id, pid_namespace=None):
    """The config.json of a container.

    It lives in the sandbox's network namespace, hence gets none of its own; its cgroup is below ``/kata``.
    ``pid_namespace`` is the path of the one that it shares.
    """
    configuration = to_json(spec)
    configuration.setdefault("ociVersion", "1.0.2")
    configuration.setdefault("mounts", [])  # crun wants it
    configuration["process"] = to_process(spec["Process"])
    section = configuration.setdefault("linux", {})
    if spec["Linux"] is not None and spec["Linux"]["Resources"] is not None:
        section["resources"] = to_resources(spec["Linux"]["Resources"])
    named = [each for each in section.get("namespaces", []) if each["type"] != "network" or each.get("path")]
    if not named:
        named = [{"type": each} for each in _DEFAULT_NAMESPACES]
    if pid_namespace is not None:
        named = [each for each in named if each["type"] != "pid"] + [{"type": "pid", "path": pid_namespace}]
    section["namespaces"] = named
    section["cgroupsPath"] = "/kata/" + container_id
    return configuration
