"""``kata-lab create``, ``run``, ``start``, ``exec`` and ``attach``.

Exit status: that of the container's process, 128 + n after signal n, 255 if its end was not seen; 125 for a failure of
kata-lab itself, 126 for a program that cannot be executed, 127 for one that does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.commands import UsageError
from kata_lab.errors import KataLabError
from kata_lab.shim.launch import StartingShim
from kata_lab.shim.records import (
    UNKNOWN_STATUS,
    ContainerDirectory,
    ContainerRecord,
    RecordError,
    ShimDirectory,
    find_container,
    list_containers,
    new_container,
    others_in,
)

if TYPE_CHECKING:
    from kata_lab.commands.session import Wanted

OWN_FAILURE: Final = 125
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
SHIM_END_SECONDS: Final = 10.0  #: that a shim may take to clear away

# As crun and execve(2) say it.
_NOT_FOUND = re.compile(r"not found in|executable file .* not found|exec\w*\b.*no such file or directory", re.I)
_NOT_EXECUTABLE = re.compile(r"is not executable|exec\w*\b.*(permission denied|format error|is a directory)", re.I)

_PUBLISHED = re.compile(r"(\d{1,5})(?::(\d{1,5}))?")


def carry_out(action: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command of this module; its failures are statuses of their own."""
    try:
        return action(options)
    except UsageError:
        raise
    except KataLabError as error:
        print(f"kata-lab: {error}", file=sys.stderr)
        return failure_status(str(error))


def failure_status(message: str) -> int:
    """What a command exits with whose container could not be started, by what was said."""
    if _NOT_EXECUTABLE.search(message):
        return NOT_EXECUTABLE
    return NOT_FOUND if _NOT_FOUND.search(message) else OWN_FAILURE


def create(options: argparse.Namespace) -> int:
    """Create a container, which waits to be started."""
    directory = new_container(_record(options))
    with directory.locked(), _removed_unless_done(directory):
        _bring_up(directory)
        print(directory.id)
    return 0


def run(options: argparse.Namespace) -> int:
    """Create a container, start it, and stay with it unless it is detached."""
    if not options.detach:
        _refuse_without_terminal(options)
    directory = new_container(_record(options))
    with contextlib.ExitStack() as hold:
        hold.enter_context(directory.locked())
        with _removed_unless_done(directory):
            _bring_up(directory)
            record = directory.read()
            if options.detach:
                _start_detached(record)
                print(directory.id)
                return 0
            return _stay(record, _Start(hold.pop_all()), stdin=options.interactive, owned=True)


def start(options: argparse.Namespace) -> int:
    """Start containers that were created or have stopped."""
    if options.attach and len(options.names) > 1:
        raise UsageError("start -a takes one container, since there is one terminal")
    for name in options.names:
        directory = find_container(name)
        with contextlib.ExitStack() as hold:
            hold.enter_context(directory.locked())
            record = directory.read()
            if record.state == "paused":
                raise RecordError(f"container {record.name} is paused: kata-lab resume lets it run")
            if record.state == "stopped":
                _bring_up(directory)
                record = directory.read()
            begin = _Start(hold.pop_all()) if record.state == "created" else None
            if options.attach:
                return _stay(record, begin, stdin=options.interactive)
            if begin is not None:
                with begin.hold:
                    _start_detached(record)
        print(name)
    return 0


def attach(options: argparse.Namespace) -> int:
    """Connect to the first process of a container that runs."""
    record = find_container(options.name).read()
    if record.state not in ("running", "paused", "created"):
        raise RecordError(f"container {record.name} is {record.state}: to be attached to it must run")
    return _stay(record, None, stdin=record.stdin and not options.no_stdin)


def exec_in(options: argparse.Namespace) -> int:
    """Run one more process in a container that runs."""
    import asyncio

    if not options.detach:
        _refuse_without_terminal(options)
    record = find_container(options.name).read()
    if record.state != "running":
        raise RecordError(f"container {record.name} is {record.state}: to be entered it must be running")
    wish = {
        "args": [options.program, *options.arguments],
        "env": [_variable(each) for each in options.env],
        "user": options.user,
        "cwd": options.workdir,
        "tty": options.tty,
    }
    exec_id = f"exec-{secrets.token_hex(6)}"
    return asyncio.run(_exec(record, exec_id, wish, options))


