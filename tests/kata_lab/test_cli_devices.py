"""Devices and images on the command line of ``kata-lab boot``."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata_lab.commands import UsageError
from kata_lab.commands.devices import parse_devices
from tests.kata_lab.cli_process import kata_lab
from vmm.config import (
    BalloonConfig,
    BlockConfig,
    DeviceConfig,
    EntropyConfig,
    FsConfig,
    NetworkConfig,
    PortsConfig,
    VsockConfig,
)
from vmm.errors import ConfigError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file ``disk.img``, a file ``a,b.img`` and a directory ``work``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(512))
    (tmp_path / "a,b.img").write_bytes(bytes(512))
    (tmp_path / "work").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("option", "text", "device"),
    [
        ("disk", "disk.img", BlockConfig(path=Path("disk.img"))),
        ("disk", "a,,b.img,ro", BlockConfig(path=Path("a,b.img"), read_only=True)),
        (
            "disk",
            "disk.img,overlay,serial=root,queues=2,name=root",
            BlockConfig(path=Path("disk.img"), format="overlay", serial="root", queues=2, name="root"),
        ),
        ("share", "docs=work,ro,cache=always", FsConfig(tag="docs", path=Path("work"), read_only=True, cache="always")),
        ("net", "", NetworkConfig()),
        ("net", "passt,tcp=8080:80,udp=53", NetworkConfig(forwards=("tcp 8080:80", "udp 53"))),
        ("net", "tap=tap0,mac=02:00:00:00:00:01", NetworkConfig(backend="tap", tap="tap0", mac="02:00:00:00:00:01")),
        ("net", "tap", NetworkConfig(backend="tap")),
        ("net", "socket=passt.sock", NetworkConfig(backend="socket", socket=Path("passt.sock"))),
        ("vsock", "vm.sock,cid=7", VsockConfig(socket=Path("vm.sock"), cid=7)),
        ("balloon", "", BalloonConfig()),
        ("balloon", "target=64,statistics=5", BalloonConfig(target_mib=64, statistics_seconds=5)),
        ("balloon", "free_page_reporting=off", BalloonConfig(free_page_reporting=False)),
        ("rng", "rate=1024", EntropyConfig(bytes_per_second=1024)),
        ("device", "blk,path=disk.img,read_only=on", BlockConfig(path=Path("disk.img"), read_only=True)),
        ("device", "rng", EntropyConfig()),
    ],
)
def test_an_option_makes_a_device(place: Path, option: str, text: str, device: DeviceConfig) -> None:
    assert parse_devices([(option, text)]) == (device,)


def test_ports_are_one_device_and_others_keep_their_order(place: Path) -> None:
    devices = parse_devices([("rng", ""), ("port", "one=1.sock"), ("disk", "disk.img"), ("port", "two=2.sock")])

    assert [each.KIND for each in devices] == ["rng", "blk", "console"]
    assert devices[2] == PortsConfig(ports={"one": Path("1.sock"), "two": Path("2.sock")})


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("disk", "", "must begin with a path"),
        ("disk", "absent.img", "there is no file 'absent.img'"),
        ("disk", "work", "'work' is a directory"),
        ("disk", "disk.img,rw", "'rw' is no flag of it, it knows ro and overlay"),
        ("share", "work", "must begin with a tag and a directory"),
        ("share", "docs=absent", "there is no directory 'absent'"),
        ("device", "fs,tag=docs", "it must have the path of a directory"),
        ("port", "agent", "a name and the path of a socket"),
        ("device", "floppy", "must begin with a kind, one of blk,"),
        ("device", "blk,path=disk.img,read_only=maybe", "read_only is 'maybe', it must be on or off"),
        ("balloon", "target=lots", "target_mib is 'lots', it must be a whole number"),
    ],
)
def test_words_that_make_no_device_are_refused_with_an_example(
    place: Path, option: str, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=f"^--{option} '{text}' makes no device: .*{message}.*, as in --{option} "):
        parse_devices([(option, text)])


def test_a_port_of_the_same_name_is_refused() -> None:
    with pytest.raises(UsageError, match="there is a port 'a' already"):
        parse_devices([("port", "a=1.sock"), ("port", "a=2.sock")])


def test_a_share_of_the_same_tag_is_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="there is a tag 'docs' already"):
        parse_devices([("share", f"docs={place}"), ("device", f"fs,tag=docs,path={place}")])


def test_a_field_that_a_device_does_not_have_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="a blk device has no field 'serail': did you mean 'serial'"):
        parse_devices([("disk", "disk.img,serail=x")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--disk", "absent.img"], b"there is no file 'absent.img'"),
        (["--net", "tcp=0"], b"net forward 'tcp 0' must look like 'tcp 8080:80'"),
        (["--image", "lifse"], b"there is no image 'lifse': did you mean 'lifsea'?"),
        (["--image", "lifsea", "--kernel", "Image"], b"--image lifsea brings its kernel"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_status_2(arguments: list[str], message: bytes) -> None:
    done = kata_lab("boot", *arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_an_image_boots_with_a_device() -> None:
    done = kata_lab("boot", "--image", "lifsea", "--rng", "--run", "head -c 999 /dev/hwrng | wc -c; exit 4")

    assert done.returncode == 4
    assert b"\n999\r\n" in done.stdout


def test_what_is_typed_reaches_the_shell_of_an_image() -> None:
    done = kata_lab("boot", "--image", "lifsea", typed=b"echo $((6 * 7))\npoweroff\n")

    assert done.returncode == 0
    assert b"\n42\r\n" in done.stdout
