"""The process of one sandbox: ``python -m kata_lab.shim --id SANDBOX [--container ID]... [--ready FD] [--stay]``.

It is started by a command (:mod:`kata_lab.shim.launch`) in a session of its own. To the descriptor of ``--ready`` it
writes lines of JSON: ``{"progress": "a line"}`` for what a person waits for, such as the first build of the guest, and
last, once it serves or cannot, ``{}`` or ``{"error": "one sentence"}``. It ends with the last
container, when it is told to shut down, and at SIGTERM, and takes everything of the sandbox with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TextIO

from kata_lab.errors import KataLabError
from kata_lab.protocol.proto import load
from kata_lab.shim.records import ShimDirectory
from kata_lab.ttrpc.server import Call, Handler, Server

FAREWELL_SECONDS: Final = 10.0  #: that those who are attached have to read the last of the output
ANSWER_SECONDS: Final = 0.01  #: between the end of a call and its answer on its way

_log = logging.getLogger("kata_lab.shim")


class _JsonLines(logging.Formatter):
    """One object per line, with the sandbox's id."""

    def __init__(self, sandbox_id: str) -> None:
        super().__init__()
        self._sandbox = sandbox_id

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "sandbox": self._sandbox,
            "name": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


class Readiness:
    """Tells the starter how far the shim is, and, once, whether it serves.

    Args:
        descriptor: to write to; None if nobody wants to know.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """What is being done, from any thread; nothing once the shim serves."""
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.write(self._descriptor, json.dumps({"progress": line}).encode() + b"\n")

    def tell(self, error: str = "") -> bool:
        """False if the starter has gone."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return True
        try:
            os.write(descriptor, json.dumps({"error": error} if error else {}).encode() + b"\n")
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


class _ProgressLines(io.TextIOBase):
    """Standard error of the shim: whole lines go to its log, and to whoever waits for it."""

    def __init__(self, log: TextIO, readiness: Readiness) -> None:
        self._log = log
        self._readiness = readiness

    def write(self, text: str) -> int:
        self._log.write(text)
        self._log.flush()
        for line in text.splitlines():
            if line.strip():
                self._readiness.say(line)
        return len(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shim; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kata_lab.shim", description="The process of one sandbox.")
    parser.add_argument("--id", required=True, help="the sandbox")
    parser.add_argument("--container", action="append", default=[], help="a container with a record, to create")
    parser.add_argument("--ready", type=int, metavar="FD", help="where to say that it serves")
    parser.add_argument("--stay", action="store_true", help="serve bundles, and do not end with the last container")
    options = parser.parse_args(arguments)
    if options.ready is not None:
        # Whatever else the starter's starter had open, such as the pipe of a job that waits for its end.
        os.closerange(options.ready + 1, os.sysconf("SC_OPEN_MAX"))
    if options.stay:
        # It takes bundles, whose mounts shall end with it.
        from kata_lab.resource.snapshot_mounts import keep_mounts_private

        keep_mounts_private()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(options.id))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    readiness = Readiness(options.ready)
    try:
        with contextlib.redirect_stderr(_ProgressLines(sys.stderr, readiness)):
            asyncio.run(serve(options.id, options.container, readiness, options.stay))
    except (KataLabError, OSError) as error:
        _log.error("%s", error)
        readiness.tell(str(error))
        return 1
    except Exception as error:
        if "vmm" in sys.modules and isinstance(error, sys.modules["vmm.errors"].VmmError):
            _log.error("%s", error)
            readiness.tell(str(error))
            return 1
        _log.exception("a bug")
        readiness.tell(f"the shim failed with {type(error).__name__}: {error}")
        return 1
    return 0


class _Calls:
    """Counts the calls under way, so that their answers are out before the shim ends."""

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()
        self.none.set()

    def counted(self, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        return {name: self._counted(handler) for name, handler in handlers.items()}

    def _counted(self, handler: Handler) -> Handler:
        async def answer(request: dict[str, Any], call: Call) -> dict[str, Any] | None:
            self._count += 1
            self.none.clear()
            try:
                return await handler(request, call)
            finally:
                self._count -= 1
                if not self._count:
                    # The server sends the answer in the same step of the loop, but for a slow reader.
                    asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._look)

        return answer

    def _look(self) -> None:
        if not self._count:
            self.none.set()


async def serve(
    sandbox_id: str,
    container_ids: Sequence[str],
    readiness: Readiness,
    stay: bool = False,
    make_shim: Callable[..., object] | None = None,
) -> None:
    """Start the sandbox, serve until it is over, and clear away.

    Args:
        sandbox_id: its name.
        container_ids: containers with records that it begins with.
        readiness: told once it serves.
        stay: do not end with the last container.
        make_shim: makes the Shim, of the first argument and ``stay``.

    Raises:
        KataLabError or VmmError: the sandbox cannot be started; nothing is left behind.
    """
    from kata_lab.shim.lab_service import SERVICE as LAB
    from kata_lab.shim.lab_service import LabService
    from kata_lab.shim.shim import Shim
    from kata_lab.shim.task_service import SERVICE as TASK
    from kata_lab.shim.task_service import TaskService

    directory = ShimDirectory(sandbox_id)
    directory.make()
    directory.claim()
    shim = (make_shim or Shim)(sandbox_id, stay=stay)
    assert isinstance(shim, Shim)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, shim.over.set)
    server = Server(load("task.proto", "lab.proto"))
    calls = _Calls()
    server.add(TASK, calls.counted(TaskService(shim).handlers))
    server.add(LAB, calls.counted(LabService(shim).handlers))
    try:
        if container_ids:
            starting = asyncio.create_task(shim.start(container_ids))
            ended = asyncio.create_task(shim.over.wait())
            await asyncio.wait((starting, ended), return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                raise KataLabError(f"sandbox {sandbox_id} was told to end before it was ready")
            await starting
        async with server.listen(directory.socket):
            try:
                if readiness.tell():
                    _log.info("serves")
                    await shim.over.wait()
            finally:
                await shim.stop()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(calls.none.wait(), FAREWELL_SECONDS)
                # Whoever is told that the connection has ended finds nothing left.
                directory.remove()
                _log.info("ends")
    except BaseException:
        await shim.stop()
        directory.remove()
        raise


if __name__ == "__main__":
    sys.exit(main())