async def _exec(record: ContainerRecord, exec_id: str, wish: dict[str, Any], options: argparse.Namespace) -> int:
    from kata_lab.commands.session import Wanted
    from kata_lab.shim.client import ShimClient

    async with ShimClient.connect(record.sandbox) as client:
        ids = {"id": record.id, "exec_id": exec_id}
        await client.exec(record.id, exec_id, wish)

        async def begin() -> None:
            await client.task("Start", **ids)

        try:
            if not options.detach:
                ends_input = options.interactive or not options.tty
                wanted = Wanted(record.id, exec_id, options.interactive, ends_input, options.tty, owned=True)
                return await _attended(client, wanted, begin)
            await begin()
            await client.task("CloseIO", **ids, stdin=True)
        except KataLabError:
            with contextlib.suppress(KataLabError):
                await client.task("Delete", **ids)
            raise
    return 0


class _Start:
    """Starts the container of an attached session, and then lets other commands at it."""

    def __init__(self, hold: contextlib.ExitStack) -> None:
        self.hold = hold


def _stay(record: ContainerRecord, begin: _Start | None, stdin: bool, owned: bool = False) -> int:
    """Attach to the first process, after which it is begun, and stay until its end."""
    import asyncio

    async def stay() -> int:
        from kata_lab.commands.session import Wanted
        from kata_lab.shim.client import ShimClient

        async with ShimClient.connect(record.sandbox) as client:

            async def start() -> None:
                assert begin is not None
                await client.task("Start", id=record.id)
                begin.hold.close()

            connected = stdin and record.stdin
            wanted = Wanted(record.id, "", connected, connected, record.terminal, owned)
            status = await _attended(client, wanted, None if begin is None else start)
            if record.auto_remove and not ContainerDirectory(record.id).path.exists() and record.sandbox == record.id:
                await client.closed(SHIM_END_SECONDS)
            return status

    try:
        return asyncio.run(stay())
    finally:
        if begin is not None:
            begin.hold.close()


async def _attended(client: Any, wanted: Wanted, begin: Callable[[], Any] | None) -> int:
    from kata_lab.commands.session import Detached, Session
    from kata_lab.ttrpc import RpcError, StatusCode

    began = begin is None

    async def start() -> None:
        nonlocal began
        assert begin is not None
        await begin()
        began = True

    try:
        status = await Session(client, wanted).run(None if begin is None else start)
    except RpcError as error:
        if not began or error.code is not StatusCode.UNAVAILABLE:
            raise
        print(f"kata-lab: the sandbox of container {wanted.container_id} is gone", file=sys.stderr)
        return UNKNOWN_STATUS
    return 0 if isinstance(status, Detached) else status


def _start_detached(record: ContainerRecord) -> None:
    import asyncio

    async def begin() -> None:
        from kata_lab.shim.client import ShimClient

        async with ShimClient.connect(record.sandbox) as client:
            await client.task("Start", id=record.id)

    asyncio.run(begin())


@contextlib.contextmanager
def _removed_unless_done(directory: ContainerDirectory) -> Iterator[None]:
    """A container that could not be made, or not be started, is nothing to keep; nor is what came of its sandbox."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(KataLabError):
            record = directory.read()
            if record.started:
                raise
            from kata_lab.commands.manage import remove

            remove(directory, force=True)
        directory.remove()
        raise


def _bring_up(directory: ContainerDirectory) -> None:
    """Have a container created: in a sandbox of its own, which is started, or in the one that it shares."""
    record = directory.read()
    shared = ShimDirectory(record.sandbox)
    if record.sandbox != record.id or others_in(record):
        if shared.owner() is None:
            raise RecordError(f"the sandbox {record.sandbox} that container {record.name} shares does not run")
        _create_in(record)
        return
    wait_for_end(shared)
    with StartingShim(record.sandbox, [record.id]) as starting:
        # While the guest boots.
        importlib.import_module("kata_lab.commands.session")
        starting.wait()


def _create_in(record: ContainerRecord) -> None:
    import asyncio

    async def create_there() -> None:
        from kata_lab.shim.client import ShimClient

        async with ShimClient.connect(record.sandbox) as client:
            await client.lab("Create", id=record.id)

    asyncio.run(create_there())


def wait_for_end(shim: ShimDirectory) -> None:
    """Wait for a shim that is clearing away.

    Raises:
        RecordError: it does not end.
    """
    deadline = time.monotonic() + SHIM_END_SECONDS
    while (owner := shim.owner()) is not None:
        if time.monotonic() > deadline:
            raise RecordError(f"the process {owner.pid} of sandbox {shim.id} should end and does not: kill it")
        time.sleep(0.01)


def _refuse_without_terminal(options: argparse.Namespace) -> None:
    if options.tty and options.interactive:
        from kata_lab.commands.session import refuse_without_terminal

        refuse_without_terminal(options.tty, options.interactive)


def _network(options: argparse.Namespace) -> dict[str, Any] | None:
    """The sandbox's network, as plain data of a NetworkConfig."""
    if options.network == "none" and options.publish:
        raise UsageError("ports cannot be published without a network: leave --network none out, or -p")
    if options.network != "passt" and not options.publish:
        return None
    if options.pod:
        raise UsageError("a pod's network is its first container's: leave --network and -p out with --pod")
    return {"backend": "passt", "forwards": [_forward(each) for each in options.publish]}


