"""From the agent API's ``Spec`` message to the OCI runtime's config.json (runtime-spec 1.0, config.md).

The message's names are those of the configuration with a capital in front and some abbreviations in capitals, and the
message is read under the configuration's names (requests.py). It cannot say whether a number was given, so that
defaults stand for what was not said and are left out, where zero means nothing. Left out of the configuration: hooks,
whose programs are the host's; labels of AppArmor and SELinux, which the guest's kernel does not have; and limits that
control groups of version 2 do not know.
"""

DESCRIBED = ("grpc.Spec", "grpc.Process", "grpc.LinuxResources")  # messages that are read under other names
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
_ALWAYS = ("UID", "GID", "Allow", "Hard", "Soft", "Args", "Index", "Value", "HostID", "ContainerID") + (
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
_DEFAULT_NAMESPACES = ("pid", "mount", "ipc", "uts")


def key_of(field):
    """What a field of such a message is called, None if it is left out; and whether it is there when it is zero."""
    if field in _DROPPED:
        return None, False
    return _NAMES.get(field) or field[0].lower() + field[1:], field in _ALWAYS


def device_rules(rules):
    """Rules of the device cgroup: minus one stands for every number, as the configuration has it when it says none."""
    for rule in rules:
        named = rule.get("type") in ("b", "c") and (rule["major"] or rule["minor"])
        for name in ("major", "minor"):
            if not named or rule[name] < 0:
                del rule[name]


def to_resources(resources):
    """Resources as they were read, as the configuration's ``linux.resources``."""
    device_rules(resources.get("devices", ()))
    return resources


def to_process(process):
    """A process as it was read, as the configuration's ``process``."""
    process.setdefault("user", {"uid": 0, "gid": 0})
    process.setdefault("cwd", "/")
    return process


def to_configuration(configuration, container_id, pid_namespace=None):
    """The config.json of a container, from its configuration as it was read.

    It lives in the sandbox's network namespace, hence gets none of its own; its cgroup is below ``/kata``.
    ``pid_namespace`` is the path of the one that it shares.
    """
    configuration.setdefault("ociVersion", "1.0.2")
    configuration.setdefault("mounts", [])  # crun wants it
    to_process(configuration["process"])
    section = configuration.setdefault("linux", {})
    to_resources(section.get("resources", {}))
    for device in section.get("devices", ()):
        if "fileMode" in device:
            device["fileMode"] &= 0o7777
    named = [each for each in section.get("namespaces", ()) if each.get("type") != "network" or each.get("path")]
    if not named:
        named = [{"type": each} for each in _DEFAULT_NAMESPACES]
    if pid_namespace is not None:
        named = [each for each in named if each.get("type") != "pid"] + [{"type": "pid", "path": pid_namespace}]
    section["namespaces"] = named
    section["cgroupsPath"] = "/kata/" + container_id
    return configuration
