"""``kata-lab hotplug``: vCPUs, memory and devices of a sandbox that runs, named by one of its containers.

What is printed is what the guest has by then: every command waits until it does, or says why it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from typing import Any

from kata_lab.commands import UsageError
from kata_lab.shim.records import find_container


def resize(options: argparse.Namespace) -> int:
    """Change vCPUs and memory."""
    request = {}
    if options.cpus is not None:
        request["vcpus"] = options.cpus
    if options.memory is not None:
        from kata_lab.oci import parse_size

        request["memory_mib"] = parse_size(options.memory) >> 20
    if not request:
        raise UsageError("nothing is to be changed: give --cpus, or --memory")
    _print_size(_lab(options.name, "Resize", **request))
    return 0


def add_disk(options: argparse.Namespace) -> int:
    """Plug in a disk; print its name."""
    wish = {"kind": "blk", "path": _existing(options.file), "serial": options.serial, "read_only": options.read_only}
    return _add(options, wish)


def add_share(options: argparse.Namespace) -> int:
    """Plug in a shared directory; print its name."""
    path = _existing(options.directory)
    if not os.path.isdir(path):
        raise UsageError(f"{options.directory} is no directory: a shared one is needed")
    return _add(options, {"kind": "fs", "path": path, "tag": options.tag, "read_only": options.read_only})


def add_net(options: argparse.Namespace) -> int:
    """Plug in a network interface; print its name."""
    return _add(options, {"kind": "net"})


def remove(options: argparse.Namespace) -> int:
    """Take a device away."""
    _lab(options.name, "RemoveDevice", name=options.device)
    print(options.device)
    return 0


def show(options: argparse.Namespace) -> int:
    """Print the sandbox's size and what is plugged in."""
    found = _lab(options.name, "Devices")
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    _print_size(found["size"])
    for device in found["devices"]:
        print(f"{device['name']:16} {device['kind']:4} {device['path']}".rstrip())
    return 0


def _add(options: argparse.Namespace, wish: dict[str, Any]) -> int:
    print(_lab(options.name, "AddDevice", **wish, name=options.device)["name"])
    return 0


def _lab(container: str, method: str, **request: Any) -> dict[str, Any]:
    record = find_container(container).read()

    async def ask() -> dict[str, Any]:
        from kata_lab.shim.client import ShimClient

        async with ShimClient.connect(record.sandbox) as client:
            return await client.lab(method, None, **request)

    return asyncio.run(ask())


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist: a file or directory of this machine is needed")
    # The process of the sandbox has another working directory.
    return os.path.abspath(path)


def _print_size(size: dict[str, int]) -> None:
    print(
        f"{size['vcpus']} of at most {size['max_vcpus']} vCPUs, "
        f"{size['memory_mib']} of at most {size['max_memory_mib']} MiB"
    )
