"""``kata-lab ps``, ``inspect``, ``logs``, ``stats``, ``pause``, ``resume``, ``kill``, ``stop``, ``rm``, ``update``,
``wait``, ``metrics`` and ``timeline``: containers that exist.

``ps``, ``inspect`` and ``logs`` read what is on disk and ask nobody, so they also tell of containers whose shim died.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from kata_lab.commands import UsageError
from kata_lab.errors import KataLabError
from kata_lab.shim.records import (
    UNKNOWN_STATUS,
    ContainerDirectory,
    ContainerRecord,
    RecordError,
    ShimDirectory,
    find_container,
    list_containers,
    others_in,
)

if TYPE_CHECKING:
    from kata_lab.shim.client import ShimClient

FOLLOW_SECONDS: Final = 0.05  #: between two looks at a log
STATS_SECONDS: Final = 1.0  #: between two measurements
KILL_SECONDS: Final = 10.0  #: that a guest may take to end a process that was killed

_SPANS: Final = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def ps(options: argparse.Namespace) -> int:
    """List containers."""
    records = [each for each in list_containers() if options.all or each.live]
    if options.json:
        _print_json([_plain(each) for each in records])
        return 0
    if options.quiet:
        for record in records:
            print(record.id)
        return 0
    rows = [("CONTAINER ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "POD")]
    now = time.time()
    for record in records:
        command = " ".join(record.command)
        short = command if len(command) <= 24 else command[:23] + "…"
        rows.append(
            (
                record.id,
                record.name,
                record.image,
                short,
                f"{span(now - record.created)} ago",
                status_of(record),
                record.pod,
            )
        )
    _print_table(rows)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Everything that is known of containers, as JSON."""
    found = []
    for name in options.names:
        record = find_container(name).read()
        plain = _plain(record)
        shim = ShimDirectory(record.sandbox)
        owner = shim.owner() if record.live else None
        plain["log"] = str(ContainerDirectory(record.id).log)
        plain["shim"] = None if owner is None else {"pid": owner.pid, "socket": str(shim.socket), "log": str(shim.log)}
        found.append(plain)
    _print_json(found)
    return 0


def logs(options: argparse.Namespace) -> int:
    """What a container wrote."""
    from kata_lab.shim.output_log import LogFollower, Piece

    directory = find_container(options.name)

    def show(piece: Piece) -> None:
        output = sys.stderr if piece.stream == "stderr" else sys.stdout
        if options.timestamps:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(piece.time)) + f".{int(piece.time % 1 * 1e6):06}Z "
            output.buffer.write(b"".join(stamp.encode() + line for line in piece.data.splitlines(keepends=True)))
        else:
            output.buffer.write(piece.data)
        output.buffer.flush()

    if not directory.log.exists():
        return 0
    with LogFollower(directory.log) as follower:
        for piece in follower.begin(options.tail):
            show(piece)
        while options.follow:
            live = _live(directory)
            for piece in follower.read():
                show(piece)
            if not live:
                break
            time.sleep(FOLLOW_SECONDS)
    return 0


def _live(directory: ContainerDirectory) -> bool:
    try:
        return directory.read().live
    except RecordError:
        return False


def wait(options: argparse.Namespace) -> int:
    """Wait for the ends of containers, and print their exit statuses."""
    for name in options.names:
        print(_wait_for(find_container(name)))
        sys.stdout.flush()
    return 0


def _wait_for(directory: ContainerDirectory) -> int:
    record = directory.read()
    if record.live:

        async def ask(client: ShimClient) -> int:
            return int((await client.task("Wait", id=record.id))["exit_status"])

        try:
            return int(_ask(record, ask))
        except KataLabError:
            # It ended as it was asked, or its sandbox did.
            record = directory.read()
    return UNKNOWN_STATUS if record.status is None else record.status


def pause(options: argparse.Namespace) -> int:
    """Freeze containers."""
    return _each_by_task(options.names, "Pause", "paused")


def resume(options: argparse.Namespace) -> int:
    """Let frozen containers run."""
    return _each_by_task(options.names, "Resume", "resumed")


def kill(options: argparse.Namespace) -> int:
    """Send a signal to containers."""
    number = signal_number(options.signal)
    return _each_by_task(options.names, "Kill", "signalled", signal=number)