def _room(options: argparse.Namespace) -> dict[str, int]:
    """What the sandbox can have while it runs, as fields of a SandboxConfig."""
    if options.pod and (options.max_cpus is not None or options.max_memory is not None):
        raise UsageError("a pod's sandbox runs already: leave --max-cpus and --max-memory out with --pod")
    room = {}
    if options.max_cpus is not None:
        room["max_vcpus"] = options.max_cpus
    if options.max_memory is not None:
        from kata_lab.oci import parse_size

        room["max_memory_mib"] = parse_size(options.max_memory) >> 20
    return room


def _forward(text: str) -> str:
    ports, _, protocol = text.partition("/")
    found = _PUBLISHED.fullmatch(ports)
    if (
        found is None
        or protocol not in ("", "tcp", "udp")
        or not all(0 < int(each) < 65536 for each in found.groups("1"))
    ):
        raise UsageError(f"-p {text!r} must look like 8080:80 or 5353:53/udp, with ports from 1 to 65535")
    return f"{protocol or 'tcp'} {ports}"


def _record(options: argparse.Namespace) -> ContainerRecord:
    """What a container is to be, by the command line."""
    request: dict[str, Any] = {"env": [_variable(each) for each in options.env]}
    words = [*([options.image] if options.image else []), *options.command]
    wishes: dict[str, Any] = {
        name: value
        for name, value in {
            "tty": options.tty,
            "user": options.user,
            "cwd": options.workdir,
            "read_only": options.read_only,
            "tmpfs": options.tmpfs,
            "volumes": [_volume(each) for each in options.volume],
            "cpus": options.cpus,
            "memory": options.memory,
            "hostname": options.hostname,
            "cap_add": options.cap_add,
            "cap_drop": options.cap_drop,
        }.items()
        if value not in (None, "", [], False)
    }
    if options.entrypoint is not None:
        wishes["entrypoint"] = [options.entrypoint] if options.entrypoint else []
    if options.bundle:
        if words or wishes or request["env"]:
            raise UsageError("a bundle says everything itself: with --bundle there is no command and no such option")
        request["bundle"] = image = os.path.abspath(options.bundle)
    elif options.rootfs:
        request["rootfs"] = image = os.path.abspath(options.rootfs)
    else:
        if not words:
            raise UsageError("an image must be named, or --rootfs or --bundle given")
        image, *words = words
        request["image"] = _image(image)
    request["args"], request["wishes"] = words, wishes
    if (network := _network(options)) is not None:
        request["network"] = network
    if room := _room(options):
        request["room"] = room
    sandbox, pod = _shared_sandbox(options.pod) if options.pod else ("", "")
    return ContainerRecord(
        id="",
        name=options.name,
        sandbox=sandbox,
        pod=pod,
        image=image,
        command=words,
        request=request,
        auto_remove=getattr(options, "rm", False),
        terminal=options.tty,
        stdin=options.interactive,
    )


def _shared_sandbox(name: str) -> tuple[str, str]:
    """The sandbox that runs and is called so: by a pod's name, or by one of its containers."""
    for record in list_containers():
        if record.live and name == record.pod:
            return record.sandbox, record.pod
    record = find_container(name).read()
    if not record.live:
        raise RecordError(f"container {record.name} has stopped, and its sandbox with it: start it first")
    return record.sandbox, record.pod


def _variable(text: str) -> str:
    """``NAME=value``; a name alone has the value that it has here."""
    if "=" in text or not text:
        return text
    if text not in os.environ:
        raise UsageError(f"the environment has no variable {text}: give it a value, as in -e {text}=value")
    return f"{text}={os.environ[text]}"


def _volume(text: str) -> str:
    """With an absolute source, since the shim is somewhere else."""
    source, colon, rest = text.partition(":")
    if not source.startswith((".", "~", "/")):
        return text
    return os.path.abspath(Path(source).expanduser()) + colon + rest


def _image(reference: str) -> str:
    """With an absolute path, if it names one."""
    transport, colon, rest = reference.partition(":")
    if colon and transport in ("oci", "oci-archive", "docker-archive"):
        return f"{transport}:{os.path.abspath(rest)}"
    return os.path.abspath(reference) if reference.startswith(("./", "../", "/")) else reference
