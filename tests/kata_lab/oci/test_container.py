"""Configurations made out of an image and wishes: what is merged how, and which wishes are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kata_lab.oci import ImageHandle, SpecError, agent_spec, make_spec, open_image, parse_size
from kata_lab.oci.writer import ImageWriter, LayerArchive

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a remark
broken line
daemon:x:1:1::/usr/sbin:/bin/false
web:x:33:34:web,,,:/srv/web:/bin/sh
"""
GROUP = b"""root:x:0:
www:x:34:
logs:x:50:web,daemon
tape:x:60:other,web
"""


@pytest.fixture
def image(tmp_path: Path) -> Iterator[ImageHandle]:
    writer = ImageWriter(tmp_path / "layout")
    layer = LayerArchive()
    layer.file("usr/etc/passwd", PASSWD)
    layer.symlink("etc", "/usr/../usr/etc")
    layer.file("usr/etc/group", GROUP)
    run = {
        "Entrypoint": ["/entry"],
        "Cmd": ["default"],
        "Env": ["PATH=/image/bin", "LEVEL=image"],
        "User": "web",
        "WorkingDir": "/srv",
    }
    writer.tag(writer.image([writer.layer(layer.finish())], run), "test")
    with open_image(f"oci:{tmp_path}/layout") as opened:
        yield opened


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[ImageHandle]:
    """An image that says nothing and has nothing."""
    writer = ImageWriter(tmp_path / "bare")
    writer.tag(writer.image([]), "test")
    with open_image(f"oci:{tmp_path}/bare") as opened:
        yield opened


def test_image_says_what_runs_and_as_whom(image: ImageHandle) -> None:
    process = make_spec(image)["process"]

    assert process["args"] == ["/entry", "default"]
    assert process["cwd"] == "/srv"
    assert process["env"] == ["PATH=/image/bin", "LEVEL=image", "HOME=/srv/web"]
    assert process["user"] == {"uid": 33, "gid": 34, "additionalGids": [50, 60]}
    assert process["terminal"] is False


def test_wishes_come_before_the_image(image: ImageHandle) -> None:
    spec = make_spec(
        image,
        ["mine"],
        {"LEVEL": "mine", "MORE": "a=b"},
        cwd="/tmp",
        user="0",
        tty=True,
        read_only=True,
        hostname="box",
        annotations={"note": "x"},
    )

    process = spec["process"]
    assert process["args"] == ["/entry", "mine"]
    assert process["env"] == [
        "PATH=/image/bin",
        "HOSTNAME=box",
        "TERM=xterm",
        "LEVEL=mine",
        "MORE=a=b",
        "HOME=/root",
    ]
    assert (process["cwd"], process["terminal"], process["user"]["uid"]) == ("/tmp", True, 0)
    assert (spec["root"]["readonly"], spec["hostname"], spec["annotations"]) == (True, "box", {"note": "x"})


def test_entrypoint_of_the_user_drops_the_images_command(image: ImageHandle) -> None:
    assert make_spec(image, entrypoint=["sh"])["process"]["args"] == ["sh"]
    assert make_spec(image, ["-c", "x"], entrypoint=[])["process"]["args"] == ["-c", "x"]


def test_image_without_a_program_needs_one(bare: ImageHandle) -> None:
    with pytest.raises(SpecError, match="names no program"):
        make_spec(bare)

    spec = make_spec(bare, ["true"])

    assert spec["process"]["cwd"] == "/"
    assert spec["process"]["env"][0].startswith("PATH=/usr/local/sbin:")
    assert spec["process"]["user"] == {"uid": 0, "gid": 0, "additionalGids": []}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("root", (0, 0, [])),
        ("web", (33, 34, [50, 60])),
        ("33", (33, 34, [50, 60])),
        ("daemon", (1, 1, [50])),
        ("4711", (4711, 0, [])),
        ("web:0", (33, 0, [])),
        ("web:tape", (33, 60, [])),
        ("4711:4712", (4711, 4712, [])),
        ("4294967294:4294967294", (4294967294, 4294967294, [])),
    ],
)
def test_users_are_those_of_the_image(image: ImageHandle, wanted: str, expected: tuple[int, int, list[int]]) -> None:
    user = make_spec(image, user=wanted)["process"]["user"]

    assert (user["uid"], user["gid"], user["additionalGids"]) == expected


