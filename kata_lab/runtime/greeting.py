"""What a guest is told when its agent answers: its sandbox, the time, names and network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kata_lab.agent.client import AgentClient
from kata_lab.resource.network import GuestNetwork
from kata_lab.resource.rootfs import IMAGES, SCRATCH, SHARED
from kata_lab.resource.scratch import SERIAL

NAMES: Final = "/run/kata-containers/sandbox"  #: where the guest keeps hosts, hostname and resolv.conf
NAME_FILES: Final = ("hosts", "hostname", "resolv.conf")
GREETING_SECONDS: Final = 60.0  #: that the agent may take for any of it


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a guest is told.

    Attributes:
        sandbox_id: the sandbox's name.
        hostname: the guest's.
        images: serial numbers of disks with images.
        network: of its interface ``eth0``, or None.
        shared_pid_namespace: containers may share one.
    """

    sandbox_id: str
    hostname: str
    images: Sequence[str] = ()
    network: GuestNetwork | None = None
    shared_pid_namespace: bool = False


async def greet(agent: AgentClient, told: Greeting) -> None:
    """Tell the agent everything, at once where the order does not count.

    Raises:
        RpcError: the guest cannot do it.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(_sandbox(agent, told))
        now = time.time_ns()
        date = agent.call("SetGuestDateTime", GREETING_SECONDS, Sec=now // 10**9, Usec=now // 1000 % 10**6)
        group.create_task(date)
        address = told.network.address if told.network is not None else "127.0.1.1"
        hosts = f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{address} {told.hostname}\n"
        for name, text in (("hosts", hosts), ("hostname", f"{told.hostname}\n")):
            group.create_task(_write(agent, f"{NAMES}/{name}", text.encode()))


async def _sandbox(agent: AgentClient, told: Greeting) -> None:
    network = told.network
    request = {
        "hostname": told.hostname,
        "dns": network.resolver if network is not None else [],
        "sandbox_id": told.sandbox_id,
        "sandbox_pidns": told.shared_pid_namespace,
        "storages": [
            {"driver": "virtio-fs", "source": "kataShared", "fstype": "virtiofs", "mount_point": SHARED},
            # Else a thread of the guest writes all inode tables meanwhile: more than most sandboxes write themselves.
            _disk(SERIAL, SCRATCH, "noatime", "noinit_itable"),
            *(_disk(serial, f"{IMAGES}/{serial}", "ro", "noatime") for serial in told.images),
        ],
    }
    await agent.call("CreateSandbox", GREETING_SECONDS, **request)
    if network is not None:
        await agent.call("UpdateInterface", GREETING_SECONDS, interface=network.interface("eth0"))
        await agent.call("UpdateRoutes", GREETING_SECONDS, routes={"Routes": network.routes("eth0")})


def _disk(serial: str, place: str, *options: str) -> dict[str, Any]:
    disk = {"driver": "blk", "source": f"serial={serial}", "fstype": "ext4", "mount_point": place}
    return {**disk, "options": list(options)}


async def _write(agent: AgentClient, path: str, data: bytes) -> None:
    """A file in place of those that containers' images have: hosts(5), hostname(5)."""
    await agent.call("CopyFile", GREETING_SECONDS, path=path, file_size=len(data), file_mode=0o644, data=data)
