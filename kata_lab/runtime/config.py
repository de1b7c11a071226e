"""What a sandbox is, where it is in its life, and what a run in it gave."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kata_lab.hypervisor import HYPERVISORS
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.state import check_name
from vmm.config import NetworkConfig

ROOTFS_KINDS: Final = ("split", "fs", "block")
MOST_IMAGES: Final = 16  #: disks of images that a sandbox can have


class SandboxState(enum.Enum):
    """Where a sandbox is in its life."""

    INIT = "init"
    RUNNING = "running"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """What a sandbox is.

    Attributes:
        id: its name; made up if empty.
        image: the guest's image, by the name of its description.
        vcpus: 1 to 32.
        memory_mib: the guest's memory.
        max_vcpus: vCPUs that it can have while it runs, for its containers or by ``resize``; None for no more.
        max_memory_mib: memory that it can have while it runs; None for no more. The guest boots with all of it and
            gives up the difference at once, which costs time.
        rootfs: how root file systems of OCI images get into the guest, ``"split"``, ``"fs"`` or ``"block"``
            (:mod:`kata_lab.resource.rootfs`).
        images: with ``"block"``, the OCI images that containers may have: their disks are there when the VM starts.
        network: its network interface, or None for loopback alone.
        scratch: file of the disk for what containers write, made if there is none, which outlives the sandbox; None for
            a disk that goes with it.
        hostname: the guest's; the sandbox's name if empty.
        shared_pid_namespace: all containers see one another's processes, as in a pod that says so.
        append: words to add to the kernel's command line.
        trace: count the VM's exits.
        hypervisor: the arrangement of runtime and VMM, a name of :data:`kata_lab.hypervisor.HYPERVISORS`.
    """

    id: str = ""
    image: str = "lifsea"
    vcpus: int = 1
    memory_mib: int = 256
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    rootfs: str = "split"
    images: tuple[str, ...] = ()
    network: NetworkConfig | None = None
    scratch: Path | None = None
    hostname: str = ""
    shared_pid_namespace: bool = False
    append: str = ""
    trace: bool = False
    hypervisor: str = "fused"

    def __post_init__(self) -> None:
        if self.id:
            check_name("the sandbox's name", self.id)
        if self.hypervisor not in HYPERVISORS:
            known = ", ".join(map(repr, HYPERVISORS))
            raise RuntimeFault(f"hypervisor is {self.hypervisor!r}, it must be one of {known}")
        if self.rootfs not in ROOTFS_KINDS:
            raise RuntimeFault(f"rootfs is {self.rootfs!r}, it must be one of {', '.join(map(repr, ROOTFS_KINDS))}")
        if isinstance(self.images, str):
            raise RuntimeFault(f"images is {self.images!r}, it must be a list such as ['busybox']")
        object.__setattr__(self, "images", tuple(dict.fromkeys(self.images)))
        if self.rootfs == "block" and not self.images:
            raise RuntimeFault("rootfs is 'block', but images names none: a disk must be there when the VM starts")
        if self.rootfs != "block" and self.images:
            raise RuntimeFault(f"images is {list(self.images)}, but rootfs is {self.rootfs!r}: it must be 'block'")
        if len(self.images) > MOST_IMAGES:
            raise RuntimeFault(f"images names {len(self.images)}, a sandbox can have at most {MOST_IMAGES}")


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a container that was run to its end ended.

    Attributes:
        status: exit status, 128 + n after signal n.
        stdout: what it wrote.
        stderr: what it wrote to standard error; nothing if it had a terminal.
    """

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def output(self) -> str:
        """Standard output as text."""
        return self.stdout.decode(errors="replace")
