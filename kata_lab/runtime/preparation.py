"""What a sandbox's VM is made of, made ready before there is one: its guest, its disks, its devices."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from kata_lab.hypervisor import HypervisorConfig
from kata_lab.resource.scratch import SERIAL, make_raw_scratch, make_scratch
from kata_lab.resource.sizing import SandboxSize
from kata_lab.runtime.completion import completed
from kata_lab.runtime.config import SandboxConfig
from kata_lab.runtime.errors import RuntimeFault
from vmm.config import BalloonConfig, BlockConfig, DeviceConfig, EntropyConfig, FsConfig, VsockConfig


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is to be made ready.

    Attributes:
        config: the sandbox's.
        directory: the sandbox's, for its socket and its own disk.
        disk_format: of the own disk, as the hypervisor wants it.
        most: what the sandbox can grow to.
        disks: image → serial number of its disk, which is filled in.
    """

    config: SandboxConfig
    directory: Path
    disk_format: str
    most: SandboxSize
    disks: MutableMapping[str, str]

    async def prepare(self, held: contextlib.AsyncExitStack) -> HypervisorConfig:
        """Make it; that may take minutes if the guest or a disk must be built.

        Args:
            held: what keeps the guest's files where they are, until the VM is made of them.

        Raises:
            RuntimeFault: an image is named twice.
            KataLabError: the guest or a disk cannot be built.
        """
        from kata_lab.image.build import build_named

        # This leaves nothing in the sandbox's directory: a cancellation does not wait for it.
        guest = await asyncio.to_thread(build_named, self.config.image)
        held.callback(guest.release)
        scratch = self.config.scratch or self.directory / "scratch"
        make = make_raw_scratch if self.disk_format == "raw" else make_scratch
        await completed(asyncio.to_thread(make, scratch, self.config.scratch is not None))
        return HypervisorConfig(
            architecture=guest.architecture,
            kernel=guest.kernel,
            initrd=guest.root,
            cmdline=f"{guest.append} {self.config.append}".strip(),
            vcpus=self.config.vcpus,
            memory_mib=self.config.memory_mib,
            max_vcpus=self.config.max_vcpus,
            max_memory_mib=self.config.max_memory_mib,
            devices=[each async for each in self._devices(scratch, guest.architecture)],
            trace=self.config.trace,
        )

    async def _devices(self, scratch: Path, architecture: str) -> AsyncIterator[DeviceConfig]:
        yield VsockConfig(name="agent", socket=self.directory / "vsock")
        yield FsConfig(name="shared", tag="kataShared", cache="auto")
        yield BlockConfig(name="scratch", path=scratch, format=self.disk_format, serial=SERIAL)
        yield EntropyConfig(name="entropy")
        for reference in self.config.images:
            yield await asyncio.to_thread(self._image_disk, reference, architecture)
        if self.config.network is not None:
            yield self.config.network
        if self.most.memory_mib > self.config.memory_mib:
            yield BalloonConfig(name="balloon")

    def _image_disk(self, reference: str, architecture: str) -> BlockConfig:
        from kata_lab.oci import open_image
        from kata_lab.resource.image_disk import image_disk, image_serial

        with contextlib.closing(open_image(reference, architecture)) as image:
            path, serial = image_disk(image), image_serial(image)
        if serial in self.disks.values():
            raise RuntimeFault(f"images names {reference!r}, which is the same image as another one; leave it out")
        self.disks[reference] = serial
        return BlockConfig(name=serial, path=path, read_only=True, serial=serial)
