"""The real lifsea image boots in a micro-VM to its services, which its init starts, watches and ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from kata_lab.image.boot import EXIT_STATUS, append_running
from kata_lab.image.build import SERVICES_MARKER, BuildOptions, build_image, build_named
from kata_lab.image.description import find_description, load_description, parse_description
from kata_lab.image.library import Image, Library
from vmm.actions import EndKind
from vmm.config import VmConfig
from vmm.microvm import MicroVm

SECONDS = 120.0


@pytest.fixture(scope="module")
def lifsea() -> Image:
    return build_named("lifsea", progress="off")


def run(image: Image, command: str) -> str:
    """Boot, run a shell command once the services are up, power off; what the console showed."""
    config = VmConfig(
        kernel=image.kernel,
        initrd=image.root,
        cmdline=append_running(command, image.append),
        memory_mib=192,
        clock="deterministic",
    )
    with MicroVm(config) as vm:
        vm.start()
        assert vm.wait(SECONDS).kind is EndKind.SHUTDOWN, vm.console.text
        return vm.console.text.replace("\r", "")


def test_lifsea_boots_to_its_services_and_shuts_down(lifsea: Image) -> None:
    console = run(lifsea, "pidof syslogd && id -un && crun --version && micropython -c 'print(6 * 7)'")

    assert SERVICES_MARKER in console
    assert "\nroot\n" in console
    assert "\ncrun version" in console
    assert "\n42\n" in console
    assert EXIT_STATUS.findall(console) == ["0"]


def test_module_on_demand_is_loaded_by_whoever_mounts_its_file_system(lifsea: Image) -> None:
    command = "mkdir /tmp/l /tmp/o; mount -t overlay o -o lowerdir=/tmp/l:/usr /tmp/o && ls /tmp/o/bin/crun; lsmod"

    console = run(lifsea, command)

    assert "/tmp/o/bin/crun" in console
    assert "\noverlay " in console
    assert "\next4 " not in console


def test_orphans_are_reaped(lifsea: Image) -> None:
    console = run(lifsea, "(sleep 0.1 & sleep 0.2 &); sleep 1; echo zombies: $(ps -o stat | grep -c Z)")

    assert "\nzombies: 0\n" in console


def test_init_keeps_order_and_restarts_as_described(lifsea: Image, tmp_path: Path) -> None:
    original = load_description(find_description("lifsea"))
    data = copy.deepcopy(original.data)
    data["name"] = "lifsea-restarts"
    note = "echo {} >>/run/order; {}"
    data["services"] = [
        {"name": "last", "command": ["/bin/sh", "-c", note.format("last", "exec sleep 999")], "after": ["once"]},
        {"name": "once", "command": ["/bin/sh", "-c", note.format("once", "exit 0")], "once": True},
        {"name": "flaky", "command": ["/bin/sh", "-c", note.format("flaky", "exit 3")], "restart": "on-failure"},
        {"name": "done", "command": ["/bin/sh", "-c", note.format("done", "exit 0")], "restart": "on-failure"},
    ]
    image = build_image(parse_description(data), BuildOptions(lock=tmp_path / "restarts.lock.json", progress="off"))

    console = run(image, "sleep 1; kill -9 $(pidof sleep); sleep 0.2; cat /run/order")

    Library().remove(image.name)

    order = [line for line in console.splitlines() if line in ("once", "last", "flaky", "done")]
    assert order[0] == "once"
    assert order.count("flaky") > 1
    assert (order.count("once"), order.count("last"), order.count("done")) == (1, 1, 1)
    assert "service last ended with status 137" in console
