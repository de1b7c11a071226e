"""QEMU as a front end: a Linux guest in QEMU uses a share that our back end serves, over QEMU's own vhost-user."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from kata_lab.image.boot import boot_source
from kata_lab.image.build import build_named
from vmm.vhost.process import FsProcess

SECONDS = 120
MEMORY = "512M"
PROMPT = b"kata-lab:/# "
COMMANDS = b"""mount -t virtiofs share /mnt && cat /mnt/hello && cp /mnt/data /mnt/copy
umount /mnt; mount -t virtiofs share /mnt; ls /mnt
poweroff -f
"""


def test_a_guest_in_qemu_uses_the_share(process: FsProcess, share: Path, program: Callable[[str], str]) -> None:
    data = os.urandom(2 << 20)
    (share / "data").write_bytes(data)
    source = boot_source(build_named("toolbox", progress="off"))
    command = [
        *(program("qemu-system-riscv64"), "-machine", "virt,memory-backend=memory", "-m", MEMORY),
        *("-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"),
        *("-kernel", str(source.kernel), "-initrd", str(source.initrd), "-append", source.append),
        *("-chardev", f"socket,id=back-end,path={process.socket}", "-global", "virtio-mmio.force-legacy=false"),
        *("-device", "vhost-user-fs-device,chardev=back-end,tag=share"),
        *("-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        assert qemu.stdout is not None
        try:
            output = b""
            while PROMPT not in output and (part := os.read(qemu.stdout.fileno(), 4096)):
                output += part
            rest, _ = qemu.communicate(COMMANDS, SECONDS)
        finally:
            qemu.kill()

    output += rest
    assert qemu.returncode == 0, output
    assert b"from the host" in output, output
    assert b"copy" in output.split(b"from the host")[1]
    assert (share / "copy").read_bytes() == data
    # QEMU has gone, and the back end with it.
    assert process.ended.result(SECONDS).endswith("ended with status 0")
