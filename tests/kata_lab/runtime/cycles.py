"""What lives of containers and sandboxes leave behind: ``python -m tests.kata_lab.runtime.cycles containers 200``.

Prints what is held before and after, and how much the process has grown; ``sandboxes`` in place of ``containers`` has
each container in a sandbox of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from kata_lab.agent.client import DEBUG_CONSOLE_PORT
from kata_lab.paths import state_directory
from kata_lab.runtime import Sandbox

WARM_UP = 3  # lives, after which caches and threads that are made once are there
MEMORY_MIB = 128  # of a guest
OUTPUT = "hello\n"
CONSOLE = "agent.debug_console"  # on a kernel's command line, for held() to look into the guest
SECONDS = 30.0  # that what is about to end may take
LOOK = (
    "echo processes=$(ls -l /proc/[0-9]*/exe 2>/dev/null | grep -c -- '->') mounts=$(wc -l < /proc/mounts) "
    "groups=$(find /sys/fs/cgroup -type d | wc -l) written=$(ls /run/kata-containers/scratch | wc -l) "
    "files=$(find /run/kata-containers -maxdepth 1 | wc -l) state=$(find /run/crun* 2>/dev/null | wc -l)"
)


@dataclass(frozen=True)
class Held:
    """What this process holds.

    Attributes:
        descriptors: kind → how many; a socket, a pipe, a file by its path.
        threads: by name; those that asyncio keeps for later do not count.
        tasks: of the event loop.
        children: processes.
        mounts: beneath the temporary directory, where the state is; elsewhere others mount.
        files: beneath the state directory.
        guest: how many of what there is in the guest.
    """

    descriptors: Counter[str]
    threads: tuple[str, ...]
    tasks: int
    children: tuple[int, ...]
    mounts: tuple[str, ...]
    files: tuple[str, ...]
    guest: str = ""


async def held(sandbox: Sandbox | None = None) -> Held:
    """What is held when everything that is about to end has."""
    await asyncio.sleep(0.1)
    state = state_directory()
    return Held(
        Counter(map(_kind, os.listdir("/proc/self/fd"))),
        tuple(sorted(each.name for each in threading.enumerate() if not each.name.startswith("asyncio_"))),
        len(asyncio.all_tasks()),
        tuple(sorted(each.pid for each in psutil.Process().children(recursive=True))),
        tuple(sorted(each for each in _mounts() if Path(each).is_relative_to(tempfile.gettempdir()))),
        tuple(sorted(str(each.relative_to(state)) for each in state.rglob("*"))),
        "" if sandbox is None else await _in_guest(sandbox),
    )


def _mounts() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _kind(descriptor: str) -> str:
    try:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return "gone"  # the one that listed them
    return name if name.startswith("/") else re.split(r"[\[ (]", name)[0]


async def _in_guest(sandbox: Sandbox) -> str:
    """How many processes, mounts, control groups, files and descriptors of the agent the guest has."""
    reader, writer = await asyncio.open_connection(sock=await sandbox.hypervisor.dial(DEBUG_CONSOLE_PORT))
    try:
        # The answer must not be in the question, which the terminal shows.
        writer.write(f"{LOOK}; echo 'E''ND'; exit\n".encode())
        # Until its shell has ended, which the next look would count.
        said = (await reader.read()).decode()
    finally:
        writer.close()
        await writer.wait_closed()
    found = re.findall(r"\w+=\d+", said.partition("E''ND")[2])
    assert len(found) == LOOK.count("="), said
    return " ".join(found)


def anonymous_memory() -> int:
    """Bytes of this process that are no guest's: Anonymous of proc(5), smaps, without what is as large as a guest.

    What the allocator keeps for later is given back first (glibc's malloc_trim(3)).
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    total, size = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Size":
            size = int(rest.split()[0]) << 10
        elif name == "Anonymous" and size < MEMORY_MIB << 20:
            total += int(rest.split()[0]) << 10
    return total


async def steady(sandbox: Sandbox | None = None) -> Held:
    """What is held once it has been the same three times in a row, or after :data:`SECONDS`."""
    deadline = time.monotonic() + SECONDS
    found = [await held(sandbox) for _ in range(3)]
    while any(each != found[-1] for each in found[-3:]) and time.monotonic() < deadline:
        found.append(await held(sandbox))
    return found[-1]


async def settled(before: Held, sandbox: Sandbox | None = None) -> Held:
    """What is held once it is as much as ``before``, or after :data:`SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while (after := await held(sandbox)) != before and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return after


async def container_life(sandbox: Sandbox) -> None:
    """Create, run, remove."""
    assert (await sandbox.run(["sh", "-c", "echo hello; echo written > /file"])).output == OUTPUT


async def sandbox_life() -> None:
    """A whole sandbox with a container."""
    async with Sandbox.create(memory_mib=MEMORY_MIB) as sandbox:
        await container_life(sandbox)


async def _main(what: str, count: int) -> int:
    async def lives(number: int, sandbox: Sandbox | None) -> None:
        for _ in range(number):
            await (sandbox_life() if sandbox is None else container_life(sandbox))

    async def measured(sandbox: Sandbox | None) -> int:
        await lives(WARM_UP, sandbox)
        before, memory, began = await steady(sandbox), anonymous_memory(), time.monotonic()
        await lives(count, sandbox)
        seconds, grown, after = time.monotonic() - began, anonymous_memory() - memory, await settled(before, sandbox)
        print(f"{count} {what} in {seconds:.1f} s, {seconds / count * 1000:.0f} ms each; grown by {grown / 1e6:.1f} MB")
        print(before, after, sep="\n")
        return int(before != after)

    if what == "sandboxes":
        return await measured(None)
    async with Sandbox.create(memory_mib=MEMORY_MIB, append=CONSOLE) as sandbox:
        return await measured(sandbox)


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1], int(sys.argv[2]))))
