"""The same bundles run by crun on the host and by us: what their programs see, say and end with must be equal.

The host's crun stands in a mount namespace of its own, with control groups of version 2, which is all it knows.
Both roots are busybox's, for the one machine and the other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kata_lab.errors import KataLabError
from kata_lab.oci import load_spec, open_image, unpack_rootfs
from kata_lab.resource.rootfs import DirectoryRoot
from kata_lab.runtime.container import Container
from tests.kata_lab.runtime.conftest import Guest

CAPABILITIES = ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN"]
HOST = """
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup 2>/dev/null
exec crun --root "$1/state" --cgroup-manager=disabled run --bundle "$1" referee
"""

Change = Callable[[dict[str, Any]], object]


def script(text: str) -> Change:
    return lambda spec: spec["process"].update(args=["sh", "-c", text])


def process(text: str, **more: Any) -> Change:
    return lambda spec: spec["process"].update(args=["sh", "-c", text], **more)


def mounted(text: str, destination: str, *options: str, kind: str = "tmpfs") -> Change:
    def change(spec: dict[str, Any]) -> None:
        script(text)(spec)
        mount = {"destination": destination, "type": kind, "source": kind, "options": list(options)}
        spec["mounts"].append(mount)

    return change


def volume(text: str, *options: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        script(text)(spec)
        mount = {"destination": "/data", "type": "bind", "source": "DATA", "options": ["bind", *options]}
        spec["mounts"].append(mount)

    return change


def section(text: str, **more: Any) -> Change:
    def change(spec: dict[str, Any]) -> None:
        script(text)(spec)
        spec["linux"].update(more)

    return change


def limited(**limits: int) -> list[dict[str, Any]]:
    return [{"type": f"RLIMIT_{name}", "soft": number, "hard": number} for name, number in limits.items()]


STATUS = "grep -E '^({})' /proc/self/status"
ROOT_ONLY = {"user and groups"}  # whoever is not root has one user to give
CASES: dict[str, Change] = {
    "words": lambda spec: spec["process"].update(args=["echo", "a b", "", "$x", "é"]),
    "environment": process("env | sort", env=["PATH=/bin", "B=2 3", "A=", "B=4"]),
    "directory": process("pwd", cwd="/tmp"),
    "directory that is made": process("pwd; ls -ld . | cut -c1-10", cwd="/made/here"),
    "user and groups": process("id -u; id -g; id -G", user={"uid": 33, "gid": 34, "additionalGids": [5, 6]}),
    "status": script("exit 42"),
    "status of a signal": script("sh -c 'kill -9 $$'; echo $?; exit 3"),
    "error output": script("echo out; echo err >&2"),
    "input": script("wc -c; cat"),
    "program that is not there": lambda spec: spec["process"].update(args=["/nosuch"]),
    "program that is none": lambda spec: spec["process"].update(args=["/etc"]),
    "host name": lambda spec: (script("hostname")(spec), spec.update(hostname="me")),
    "read-only root": lambda spec: (script("touch /x; echo $?")(spec), spec["root"].update(readonly=True)),
    "capabilities": process(STATUS.format("CapPrm|CapEff|CapBnd|CapInh|CapAmb")),
    "ambient capabilities": process(
        STATUS.format("CapPrm|CapEff|CapAmb"),
        capabilities=dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), CAPABILITIES),
    ),
    "no capabilities": process(STATUS.format("CapPrm|CapEff|CapBnd"), capabilities={}),
    "no new privileges": process(STATUS.format("NoNewPrivs"), noNewPrivileges=True),
    "limits": process("ulimit -n; ulimit -c; ulimit -s", rlimits=limited(NOFILE=99, CORE=0, STACK=1 << 20)),
    "score of killing": process("cat /proc/self/oom_score_adj", oomScoreAdj=500),
    "first process": script("echo $$; ls -d /proc/[1-9]* | head -1"),
    "tmpfs": mounted("df -k /t | tail -1 | awk '{print $2, $6}'; ls -ld /t | cut -c1-10", "/t", "size=64k", "mode=700"),
    "tmpfs without programs": mounted("cp /bin/busybox /t/echo; /t/echo x; echo $?", "/t", "noexec", "size=4m"),
    "order of mounts": lambda spec: (mounted("", "/t")(spec), mounted("ls /t; ls /t/u | wc -l", "/t/u")(spec)),
    "volume": volume("cat /data/file; cat /data/below/file"),
    "read-only volume": volume("cat /data/file; touch /data/x; echo $?", "ro"),
    "hidden paths": section(
        "cat /proc/mounts > /dev/null; cat /etc/secret; ls /hidden", maskedPaths=["/etc/secret", "/hidden"]
    ),
    "read-only paths": section(
        "touch /etc/x; echo $?; echo 1 > /proc/sys/kernel/ns_last_pid; echo $?", readonlyPaths=["/etc", "/proc/sys"]
    ),
    "kernel settings": section("cat /proc/sys/kernel/shmmni", sysctl={"kernel.shmmni": "99"}),
    "devices": script(
        "ls -l /dev/null /dev/zero /dev/full /dev/tty | awk '{print $1,$5,$6,$10}'; ls /dev/pts /dev/shm"
    ),
    "links of devices": script("for x in fd stdin stdout ptmx; do readlink /dev/$x; done; echo x > /dev/full; echo $?"),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root for each of the two machines, with the same files and other programs."""
    place = tmp_path_factory.mktemp("roots")
    found = {name: place / name for name in ("host", "guest")}
    with open_image("busybox") as image:
        for root in found.values():
            unpack_rootfs(image, root)
            (root / "hidden").mkdir()
            (root / "hidden/file").write_text("hidden\n")
            (root / "etc/secret").write_text("secret\n")
    own = next((Path(each) for each in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(each)), None)
    if own is None or shutil.which("crun") is None:
        pytest.fail("a referee is not installed: install the Debian packages crun and busybox-static")
    program = next(
        each for each in (found["host"] / "bin/busybox", found["host"] / "usr/bin/busybox") if each.is_file()
    )
    program.unlink()
    shutil.copy(own, program)
    return found


