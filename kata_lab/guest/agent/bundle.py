"""From the agent API's ``Spec`` message to the OCI runtime's config.json (runtime-spec 1.0, config.md).

The message's names are those of the configuration with a capital in front and some abbreviations in capitals; defaults
stand for what was not said and are left out.
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
    "BlockIO": "blockIO",
    "Pagesize": "pageSize",
    "ClassID": "classID",
    "errnoret": "errnoRet",
    "HostID": "hostID",
    "ContainerID": "containerID",
}
# Numbers and flags which mean something when they are zero.
_ALWAYS = ("UID", "GID", "Major", "Minor", "Allow", "Hard", "Soft", "Cwd", "Args", "Index", "Value")
# Cgroup v2 has nothing for these, and crun refuses some.
_DROPPED = ("Solaris", "Windows", "Kernel", "KernelTCP", "Swappiness", "FileMode")
_KEEP_KEYS = ("Annotations", "Sysctl")


def to_json(message):
    """A message as plain JSON data."""
    out = {}
    for name, value in message.items():
        if value is None or (name in _DROPPED and not value):
            continue
        if name not in _ALWAYS and (value == 0 or value == "" or value == [] or value == {}) and name != "errnoret":
            continue
        if isinstance(value, dict) and name not in _KEEP_KEYS:
            value = to_json(value)
        elif isinstance(value, list):
            value = [to_json(each) if isinstance(each, dict) else each for each in value]
        if name == "FileMode":
            value &= 0o7777
        out[_NAMES.get(name) or name[0].lower() + name[1:]] = value
    return out


def to_process(message):
    """A ``Process`` message as the configuration's ``process``."""
    process = to_json(message)
    process.setdefault("user", {"uid": 0, "gid": 0})
    process.setdefault("cwd", "/")
    return process


def to_configuration(spec, container_id):
    """The config.json of a container.

    It lives in the sandbox's network namespace, hence gets none of its own; its cgroup is below ``/kata``.
    """
    configuration = to_json(spec)
    configuration.setdefault("ociVersion", "1.0.2")
    configuration["process"] = to_process(spec["Process"])
    section = configuration.setdefault("linux", {})
    wanted = [each for each in section.get("namespaces", []) if each["type"] != "network" or each.get("path")]
    section["namespaces"] = wanted or [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]
    section["cgroupsPath"] = "/kata/" + container_id
    configuration.pop("hooks", None)
    return configuration
