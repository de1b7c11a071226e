"""Images with each format of root boot, keep what they shall, and run containers that change their root."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.image.build import BuildOptions, build_image
from kata_lab.image.description import find_description, load_description, parse_description
from kata_lab.image.library import Image, Library
from kata_lab.shell import ShellError, boot_image
from vmm.config import BlockConfig

CONTAINER = """
set -e
mkdir -p /run/bundle/rootfs/usr/bin /run/bundle/rootfs/usr/lib /run/bundle/rootfs/proc /run/bundle/rootfs/dev
cd /run/bundle
ln -s usr/lib rootfs/lib
ln -s usr/bin rootfs/bin
cp /bin/busybox rootfs/bin/
cp -L /lib/ld-linux-* rootfs/lib/
mkdir rootfs/lib/riscv64-linux-gnu
cp -L /lib/riscv64-linux-gnu/libc.so.6 /lib/riscv64-linux-gnu/libresolv.so.2 rootfs/lib/riscv64-linux-gnu/
crun spec
sed -i 's/"terminal": true/"terminal": false/' config.json
sed -i 's|"sh"|"/bin/busybox", "sh", "-c", "echo $$ $(/bin/busybox ls /)"|' config.json
crun run one
"""


def build(format: str, directory: Path) -> Image:
    data = copy.deepcopy(load_description(find_description("lifsea")).data)
    data["name"] = f"lifsea-test-{format}"
    data["root"] = {"format": format}
    options = BuildOptions(lock=directory / f"{format}.lock.json", progress="off")
    return build_image(parse_description(data), options)


@pytest.fixture(scope="module")
def erofs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    image = build("erofs", tmp_path_factory.mktemp("erofs"))
    yield image
    Library().remove(image.name)


@pytest.mark.parametrize("format", ["initramfs", "erofs", "ext4"])
def test_a_container_runs_on_every_format_of_root(format: str, tmp_path: Path) -> None:
    image = build(format, tmp_path)
    try:
        with boot_image(image, memory_mib=256) as (_, shell):
            result = shell.run(CONTAINER, check=True)
            root = shell.run("grep ' / ' /proc/mounts | tail -n 1", check=True).output.split()
    finally:
        Library().remove(image.name)

    assert result.output == "1 bin dev lib proc sys usr\n"
    assert root[2] == ("rootfs" if format == "initramfs" else format)


def test_only_etc_and_var_of_a_disk_are_writable_and_forget(erofs: Image) -> None:
    with boot_image(erofs, memory_mib=256) as (_, shell):
        assert shell.run("echo lab >/etc/hostname; echo kept >/var/note; cat /etc/hostname /var/note").output == (
            "lab\nkept\n"
        )
        assert shell.run("touch /usr/new").status == 1
        assert shell.run("test ! -e /mnt/usr && test ! -e /virtio_blk.ko").status == 0

    with boot_image(erofs, memory_mib=256) as (_, shell):
        assert shell.run("test -e /var/note").status == 1


def test_changes_on_a_second_disk_are_kept(erofs: Image, tmp_path: Path) -> None:
    disk = tmp_path / "changes.ext4"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk, "16M"], check=True)
    devices = [BlockConfig(path=disk)]

    with boot_image(erofs, memory_mib=256, devices=devices, append="kata.changes=/dev/vdb") as (_, shell):
        shell.run("echo kept >/var/note; sync", check=True)
    with boot_image(erofs, memory_mib=256, devices=devices, append="kata.changes=/dev/vdb") as (_, shell):
        assert shell.run("cat /var/note").output == "kept\n"

    assert subprocess.run(["e2fsck", "-p", disk], check=False).returncode in (0, 1)


def test_a_root_that_is_no_file_system_is_told(erofs: Image, tmp_path: Path) -> None:
    disk = tmp_path / "zeros"
    disk.write_bytes(bytes(1 << 20))

    with (
        pytest.raises(ShellError, match="the root cannot be mounted from /dev/vdb"),
        boot_image(erofs, memory_mib=256, devices=[BlockConfig(path=disk)], append="root=/dev/vdb"),
    ):
        pass


def test_files_for_an_image_on_a_disk_are_refused(erofs: Image) -> None:
    with (
        pytest.raises(ShellError, match="files cannot be added to the image 'lifsea-test-erofs'"),
        boot_image(erofs, files={"/opt/x": b""}),
    ):
        pass