def base() -> dict[str, Any]:
    held = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["true"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"],
            "capabilities": held,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64m"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666"],
            },
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777", "size=64m"]},
        ],
        "linux": {"namespaces": [{"type": each} for each in ("pid", "ipc", "uts", "mount")]},
    }


def bundled(place: Path, root: Path, change: Change) -> Path:
    """A bundle with a fresh copy of a root."""
    bundle = place / root.name
    shutil.copytree(root, bundle / "rootfs", symlinks=True)
    (bundle / "data/below").mkdir(parents=True)
    for path in ("data/file", "data/below/file"):
        (bundle / path).write_text(f"{path}\n")
    spec = base()
    change(spec)
    text = json.dumps(spec).replace('"DATA"', json.dumps(str(bundle / "data")))
    (bundle / "config.json").write_text(text)
    return bundle


def by_crun(bundle: Path, data: bytes) -> tuple[int, bytes, bytes]:
    if os.geteuid() != 0:
        spec = json.loads((bundle / "config.json").read_text())
        spec["linux"]["namespaces"].append({"type": "user"})
        for name, number in (("uidMappings", os.geteuid()), ("gidMappings", os.getegid())):
            spec["linux"][name] = [{"containerID": 0, "hostID": number, "size": 1}]
        (bundle / "config.json").write_text(json.dumps(spec))
    wrapped = ["unshare", "--mount"] if os.geteuid() == 0 else ["env"]
    done = subprocess.run([*wrapped, "sh", "-c", HOST, "sh", str(bundle)], input=data, capture_output=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


async def by_us(guest: Guest, bundle: Path, data: bytes) -> tuple[int, bytes, bytes]:
    container: Container = await guest.sandbox.create_container(load_spec(bundle), DirectoryRoot(bundle / "rootfs"))
    try:
        return await (await container.start()).communicate(data)
    finally:
        await container.remove()


@pytest.mark.parametrize("name", [each for each in CASES if os.geteuid() == 0 or each not in ROOT_ONLY])
def test_a_bundle_does_what_it_does_under_crun(guest: Guest, roots: dict[str, Path], tmp_path: Path, name: str) -> None:
    data = b"some\0input\n"
    expected = by_crun(bundled(tmp_path, roots["host"], CASES[name]), data)

    if name.startswith("program that"):
        assert expected[0] != 0
        with pytest.raises(KataLabError, match=r"nosuch|/etc"):
            guest.wait(by_us(guest, bundled(tmp_path, roots["guest"], CASES[name]), data))
        return
    found = guest.wait(by_us(guest, bundled(tmp_path, roots["guest"], CASES[name]), data))

    assert found == expected
