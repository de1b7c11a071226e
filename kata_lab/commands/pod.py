"""``kata-lab pod apply``, ``get`` and ``delete``: containers that share a sandbox, as a YAML file describes them.

A pod's sandbox is ``pod-NAME`` and its containers are called ``NAME-CONTAINER``. A pod that exists is not changed:
applying it again is refused, since a sandbox's size and shares are those of its start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kata_lab.commands import UsageError
from kata_lab.commands.manage import end, status_of
from kata_lab.errors import KataLabError
from kata_lab.paths import state_directory
from kata_lab.shim.launch import StartingShim
from kata_lab.shim.records import (
    ContainerDirectory,
    ContainerRecord,
    RecordError,
    ShimDirectory,
    list_containers,
    new_container,
)

if TYPE_CHECKING:
    from kata_lab.shim.manifest import Pod, Volume


def apply(options: argparse.Namespace) -> int:
    """Run the pods of a file."""
    for pod in _read(options.file):
        if _containers(pod.name):
            raise RecordError(f"there is a pod {pod.name} already: kata-lab pod delete {pod.name} removes it")
        _start(pod)
        print(f"pod/{pod.name} started")
    return 0


def get(options: argparse.Namespace) -> int:
    """List pods."""
    names = options.names or sorted({each.pod for each in list_containers() if each.pod})
    found = []
    for name in names:
        containers = _containers(name)
        if not containers:
            raise RecordError(f"there is no pod {name!r}: kata-lab pod get lists those that there are")
        found.append({"name": name, "phase": _phase(containers), "containers": [_plain(each) for each in containers]})
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for pod in found:
        print(f"{pod['name']}: {pod['phase']}")
        for record in _containers(pod["name"]):
            again = f", started again {record.restarts} times" if record.restarts else ""
            print(f"  {record.name}  {record.image}  {status_of(record)}{again}")
    return 0


def delete(options: argparse.Namespace) -> int:
    """End pods and remove them."""
    names = [*options.names, *([pod.name for pod in _read(options.file)] if options.file else [])]
    if not names:
        raise UsageError("no pod is named: give names, or a file with -f")
    for name in names:
        containers = _containers(name)
        if not containers:
            raise RecordError(f"there is no pod {name!r}: kata-lab pod get lists those that there are")
        _remove(name, containers, options.time)
        print(f"pod/{name} removed")
    return 0


def _read(file: str) -> list[Pod]:
    from kata_lab.shim.manifest import parse_manifest

    if file == "-":
        return parse_manifest(sys.stdin.read(), "standard input")
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{file} cannot be read: {reason}") from error
    return parse_manifest(text, file)


def _containers(name: str) -> list[ContainerRecord]:
    return [each for each in reversed(list_containers()) if each.pod == name]


def _phase(containers: list[ContainerRecord]) -> str:
    """As Kubernetes names it."""
    if any(each.state in ("creating", "created") for each in containers):
        return "Pending"
    if any(each.live for each in containers):
        return "Running"
    return "Succeeded" if all(each.status == 0 for each in containers) else "Failed"


def _plain(record: ContainerRecord) -> dict[str, Any]:
    return {
        name: getattr(record, name)
        for name in ("id", "name", "image", "state", "status", "restarts", "reason", "out_of_memory")
    }


def _start(pod: Pod) -> None:
    sandbox = f"pod-{pod.name}"
    shim = ShimDirectory(sandbox)
    if shim.owner() is not None:
        raise RecordError(f"the sandbox {sandbox} still runs: wait until it has ended")
    with contextlib.ExitStack() as hold, contextlib.ExitStack() as undo:
        place = _volumes_directory(pod.name)
        shutil.rmtree(place, ignore_errors=True)
        undo.callback(shutil.rmtree, place, ignore_errors=True)
        volumes = {each.name: _volume(each, place) for each in pod.volumes}
        made = []
        for each in pod.containers:
            wishes = {**each.wishes, "hostname": pod.hostname}
            wishes["volumes"] = [
                f"{volumes[mount.volume]}:{mount.place}:{'ro' if mount.read_only else 'rw'}" for mount in each.mounts
            ]
            request = {
                "image": each.image,
                "args": list(each.args),
                "env": list(each.env),
                "wishes": wishes,
                "restart": pod.restart,
            }
            record = ContainerRecord(
                id="",
                name=f"{pod.name}-{each.name}",
                sandbox=sandbox,
                pod=pod.name,
                image=each.image,
                command=[*each.wishes.get("entrypoint", ()), *each.args],
                request=request,
                terminal=bool(each.wishes.get("tty")),
                stdin=each.stdin,
            )
            directory = new_container(record)
            undo.callback(directory.remove)
            hold.enter_context(directory.locked())
            made.append(directory)
        with StartingShim(sandbox, [each.id for each in made]) as starting:
            starting.wait()
        _start_all(sandbox, made)
        undo.pop_all()


def _start_all(sandbox: str, made: list[ContainerDirectory]) -> None:
    import asyncio

    async def start() -> None:
        from kata_lab.shim.client import ShimClient

        async with ShimClient.connect(sandbox) as client:
            for each in made:
                await client.task("Start", id=each.id)

    asyncio.run(start())


def _volume(volume: Volume, place: Path) -> Path:
    if volume.path is None:
        place.mkdir(parents=True, mode=0o700, exist_ok=True)
        own = place / volume.name
        own.mkdir()
        # Whoever a container runs as may write there, as in Kubernetes.
        own.chmod(0o777)
        return own
    if volume.kind == "DirectoryOrCreate":
        volume.path.mkdir(parents=True, exist_ok=True)
    if not volume.path.exists():
        raise KataLabError(f"the volume {volume.name} has the path {volume.path}, which does not exist: make it first")
    wrong = (volume.kind == "File" and not volume.path.is_file()) or (
        volume.kind.startswith("Directory") and not volume.path.is_dir()
    )
    if wrong:
        raise KataLabError(f"the volume {volume.name} has the path {volume.path}, which is no {volume.kind.lower()}")
    return volume.path


def _volumes_directory(pod: str) -> Path:
    return state_directory() / "volumes" / pod


def _remove(name: str, containers: list[ContainerRecord], patience: float) -> None:
    from kata_lab.commands.run import wait_for_end

    for record in containers:
        with contextlib.suppress(RecordError):
            directory = ContainerDirectory(record.id)
            with directory.locked():
                end(directory, patience)
    for sandbox in {each.sandbox for each in containers}:
        shim = ShimDirectory(sandbox)
        wait_for_end(shim)
        shim.remove()
    for record in containers:
        ContainerDirectory(record.id).remove()
    shutil.rmtree(_volumes_directory(name), ignore_errors=True)
