"""What the guest's MicroPython makes of the agent's files and of the interface that is made for it, under qemu-user."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kata_lab.image.build import build_named
from kata_lab.image.guest_files import agent_files
from kata_lab.protocol import proto, wire

INTERFACE = proto.load("agent.proto", "health.proto", "ttrpc.proto")
REQUEST = {
    "container_id": "c1",
    "OCI": {"Process": {"Args": ["a", "ä"]}, "Linux": {"Sysctl": {"a.b": "c"}, "Resources": {"CPU": {"Quota": -1}}}},
    "storages": [{"driver": "blk", "options": ["ro"]}],
}


def _members(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Name, mode and content of each member of a newc archive (Documentation/…/initramfs-buffer-format.rst)."""
    at = 0
    while archive[at : at + 6] == b"070701":
        fields = [int(archive[at + 6 + 8 * each : at + 14 + 8 * each], 16) for each in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = at + 110
        name = archive[start : start + name_size - 1].decode()
        content = start + name_size + (-(110 + name_size)) % 4
        yield name, mode, archive[content : content + size]
        at = content + size + -size % 4


@pytest.fixture(scope="module")
def micropython(tmp_path_factory: pytest.TempPathFactory, program: Callable[[str], str]) -> Callable[[str], str]:
    """Runs a script in the guest's MicroPython, with the agent's files; what it prints."""
    root = tmp_path_factory.mktemp("root")
    initramfs = build_named("lifsea", progress="off").root
    assert initramfs is not None
    for name, mode, content in _members(Path(initramfs).read_bytes()):
        path = root / name.lstrip("/")
        if not name.startswith(("usr/lib/riscv64-linux-gnu", "usr/lib/ld-", "usr/bin/micropython", "usr/lib/kata-lab")):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode >> 12 == 0o12:
            path.symlink_to(content.decode())
        elif mode >> 12 == 0o10:
            path.write_bytes(content)
            path.chmod(0o755)
    (root / "lib").symlink_to("usr/lib")
    emulator = program("qemu-riscv64-static")

    def run(script: str) -> str:
        text = f"import sys\nsys.path.insert(0, {str(root / 'usr/lib/kata-lab')!r})\n{script}"
        command = [emulator, "-L", str(root), str(root / "usr/bin/micropython"), "-c", text]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stderr + ended.stdout
        return ended.stdout

    return run


def test_every_module_of_the_agent_can_be_imported(micropython: Callable[[str], str]) -> None:
    names = {Path(path).stem for path in agent_files()} - {"agent", "devices"}
    assert micropython(f"import {', '.join(sorted(names))}\nprint('imported')").endswith("imported\n")


def test_the_interface_is_the_one_of_the_files(micropython: Callable[[str], str]) -> None:
    said = micropython(
        f"from interface import MESSAGES, METHODS\n"
        f"print([MESSAGES[each] == fields for each, fields in {INTERFACE.messages!r}.items()].count(False))\n"
        "print(METHODS['grpc.AgentService/WaitProcess'], METHODS['grpc.Health/Check'])\n"
        "try:\n    MESSAGES['grpc.Nothing']\nexcept KeyError:\n    print('unknown')"
    )
    assert said.splitlines() == [
        "0",
        "('grpc.WaitProcessRequest', 'grpc.WaitProcessResponse') ('grpc.CheckRequest', 'grpc.HealthCheckResponse')",
        "unknown",
    ]


def test_messages_mean_the_same_on_both_sides(micropython: Callable[[str], str]) -> None:
    name = "grpc.CreateContainerRequest"
    there = wire.encode(INTERFACE.messages, name, REQUEST)
    said = micropython(
        f"from interface import MESSAGES\nimport wire\n"
        f"message = wire.decode(MESSAGES, {name!r}, {there!r})\n"
        f"print(wire.encode(MESSAGES, {name!r}, message) == {there!r})\n"
        "print(message['OCI']['Linux']['Sysctl'], message['OCI']['Process']['Args'][1] == '\\xe4')"
    )
    assert said.splitlines() == ["True", "{'a.b': 'c'} True"]


def test_every_method_that_is_served_is_in_the_interface(micropython: Callable[[str], str]) -> None:
    said = micropython(
        "from interface import METHODS\nfrom sandbox import Sandbox\n"
        "names = Sandbox().handlers()\nprint(len([METHODS[name] for name in names]))"
    )
    assert int(said) >= 31


def test_a_stream_that_is_closed_wakes_who_waits(micropython: Callable[[str], str]) -> None:
    said = micropython(
        """
import asyncio, linux, streams
streams.begin()
done = asyncio.Event()
async def reader(stream, name):
    print(name, await stream.read(bytearray(4), 4))
    done.set()
async def main():
    ours, theirs = streams.pipe()
    tasks = [asyncio.create_task(reader(ours, name)) for name in "ab"]
    late = asyncio.create_task(reader(ours, "cancelled"))
    await asyncio.sleep(0.01)
    late.cancel()
    linux.write(theirs, b"xy", 2)
    await done.wait()
    ours.close()
    for task in tasks:
        await task
    again, end = streams.pipe()
    linux.close(end)
    print(await again.read(bytearray(4), 4), len(streams._poller.map))
asyncio.run(main())
"""
    )
    lines = said.splitlines()
    assert sorted(lines[:2]) in (["a 0", "b 2"], ["a 2", "b 0"])
    assert lines[2:] == ["0 0"]