def _each_by_task(names: Sequence[str], method: str, what: str, **request: Any) -> int:
    for name in names:
        record = find_container(name).read()
        if not record.live:
            raise RecordError(f"container {record.name} has stopped and cannot be {what}: start it first")

        async def ask(client: ShimClient, container_id: str = record.id) -> None:
            await client.task(method, id=container_id, **request)

        _ask(record, ask)
        print(name)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Ask containers to end, and kill them if they do not."""
    for name in options.names:
        directory = find_container(name)
        with directory.locked():
            end(directory, options.time)
        print(name)
    return 0


def end(directory: ContainerDirectory, patience: float, number: int | None = None) -> None:
    """End a container, by its stop signal, and by SIGKILL after ``patience`` seconds; then by ending its shim."""
    record = directory.read()
    if not record.live:
        return

    async def ask(client: ShimClient) -> None:
        from kata_lab.ttrpc import RpcError

        if record.state == "paused":
            await client.task("Resume", id=record.id)
        first = signal_number(record.stop_signal or "TERM") if number is None else number
        for each, seconds in ((first, patience), (signal.SIGKILL, KILL_SECONDS)):
            if each == first == signal.SIGTERM and not patience:
                continue
            # One that has ended cannot be signalled, and the shim may end with it.
            with contextlib.suppress(RpcError):
                await client.task("Kill", KILL_SECONDS, id=record.id, signal=int(each))
                await client.task("Wait", seconds or KILL_SECONDS, id=record.id)
            if not _live(directory):
                return

    with contextlib.suppress(KataLabError):
        _ask(record, ask)
    if _live(directory):
        _kill_shim(record)


def _kill_shim(record: ContainerRecord) -> None:
    owner = ShimDirectory(record.sandbox).owner()
    if owner is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGKILL)
        while owner.alive:
            time.sleep(0.01)


def rm(options: argparse.Namespace) -> int:
    """Remove containers that have stopped, or with force any."""
    for name in options.names:
        try:
            directory = find_container(name)
        except RecordError:
            if options.force:
                continue
            raise
        with contextlib.suppress(_Gone), directory.locked():
            remove(directory, options.force)
        print(name)
    return 0


class _Gone(KataLabError):
    """A container that removed itself meanwhile."""


def remove(directory: ContainerDirectory, force: bool) -> None:
    """Remove a container; the caller holds its lock.

    Raises:
        RecordError: it runs, and there is no force.
    """
    record = directory.read()
    if record.live:
        if not force and record.state != "created":
            raise RecordError(f"container {record.name} is {record.state}: stop it first, or remove it with -f")
        end(directory, KILL_SECONDS, signal.SIGKILL)
    shim = ShimDirectory(record.sandbox)
    if record.sandbox == record.id and not others_in(record):
        from kata_lab.commands.run import wait_for_end

        try:
            wait_for_end(shim)
        except RecordError:
            _kill_shim(record)
    elif shim.owner() is not None:
        with contextlib.suppress(KataLabError):
            _ask(record, lambda client: client.task("Delete", id=record.id))
    directory.remove()
    if shim.owner() is None:
        shim.remove()


def update(options: argparse.Namespace) -> int:
    """Change the limits of containers; those of one that has stopped count when it is started again."""
    resources: dict[str, Any] = {}
    if options.cpus is not None:
        resources["cpu"] = {"quota": round(options.cpus * 100_000), "period": 100_000}
    if options.memory is not None:
        from kata_lab.oci import parse_size

        size = parse_size(options.memory)
        resources["memory"] = {"limit": size, "swap": size}
    if not resources:
        raise UsageError("nothing is to be changed: give --cpus, or --memory")
    for name in options.names:
        directory = find_container(name)
        with directory.locked():
            _update(directory, resources)
        print(name)
    return 0


def _update(directory: ContainerDirectory, resources: dict[str, Any]) -> None:
    record = directory.read()
    if record.live:
        _ask(record, lambda client: client.update(record.id, resources))
        return
    from kata_lab.oci import check_resources
    from kata_lab.shim.request import merged

    check_resources(resources)
    record.request["resources"] = merged(record.request.get("resources", {}), resources)
    directory.write(record)


def stats(options: argparse.Namespace) -> int:
    """What containers use, once or again and again."""
    import asyncio

    before: dict[str, tuple[float, int]] = {}
    # A share of the processor is what is used between two measurements.
    asyncio.run(_measured(options.names, before))
    while True:
        time.sleep(STATS_SECONDS)
        found = asyncio.run(_measured(options.names, before))
        if options.json:
            _print_json(found)
        else:
            if not options.no_stream and sys.stdout.isatty():
                sys.stdout.write("\033[H\033[J")
            rows = [("CONTAINER ID", "NAME", "CPU", "MEMORY", "LIMIT", "PROCESSES")]
            for each in found:
                limit = bytes_text(each["memory_limit"]) if 0 < each["memory_limit"] < 1 << 60 else "-"
                rows.append(
                    (
                        each["id"],
                        each["name"],
                        f"{each['cpu_percent']:.1f} %",
                        bytes_text(each["memory"]),
                        limit,
                        str(each["pids"]),
                    )
                )
            _print_table(rows)
        sys.stdout.flush()
        if options.no_stream or not found:
            return 0


async def _measured(names: Sequence[str], before: dict[str, tuple[float, int]]) -> list[dict[str, Any]]:
    from kata_lab.shim.client import ShimClient

    records = [find_container(name).read() for name in names] or list_containers()
    found = []
    for record in records:
        if record.state not in ("running", "paused"):
            if names:
                raise RecordError(f"container {record.name} is {record.state}: to be measured it must run")
            continue
        try:
            async with ShimClient.connect(record.sandbox) as client:
                measured = await client.stats(record.id)
        except KataLabError:
            if names:
                raise
            continue
        now, used = time.monotonic(), (measured["cpu"] or {}).get("usage_usec", 0)
        at, earlier = before.get(record.id, (now, used))
        before[record.id] = now, used
        memory = measured["memory"] or {}
        found.append(
            {
                "id": record.id,
                "name": record.name,
                "cpu_percent": (used - earlier) / 1e4 / (now - at) if now > at else 0.0,
                "memory": memory.get("usage", 0),
                "memory_limit": memory.get("usage_limit", 0),
                "pids": (measured["pids"] or {}).get("current", 0),
            }
        )
    return found


def metrics(options: argparse.Namespace) -> int:
    """A sandbox's metrics, in Prometheus's text format."""
    record = find_container(options.name).read()
    print(_ask(record, lambda client: client.lab("Metrics"))["text"], end="")
    return 0


def timeline(options: argparse.Namespace) -> int:
    """When what happened as a container's sandbox started."""
    record = find_container(options.name).read()
    steps = _ask(record, lambda client: client.lab("Timeline"))["milestones"]
    if options.json:
        _print_json([{"name": each["name"], "seconds": each["at_us"] / 1e6} for each in steps])
        return 0
    before = 0
    for each in steps:
        print(f"{each['at_us'] / 1000:9.1f} ms  {(each['at_us'] - before) / 1000:+9.1f}  {each['name']}")
        before = each["at_us"]
    return 0


