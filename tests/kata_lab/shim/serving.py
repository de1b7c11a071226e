"""A shim in the test's own process, with a fake sandbox, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from kata_lab.shim.__main__ import Readiness, serve
from kata_lab.shim.client import ShimClient
from kata_lab.shim.records import ContainerDirectory, ContainerRecord, new_container
from kata_lab.shim.shim import Shim
from kata_lab.ttrpc.client import ClientStream
from tests.kata_lab.shim.fake import FakeSandbox

SECONDS = 30.0


def bounded(test: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
    """Run an asynchronous test, for so long at most."""
    asyncio.run(asyncio.wait_for(test(*arguments), SECONDS))


def recorded(root: Path, *args: str, sandbox: str = "", **more: Any) -> ContainerDirectory:
    """The record of a container to be."""
    request = {"rootfs": str(root), "args": list(args), "restart": more.pop("restart", "never")}
    request["wishes"] = more.pop("wishes", {})
    return new_container(ContainerRecord(id="", name="", sandbox=sandbox, request=request, **more))


class Serving:
    """A shim that serves."""

    def __init__(self, sandbox_id: str) -> None:
        self.id = sandbox_id
        self.shim: Shim | None = None
        self.sandboxes: list[FakeSandbox] = []

    def make(self, sandbox_id: str, stay: bool) -> Shim:
        def sandbox(config: Any) -> FakeSandbox:
            self.sandboxes.append(FakeSandbox(config))
            return self.sandboxes[-1]

        self.shim = Shim(sandbox_id, sandbox, stay)
        return self.shim

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[ShimClient]:
        async with ShimClient.connect(self.id) as client:
            yield client


@contextlib.asynccontextmanager
async def serving(sandbox_id: str, *containers: ContainerDirectory, stay: bool = False) -> AsyncIterator[Serving]:
    """A shim with these containers; it is told to end if it has not."""
    serves = Serving(sandbox_id)
    ready = _Told()
    task = asyncio.create_task(serve(sandbox_id, [each.id for each in containers], ready, stay, serves.make))
    told = asyncio.create_task(ready.event.wait())
    try:
        await asyncio.wait((task, told), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield serves
    finally:
        told.cancel()
        if serves.shim is not None:
            serves.shim.over.set()
        await task


class _Told(Readiness):
    """Readiness as an event of the test's own loop."""

    def __init__(self) -> None:
        super().__init__(None)
        self.event = asyncio.Event()

    def tell(self, error: str = "") -> bool:
        self.event.set()
        return True


async def output_of(stream: ClientStream) -> tuple[int, bytes, bytes]:
    """What an attached stream shows until its end: status, output, errors."""
    output, errors, status = b"", b"", -1
    async for message in stream:
        output += message["stdout"]
        errors += message["stderr"]
        if message["ended"]:
            status = message["exit_status"]
    return status, output, errors


async def run_alone(container: ContainerDirectory) -> tuple[int, bytes, bytes]:
    """Run a container to its end in a sandbox of its own: status, output, errors."""
    async with (
        serving(container.id, container) as serves,
        serves.client() as client,
        client.attach(container.id) as stream,
    ):
        await client.task("Start", id=container.id)
        return await output_of(stream)


def bundle_of(place: Path, *args: str) -> Path:
    """An OCI bundle, as containerd makes one."""
    (place / "rootfs").mkdir(parents=True)
    process = {"args": list(args), "cwd": "/", "user": {"uid": 0, "gid": 0}}
    spec = {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs"}}
    (place / "config.json").write_text(json.dumps(spec))
    return place


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until it holds."""
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        await asyncio.sleep(0.01)
