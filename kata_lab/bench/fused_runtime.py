"""A runtime in a process of its own, with one sandbox: the side that gives orders (:mod:`.fused_probe` takes them).

So that what the operating system tells of a process, and of those that descend from it, is that of one sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from kata_lab.bench.fused_account import RUNTIME, Memory, Part, parts
from kata_lab.bench.fused_probe import ACTING
from kata_lab.bench.measure import LONGEST_RUN, BenchError

MEMORY_MIB: Final = 256
_END_SECONDS: Final = 60.0  # for a runtime to stop its sandbox
_TAIL: Final = 500


@dataclass(frozen=True, slots=True)
class Ended:
    """A runtime that was killed.

    Attributes:
        notice_ms: until its client, who holds the pipe, knew.
        cleanup_ms: until the last process of its sandbox had ended.
        ends: process → milliseconds until it had ended.
    """

    notice_ms: float
    cleanup_ms: float
    ends: dict[str, float]


class RuntimeProcess:
    """A process with a runtime of one arrangement, and nothing started yet; a context manager.

    Args:
        arrangement: a name of :data:`kata_lab.hypervisor.HYPERVISORS`.
        program: the module that takes the orders, as :mod:`kata_lab.bench.fused_probe` does.
    """

    def __init__(self, arrangement: str, program: str = "kata_lab.bench.fused_probe") -> None:
        self.arrangement = arrangement
        with contextlib.ExitStack() as made:
            # Also of a runtime that is killed nothing is left on disk; the path is short, since sockets are in it.
            place = made.enter_context(tempfile.TemporaryDirectory(prefix="kl-", ignore_cleanup_errors=True))
            self._complaints = made.enter_context((Path(place) / "errors").open("w+b"))
            self.began = time.monotonic()
            self._process = subprocess.Popen(
                [sys.executable, "-m", program, arrangement],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, "XDG_RUNTIME_DIR": place, "TMPDIR": place},
                start_new_session=True,
            )
            self.pid = self._process.pid
            made.callback(self._end)
            self._made = made.pop_all()

    def start(self) -> dict[str, Any]:
        """Start a sandbox, in place of the one before if there is one; its time line."""
        self.begin()
        return self.receive("start")

    def begin(self) -> None:
        """Start a sandbox without waiting for it."""
        room = {"max_vcpus": 2} if self.arrangement in ACTING else {}
        self.send("start", memory_mib=MEMORY_MIB, **room)

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and wait for its answer (:class:`kata_lab.bench.fused_probe.Probe`).

        Raises:
            BenchError: the runtime says why not, ends, or takes too long.
        """
        self.send(order, **arguments)
        return self.receive(order)

    def send(self, order: str, **arguments: Any) -> None:
        """Give an order; :meth:`receive` waits for its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() tells
            self._process.stdin.write(json.dumps({"do": order, **arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, order: str) -> dict[str, Any]:
        """The answer to the order that was given first; BenchError as :meth:`ask`."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], LONGEST_RUN)
        if not ready:
            raise BenchError(f"the runtime ({self.arrangement}) has not answered {order!r} within {LONGEST_RUN:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the runtime ({self.arrangement}) ended at {order!r}; it said {self._said()!r}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"the runtime ({self.arrangement}) failed at {order!r}: {answer['error']}")
        return answer

    def _said(self) -> str:
        self._complaints.flush()
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace").strip()[-_TAIL:]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The processes of the sandbox."""
        return parts(self.pid)

    @property
    def memory(self) -> Memory:
        """What they have of the host's memory."""
        return Memory.of(self.parts, MEMORY_MIB << 20)

    def crash(self, name: str) -> dict[str, Any]:
        """Have the runtime kill a process of its sandbox other than itself, and tell when it noticed.

        Raises:
            BenchError: there is no such process, or its end was not noticed.
        """
        found = {part.name: part.pid for part in self.parts}
        if name not in found or name == RUNTIME:
            others = ", ".join(sorted(found.keys() - {RUNTIME})) or "no other process"
            raise BenchError(f"the arrangement {self.arrangement!r} has no process {name!r} to kill; it has {others}")
        return self.ask("crash", pid=found[name])

    def kill(self) -> Ended:
        """Kill the runtime itself, and see when its client knows and when all that belonged to it has ended.

        Raises:
            BenchError: a process outlives it.
        """
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        with contextlib.ExitStack() as held:
            waiting = {}
            poll = select.poll()
            for part in self.parts:
                descriptor = os.pidfd_open(part.pid)
                held.callback(os.close, descriptor)
                waiting[descriptor] = part.name
                poll.register(descriptor, select.POLLIN)
            poll.register(pipe, select.POLLIN)
            began = time.monotonic()
            self._process.send_signal(signal.SIGKILL)
            ends: dict[str, float] = {}
            notice = 0.0
            while waiting or not notice:
                left = began + _END_SECONDS - time.monotonic()
                if left <= 0:
                    raise BenchError(f"the runtime was killed, and {', '.join(waiting.values())} lives on")
                for descriptor, _ in poll.poll(left * 1e3):
                    took = (time.monotonic() - began) * 1e3
                    poll.unregister(descriptor)
                    if descriptor == pipe:
                        notice = took
                    else:
                        ends[waiting.pop(descriptor)] = took
        return Ended(notice, max(ends.values()), ends)

    def _end(self) -> None:
        """Let it stop its sandbox, and end it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def close(self) -> None:
        """Stop the sandbox and end the process. A second call does nothing."""
        self._made.close()

    def __enter__(self) -> RuntimeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
