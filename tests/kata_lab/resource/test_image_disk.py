"""Disks of images: what root makes, and what an ordinary user makes, hold the same files; e2fsprogs is the referee."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.oci.writer import LayerArchive
from tests.kata_lab.oci.conftest import need
from tests.kata_lab.oci.layer_cases import base, layout, upper

NOBODY = 65534
MAKE = (
    "import sys; from kata_lab.oci import open_image; from kata_lab.resource.image_disk import image_disk\n"
    "with open_image(sys.argv[1]) as image: print(image_disk(image))"
)
PATHS = [
    *("/", "/etc/shadow", "/bin/su", "/bin/tool", "/bin/tool-too", "/abs", "/dangling", "/var/tmp", "/home/user"),
    *(
        "/home/user/new",
        "/run/pipe",
        "/größe/ü",
        "/name with spaces",
        "/dev/null",
        "/dev/large",
        "/dev/disk",
        "/empty/in",
    ),
    f"/{'a' * 200}/{'b' * 200}",
]


def devices(layer: LayerArchive) -> None:
    layer.device("dev/null", "c", 1, 3, 0o666)
    layer.device("dev/large", "c", 4000, 70000, 0o640)
    layer.device("dev/disk", "b", 8, 1, 0o660)
    layer.file("name with spaces", b"spaces", 0o604, 7, 8)


@pytest.fixture
def place() -> Iterator[Path]:
    """That an ordinary user can write to."""
    with tempfile.TemporaryDirectory(prefix="kl-") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


def make(place: Path, reference: str, user: int) -> subprocess.CompletedProcess[str]:
    """Make a disk with a cache of its own, as this user, or as another one if that is root."""
    switch = [need("setpriv"), f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user != os.getuid() else []
    return subprocess.run(
        [*switch, sys.executable, "-c", MAKE, reference],
        env={
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "KATA_LAB_HOME": str(place / f"home-{user}"),
            "PYTHONPATH": str(Path(__file__).parents[3]),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def ask(disk: str, question: str) -> str:
    command = [need("debugfs"), "-R", question, disk]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def files(disk: str) -> dict[str, tuple[str, ...]]:
    """Path → kind, mode, owners, size, links, device number or target, extended attributes, and content."""
    wanted = (
        r"Type: (\w+)",
        r"Mode:\s+(\d+)",
        r"User:\s+(\d+)",
        r"Group:\s+(\d+)",
        r"Links: (\d+)",
        r"Device major/minor number: (\S+)",
        r'Fast link dest: "(.*)"',
    )
    found = {}
    for path in PATHS:
        told = ask(disk, f'stat "{path}"')
        facts = [match[1] if (match := re.search(each, told)) else "" for each in wanted]
        content = ask(disk, f'cat "{path}"') if facts[0] == "regular" else ""
        found[path] = (*facts, ask(disk, f'ea_list "{path}"'), content)
    return found


def test_ordinary_user_makes_the_same_files_as_root(place: Path) -> None:
    reference = layout(place / "layout", base, devices, upper)
    users = [0, NOBODY] if os.getuid() == 0 else [os.getuid()]
    made = [make(place, reference, user) for user in users]
    assert [(each.returncode, each.stderr) for each in made] == [(0, "")] * len(users)

    disks = [each.stdout.strip() for each in made]
    for disk in disks:
        checked = subprocess.run([need("e2fsck"), "-f", "-n", disk], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    held = [files(disk) for disk in disks]
    assert held[0] == held[-1]
    mine = held[-1]
    assert mine["/bin/su"][:4] == ("regular", "04755", "0", "0")
    assert mine["/etc/shadow"][:4] == ("regular", "0640", "0", "42")
    assert mine["/home/user/new"][:4] == ("regular", "0644", "1000", "1000")
    assert mine["/name with spaces"][:4] == ("regular", "0604", "7", "8")
    assert mine["/run/pipe"][:4] == ("FIFO", "0620", "5", "6")
    assert (mine["/dev/null"][0], mine["/dev/null"][5]) == ("character", "01:03")
    assert (mine["/dev/disk"][0], mine["/dev/disk"][5]) == ("block", "08:01")
    assert mine["/dangling"][6] == "../../nowhere"
    assert "override_stat" not in "".join(fact for facts in mine.values() for fact in facts)


def test_name_that_debugfs_cannot_be_told_is_refused_where_it_would_be(place: Path) -> None:
    def quoted(layer: LayerArchive) -> None:
        layer.file('a "quoted" name', b"")

    made = make(place, layout(place / "layout", quoted), NOBODY if os.getuid() == 0 else os.getuid())

    assert made.returncode == 1
    assert "whose name debugfs cannot be told; use rootfs='split'" in made.stderr
    assert not list((place).glob("home-*/cache/disks/*.ext4"))