@pytest.mark.parametrize(
    ("wishes", "complaint"),
    [
        ({"user": "wep"}, "no user 'wep' in the image's /etc/passwd: did you mean 'web'"),
        ({"user": "web:tap"}, "no group 'tap' in the image's /etc/group: did you mean 'tape'"),
        ({"user": "4294967295"}, "too large: it must be from 0 to 4294967294"),
        ({"user": ":5"}, "is no user"),
        ({"user": "web:"}, "is no user"),
        ({"user": "-1"}, "no user '-1'"),
        ({"env": ["NAME"]}, "'NAME' has no value: it must be NAME=value"),
        ({"cwd": "relative"}, r"\$\.process\.cwd is \"relative\""),
        ({"cap_add": ["SYS_ADMN"]}, "no capability 'SYS_ADMN': did you mean 'CAP_SYS_ADMIN'"),
        ({"tmpfs": ["scratch"]}, "goes to 'scratch': it must be an absolute path"),
        ({"tmpfs": ["/"]}, "goes to '/'"),
        ({"volumes": ["/tmp"]}, "must be source:/where"),
        ({"volumes": ["/tmp:/a:rx"]}, "must be source:/where"),
        ({"volumes": ["/tmp:/a:ro:x"]}, "must be source:/where"),
        ({"volumes": ["data:/a"]}, r"source 'data': it must be a path, such as \./data"),
        ({"volumes": ["/nowhere/at/all:/a"]}, "does not exist"),
        ({"volumes": ["/tmp:/a/../../b"]}, r"without '\.\.'"),
        ({"cpus": 0.0}, "0.0 CPUs cannot be given"),
        ({"cpus": float("nan")}, "nan CPUs cannot be given"),
        ({"memory": "5m"}, "it must be from 6m"),
        ({"memory": "64 monkeys"}, "is none: it must be a whole number of bytes"),
        ({"memory": -1}, "it must be from 6m"),
        ({"pids": -5}, r"\$\.linux\.resources\.pids\.limit is -5"),
        ({"hostname": "no_good"}, r"\$\.hostname"),
    ],
)
def test_wish_that_cannot_be_granted_is_refused(image: ImageHandle, wishes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint) as caught:
        make_spec(image, **wishes)

    assert "\n" not in str(caught.value)


def test_limits_are_numbers_of_the_kernel(image: ImageHandle) -> None:
    resources = make_spec(image, cpus=1.5, memory="64m", pids=50)["linux"]["resources"]

    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert resources["pids"] == {"limit": 50}


def test_mounts_of_the_user_come_last(image: ImageHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)

    mounts = make_spec(image, tmpfs=["/scratch:size=1m"], volumes=["./data:/data", f"{tmp_path}:/all:ro"])["mounts"]

    assert [each["destination"] for each in mounts[:3]] == ["/proc", "/dev", "/dev/pts"]
    assert mounts[-3:] == [
        {
            "destination": "/scratch",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", "noexec", "size=1m"],
        },
        {
            "destination": "/data",
            "type": "bind",
            "source": str(tmp_path / "data"),
            "options": ["rbind", "rprivate", "rw"],
        },
        {"destination": "/all", "type": "bind", "source": str(tmp_path), "options": ["rbind", "rprivate", "ro"]},
    ]


def test_root_holds_capabilities_and_others_do_not(image: ImageHandle) -> None:
    as_root = make_spec(image, user="root", cap_add=["net_admin"], cap_drop=["CAP_MKNOD"])["process"]["capabilities"]
    as_web = make_spec(image)["process"]["capabilities"]

    assert "CAP_NET_ADMIN" in as_root["effective"]
    assert "CAP_MKNOD" not in as_root["bounding"]
    assert as_root["bounding"] == as_root["effective"] == as_root["permitted"]
    assert as_root["inheritable"] == as_root["ambient"] == as_web["effective"] == []
    assert "CAP_CHOWN" in as_web["bounding"]


def test_all_capabilities_are_added_and_dropped(image: ImageHandle) -> None:
    def bounding(**wishes: Any) -> list[str]:
        found: list[str] = make_spec(image, **wishes)["process"]["capabilities"]["bounding"]
        return found

    assert len(bounding(cap_add=["ALL"])) == 41
    assert "CAP_SYS_ADMIN" not in bounding(cap_add=["all"], cap_drop=["SYS_ADMIN"])
    assert bounding(cap_drop=["ALL"]) == []
    assert bounding(cap_drop=["ALL"], cap_add=["KILL"]) == ["CAP_KILL"]


def test_made_configuration_can_be_sent(image: ImageHandle) -> None:
    message = agent_spec(make_spec(image, memory="1g", tty=True))

    assert message["Linux"]["Resources"]["Memory"]["Limit"] == 1 << 30
    assert {"Type": "pid"} in message["Linux"]["Namespaces"]
    assert "/proc/kcore" in message["Linux"]["MaskedPaths"]


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("7", 7), ("512k", 512 << 10), ("64M", 64 << 20), ("1GiB", 1 << 30), ("2 tb", 2 << 40)]
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_size(text) == size