def signal_number(name: str) -> int:
    """Of ``9``, ``KILL`` or ``SIGKILL``.

    Raises:
        UsageError: there is no such signal.
    """
    if name.isdecimal() and 1 <= int(name) <= 64:
        return int(name)
    try:
        return int(signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"])
    except KeyError:
        raise UsageError(f"there is no signal {name!r}: give a name such as TERM, or a number from 1 to 64") from None


def status_of(record: ContainerRecord) -> str:
    """A container's state for a person."""
    now = time.time()
    match record.state:
        case "running" | "paused":
            return f"Up {span(now - record.started)}{' (Paused)' if record.state == 'paused' else ''}"
        case "stopped" if record.finished:
            memory = ", out of memory" if record.out_of_memory else ""
            return f"Exited ({record.status}) {span(now - record.finished)} ago{memory}"
        case "stopped":
            return f"Dead ({record.reason})"
        case state:
            return state.capitalize()


def span(seconds: float) -> str:
    """A length of time for a person, such as "3 minutes"."""
    for length, name in _SPANS:
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {name}{'s' if count > 1 else ''}"
    return "0 seconds"


def bytes_text(count: int) -> str:
    """An amount of memory for a person, such as "1.5 MiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def _ask(record: ContainerRecord, question: Callable[[ShimClient], Awaitable[Any]]) -> Any:
    import asyncio

    async def ask() -> Any:
        from kata_lab.shim.client import ShimClient

        async with ShimClient.connect(record.sandbox) as client:
            return await question(client)

    return asyncio.run(ask())


def _plain(record: ContainerRecord) -> dict[str, Any]:
    plain = asdict(record)
    del plain["creator"]
    return plain


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
