"""Interfaces and routes of the guest, by busybox's ``ip`` and sysfs."""

import os

from rpc import INVALID_ARGUMENT, NOT_FOUND, RpcError
from streams import output_of

IP = "/usr/bin/ip"
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin",)


def _text(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


async def _ip(children, arguments):
    """Run ip; what it prints."""
    status, said = await output_of(children, [IP] + arguments, ENVIRONMENT)
    if status != 0:
        raise RpcError(INVALID_ARGUMENT, f"ip {' '.join(arguments)}: {said.decode().strip()}")
    return said.decode()


async def list_interfaces(children):
    addresses = {}
    for line in (await _ip(children, ["-o", "addr", "show"])).split("\n"):
        words = line.split()
        if len(words) > 3 and words[2] in ("inet", "inet6"):
            address, _, mask = words[3].partition("/")
            family = 0 if words[2] == "inet" else 1
            addresses.setdefault(words[1], []).append({"family": family, "address": address, "mask": mask})
    found = []
    for name in sorted(entry[0] for entry in os.ilistdir("/sys/class/net")):
        base = "/sys/class/net/" + name
        found.append(
            {
                "device": name,
                "name": name,
                "IPAddresses": addresses.get(name, []),
                "mtu": int(_text(base + "/mtu") or 0),
                "hwAddr": _text(base + "/address"),
                "raw_flags": int(_text(base + "/flags") or "0", 16) & 0xFFFFFFFF,
            }
        )
    return found


async def update_interface(children, wanted):
    """Give an interface, found by its hardware address or name, a name, addresses and an MTU, and bring it up."""
    present = await list_interfaces(children)
    for each in present:
        by_address = wanted["hwAddr"] and each["hwAddr"].lower() == wanted["hwAddr"].lower()
        if by_address or (not wanted["hwAddr"] and each["name"] == wanted["name"]):
            break
    else:
        raise RpcError(NOT_FOUND, f"the guest has no interface {wanted['hwAddr'] or wanted['name']!r}")
    name = each["name"]
    if wanted["name"] and wanted["name"] != name:
        await _ip(children, ["link", "set", name, "down"])
        await _ip(children, ["link", "set", name, "name", wanted["name"]])
        name = wanted["name"]
    await _ip(children, ["addr", "flush", "dev", name])
    for address in wanted["IPAddresses"]:
        await _ip(children, ["addr", "add", f"{address['address']}/{address['mask']}", "dev", name])
    if wanted["mtu"]:
        await _ip(children, ["link", "set", name, "mtu", str(wanted["mtu"])])
    await _ip(children, ["link", "set", name, "up"])
    return next(each for each in await list_interfaces(children) if each["name"] == name)


async def list_routes(children):
    found = []
    for family, option in ((0, "-4"), (1, "-6")):
        for line in (await _ip(children, [option, "route", "show"])).split("\n"):
            words = line.split()
            if not words:
                continue
            route = {"dest": "" if words[0] == "default" else words[0], "family": family}
            for name, field in (("via", "gateway"), ("dev", "device"), ("src", "source")):
                if name in words:
                    route[field] = words[words.index(name) + 1]
            found.append(route)
    return found


async def update_routes(children, routes):
    """Add routes, those without a gateway first, since others lead through them."""
    for route in sorted(routes, key=lambda each: each["gateway"] != ""):
        arguments = ["-6" if route["family"] else "-4", "route", "replace", route["dest"] or "default"]
        for name, field in (("via", "gateway"), ("dev", "device"), ("src", "source")):
            if route[field]:
                arguments += [name, route[field]]
        await _ip(children, arguments)
    return await list_routes(children)


def statistics():
    """As messages NetworkStats."""
    found = []
    for entry in os.ilistdir("/sys/class/net"):
        base = f"/sys/class/net/{entry[0]}/statistics/"
        names = [f"{way}_{what}" for way in ("rx", "tx") for what in ("bytes", "packets", "errors", "dropped")]
        found.append(dict([("name", entry[0])] + [(name, int(_text(base + name) or 0)) for name in names]))
    return found
