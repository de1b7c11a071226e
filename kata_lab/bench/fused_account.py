"""What a sandbox costs, by the operating system's own account: processes, threads, memory, switches, system calls.

All of it is read from outside, in the same way for every arrangement: from ``/proc`` (proc(5)), and system calls from
the kernel's tracepoint ``raw_syscalls:sys_enter`` by perf(1), where that may be used. Elsewhere reads and writes alone
are counted (``/proc/PID/io``). strace(1) would count as well, and slow down what it counts.

A process is called by its part in the sandbox: ``runtime``, ``vmm``, ``fs`` (shared directories), ``qemu``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil

from kata_lab.bench.measure import BenchError

RUNTIME: Final = "runtime"
BY_PERF: Final = "perf"
BY_IO: Final = "reads and writes in /proc/PID/io"
_MODULES: Final = {"vmm.rpc": "vmm", "vmm.vhost.fs": "fs"}
_EVENT: Final = "raw_syscalls:sys_enter"
_SECONDS: Final = 10.0  # for perf to answer
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)")
_SHARED_MEMORY: Final = "/memfd:"


@dataclass(frozen=True, slots=True)
class Part:
    """One process of a sandbox.

    Attributes:
        name: its part in the sandbox.
        pid: process id.
        threads: how many it has.
    """

    name: str
    pid: int
    threads: int


def parts(runtime: int) -> tuple[Part, ...]:
    """The processes of a sandbox: the runtime's, and all that descend from it."""
    root = psutil.Process(runtime)
    found = []
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = RUNTIME if process == root else _name(process)
            found.append(Part(name, process.pid, process.num_threads()))
    return tuple(found)


def _name(process: psutil.Process) -> str:
    for word in process.cmdline():
        if word in _MODULES:
            return _MODULES[word]
    name = process.name()
    return "qemu" if name.startswith("qemu") else name


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a sandbox in bytes, pages that several processes share being divided among them (PSS).

    Attributes:
        processes: name → bytes.
        kinds: the same by what it is for: ``guest`` the guest's memory, ``files`` programs and libraries, ``anonymous``
            heaps, stacks and code that was made.
    """

    processes: Mapping[str, int]
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        """Of all processes."""
        return sum(self.processes.values())

    @classmethod
    def of(cls, found: Sequence[Part], guest_bytes: int) -> Memory:
        """Read it.

        Args:
            found: the processes.
            guest_bytes: size of the guest's memory: where no file without a name holds it, as if it is shared, it is
                the smallest mapping without a file that is at least so large. (The hart's decoded instructions have a
                larger one.)
        """
        mappings = [(part.name, *each) for part in found for each in _mappings(part.pid)]
        shared = any(path.startswith(_SHARED_MEMORY) for _, path, _, _ in mappings)
        size_of_guest = min((size for _, path, size, _ in mappings if not path and size >= guest_bytes), default=0)
        processes: Counter[str] = Counter({part.name: 0 for part in found})
        kinds: Counter[str] = Counter({"guest": 0, "files": 0, "anonymous": 0})
        for name, path, size, pss in mappings:
            guest = path.startswith(_SHARED_MEMORY) if shared else not path and size == size_of_guest
            kinds["guest" if guest else "files" if path.startswith("/") else "anonymous"] += pss
            processes[name] += pss
        return cls(dict(processes), dict(kinds))


def _mappings(pid: int) -> Iterator[tuple[str, int, int]]:
    """Path, size and PSS of each mapping."""
    path, size = "", 0
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        if line.startswith("Pss:"):
            yield path, size, int(line.split()[1]) * 1024
        elif found := _MAPPING.fullmatch(line):
            path, size = found[3], int(found[2], 16) - int(found[1], 16)


def cpu_seconds(found: Sequence[Part]) -> float:
    """User and system time of all threads until now, and of children that have ended; to 10 ms for each process."""
    ticks = 0
    for part in found:
        fields = Path(f"/proc/{part.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def context_switches(found: Sequence[Part]) -> int:
    """Of all threads that live, since they began: those that waited, and those that were made to."""
    count = 0
    for part in found:
        for status in Path(f"/proc/{part.pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):  # the thread has ended meanwhile
                count += sum(
                    int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line
                )
    return count


def _reads_and_writes(found: Sequence[Part]) -> int:
    count = 0
    for part in found:
        lines = Path(f"/proc/{part.pid}/io").read_text().splitlines()
        count += sum(int(line.split()[1]) for line in lines if line.startswith(("syscr:", "syscw:")))
    return count


class SystemCalls:
    """Counts the system calls of processes, from entering this context on.

    Args:
        found: the processes.
        allowed: whether perf may be used.
    """

    def __init__(self, found: Sequence[Part], allowed: bool = True) -> None:
        self._found = found
        self._program = shutil.which("perf") if allowed else None
        self._before = 0
        self._perf: subprocess.Popen[str] | None = None
        self._made = contextlib.ExitStack()
        #: What is counted: :data:`BY_PERF` all, :data:`BY_IO` reads and writes only; known once it was entered.
        self.source = BY_IO

    def __enter__(self) -> SystemCalls:
        if self._program is not None and self._attach(self._program):
            self.source = BY_PERF
        else:
            self._before = _reads_and_writes(self._found)
        return self

    def _attach(self, program: str) -> bool:
        """Whether perf counts by now: it says so, on a pipe of its own."""
        pids = ",".join(str(part.pid) for part in self._found)
        with contextlib.ExitStack() as made:
            orders, order = (
                made.enter_context(os.fdopen(end, mode)) for end, mode in zip(os.pipe(), "rw", strict=True)
            )
            answers, answer = (
                made.enter_context(os.fdopen(end, mode)) for end, mode in zip(os.pipe(), "rw", strict=True)
            )
            control = f"fd:{orders.fileno()},{answer.fileno()}"
            perf = subprocess.Popen(
                [program, "stat", "-x", ",", "-e", _EVENT, "-D", "-1", "-p", pids, "--control", control],
                pass_fds=(orders.fileno(), answer.fileno()),
                stderr=subprocess.PIPE,
                text=True,
            )
            made.callback(_end, perf)
            orders.close()
            answer.close()
            with contextlib.suppress(BrokenPipeError):
                order.write("enable\n")
                order.flush()
            if not answers.readline().startswith("ack"):
                return False
            self._perf = perf
            self._made = made.pop_all()
        return True

    def count(self) -> int:
        """How many there were; it is counted no further.

        Raises:
            BenchError: perf does not tell.
        """
        if self._perf is None:
            return _reads_and_writes(self._found) - self._before
        self._perf.send_signal(signal.SIGINT)
        try:
            _, told = self._perf.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise BenchError(f"perf has not ended within {_SECONDS:g} s") from None
        line = next((line for line in told.splitlines() if _EVENT in line), "")
        number = line.partition(",")[0]
        if not number.isdigit():
            raise BenchError(f"perf does not tell how many system calls there were; it tells {told.strip()[-300:]!r}")
        return int(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._made.close()


def _end(perf: subprocess.Popen[str]) -> None:
    if perf.poll() is None:
        perf.kill()
    perf.communicate()
