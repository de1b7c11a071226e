"""Checks of the exercises of notebook 4, "Run a container".

Both look at what is so in the guest, not at how it was written down: the configuration is run with a probe in place of
its program, and the pod's containers are asked from within and disturbed from outside.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved
from kata_lab.oci import SpecError, check_spec

if TYPE_CHECKING:
    from kata_lab.oci import ImageHandle
    from kata_lab.runtime import Container, Sandbox

USER: Final = 1000
LIMIT: Final = 32 << 20
SCRATCH: Final = "/scratch"
NUMBERS: Final = "numbers"
_WAIT: Final = 1.5  #: seconds in which a writer that writes twice a second has written
# One word for each thing that was asked for, on a line of its own.
_PROBE: Final = f"""
echo uid $(id -u)
echo root $(grep ' / ' /proc/mounts | cut -d' ' -f4)
touch {SCRATCH}/probe 2>/dev/null && echo scratch-writable
echo scratch-is $(grep ' {SCRATCH} ' /proc/mounts | cut -d' ' -f3)
echo limit $(cat /sys/fs/cgroup/memory.max)
"""


@checks("04-configuration")
async def check_configuration(
    mine: Mapping[str, Any], original: Mapping[str, Any], image: ImageHandle, sandbox: Sandbox
) -> Feedback:
    """Whether a configuration gives a container what exercise 1 asks for; a container is run of it.

    Args:
        mine: the learner's.
        original: what it was made from.
        image: whose file system the container gets.
        sandbox: where it runs.
    """
    from kata_lab.resource.rootfs import LayeredRoot

    if mine == original:
        return not_yet("the configuration is still the one that you began with: change it, then run both cells.")
    try:
        check_spec(dict(mine))
    except SpecError as error:
        return not_right(f"this is no configuration: {error}.")
    if mine.get("process", {}).get("args") != original["process"]["args"]:
        return not_right("the program is to stay what it was: nothing in process.args is to change.")
    probing = copy.deepcopy(dict(mine))
    probing["process"]["args"] = ["/bin/sh", "-c", _PROBE]
    root = LayeredRoot(image.layers(), image.override_stat, image.overlay_options)
    try:
        container = await sandbox.create_container(probing, root)
    except KataLabError as error:
        return not_right(f"the guest cannot make a container of it: {error}.")
    try:
        process = await container.start()
        _, output, _ = await process.communicate()
    except KataLabError as error:
        return not_right(f"the guest cannot start a container of it: {error}.")
    finally:
        await container.remove()
    return _judged(dict(line.partition(" ")[::2] for line in output.decode().splitlines()))


def _judged(told: Mapping[str, str]) -> Feedback:
    if told.get("uid") != str(USER):
        return not_right(f"`id -u` in the container says {told.get('uid', 'nothing')}: look at process.user.")
    if "ro" not in told.get("root", "").split(","):
        return not_right("the root file system is mounted for reading and writing: look at root and its fields.")
    kind = told.get("scratch-is", "")
    if kind != "tmpfs":
        what = f"a {kind}" if kind else "no mount at all"
        return not_right(f"{SCRATCH} is {what}, not a tmpfs: look at mounts, where /dev/shm is an example of one.")
    if "scratch-writable" not in told:
        return not_right(
            f"{SCRATCH} is a tmpfs, but user {USER} cannot write to it: whose is the directory that a new tmpfs begins "
            "with, and which option says who may write there? /dev/shm has it."
        )
    limit = told.get("limit", "")
    if limit != str(LIMIT):
        return not_right(
            f"the container's memory.max is {limit or 'not there'} and not {LIMIT}: look for memory in linux.resources "
            "of the OCI runtime specification (config-linux.md); it counts bytes."
        )
    return solved("user, root, tmpfs and limit are as asked, seen from within the container.")


@checks("04-pod")
async def check_pod(sandbox: Sandbox, writer: Container | None, reader: Container | None, place: Path) -> Feedback:
    """Whether two containers share a volume as exercise 2 asks for; they are looked into, and the writer is paused.

    Args:
        sandbox: where they are to be.
        writer: the container that writes numbers to ``/out/numbers``.
        reader: the one that sees them as ``/in/numbers``.
        place: the directory of the host that is the volume.
    """
    if writer is None and reader is None:
        return not_yet("there is no container yet: make both, start them, and run both cells.")
    if writer is None or reader is None:
        return not_right(f"the {'writer' if writer is None else 'reader'} is None: both containers are needed.")
    problem = _apart(sandbox, writer, reader)
    if problem:
        return not_right(problem)
    for container, path, name in ((writer, "/out", "writer"), (reader, "/in", "reader")):
        problem = await _sees(container, path, name, place)
        if problem:
            return not_right(problem)
    return await _behaves(writer, reader)


def _apart(sandbox: Sandbox, writer: Container, reader: Container) -> str:
    if writer is reader:
        return "writer and reader are the same container: a pod with a volume to share has two."
    for name, container in (("writer", writer), ("reader", reader)):
        if sandbox.containers.get(getattr(container, "id", "")) is not container:
            return f"the {name} is no container of this sandbox: make it with sandbox.new_container, in the same one."
        if str(container.state) != "running":
            ended = container.process.status
            how = f"with status {ended}: was its program to end?" if ended is not None else "and not running: start it."
            return f"the {name} is {container.state} {how}"
    return ""


async def _sees(container: Container, path: str, name: str, place: Path) -> str:
    """What is wrong with a volume, which must show a file that appears on the host."""
    token = secrets.token_hex(8)
    mark = place / f".{token}"
    mark.write_text(token)
    try:
        told = await _ask(container, f"cat {path}/.{token}")
    finally:
        mark.unlink()
    if told.strip() == token:
        return ""
    return (
        f"a file that was just made in {place} on the host is not to be seen as {path}/… in the {name}: the volume is "
        f"to be at {path} there. A volume is source:where; what does `mount` say in it?"
    )


async def _behaves(writer: Container, reader: Container) -> Feedback:
    before = await _lines(reader)
    await asyncio.sleep(_WAIT)
    after = await _lines(reader)
    if after == 0:
        return not_right(f"/in/{NUMBERS} in the reader is not there or empty: what does the writer write, and where?")
    if after <= before:
        return not_right(f"/in/{NUMBERS} does not grow: the writer has to go on, with at least two lines a second.")
    await writer.pause()
    try:
        still = await _lines(reader)
        await asyncio.sleep(_WAIT)
        if await _lines(reader) > still:
            return not_right(f"/in/{NUMBERS} grows although the writer is paused: somebody else writes to it.")
    finally:
        await writer.resume()
    told = await _ask(reader, "touch /in/probe 2>&1 && rm /in/probe && echo written")
    if "written" in told:
        return not_right("the reader could make a file in its volume: a volume has a third part that forbids it.")
    return solved("two containers, two roots, one directory: what one writes the other reads, and cannot change.")


async def _lines(reader: Container) -> int:
    told = await _ask(reader, f"wc -l </in/{NUMBERS}")
    return int(told) if told.strip().isdecimal() else 0


async def _ask(container: Container, command: str) -> str:
    """What a shell in a container says, to standard output."""
    process = await container.exec({**container.spec["process"], "args": ["/bin/sh", "-c", command], "terminal": False})
    _, output, _ = await process.communicate()
    return output.decode(errors="replace")
