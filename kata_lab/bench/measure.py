"""How a benchmark measures: runs in turns, medians, and processes watched from outside.

Runs of the two sides alternate, so that a machine that is slow for a while is slow for both. A process is timed from
its exec; its memory and CPU time come from ``/proc`` (proc(5)), the same for both sides.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kata_lab.errors import KataLabError
from vmm.metrics import ProcessMemory

LONGEST_RUN = 300.0  #: seconds after which a run has failed
_TAIL = 2000


class BenchError(KataLabError):
    """A run did not do what was to be measured."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one thing, in one unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest less smallest value, as a fraction of the median: 0.1 is ±5 %."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0


def alternate(runs: int, *sides: Callable[[], float]) -> tuple[Sample, ...]:
    """Measure each side ``runs`` times, in turns, after one run of each that does not count."""
    for side in sides:
        side()
    values = [[side() for side in sides] for _ in range(runs)]
    return tuple(Sample(tuple(row[index] for row in values)) for index in range(len(sides)))


class Watched:
    """A process whose standard output is read, from its exec on; a context manager that leaves nothing running.

    Its standard input is a pipe to which nothing is written, so that a shell in a guest waits.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._text = b""
        self._command = command
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        """What the process has printed and has been read."""
        return self._text.decode(errors="replace")

    def seconds_until(self, marker: str, timeout: float = LONGEST_RUN) -> float:
        """Seconds from the exec until the process has printed ``marker``.

        Raises:
            BenchError: it ended or took too long without.
        """
        assert self._process.stdout is not None
        wanted = marker.encode()
        descriptor = self._process.stdout.fileno()
        while wanted not in self._text:
            left = self.began + timeout - time.monotonic()
            ready, _, _ = select.select([descriptor], [], [], max(left, 0))
            data = os.read(descriptor, 65536) if ready else b""
            if not data:
                why = "ended" if ready else f"ran for {timeout:g} s"
                told = self._text[-_TAIL:].decode(errors="replace").strip()
                raise BenchError(f"{self._command[0]} {why} without printing {marker!r}; it printed {told!r}")
            self._text += data
        return time.monotonic() - self.began

    def seconds_until_end(self, timeout: float = LONGEST_RUN) -> float:
        """Seconds from the exec until the process ended with status 0.

        Raises:
            BenchError: it failed or took too long.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self._command[0]} did not end within {timeout:g} s") from None
        seconds = time.monotonic() - self.began
        if status:
            raise BenchError(f"{self._command[0]} ended with status {status}")
        return seconds

    @property
    def pss_bytes(self) -> int:
        """Memory of the process, shared pages divided among those who share them."""
        return ProcessMemory.now(Path(f"/proc/{self.pid}/smaps_rollup")).pss

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all its threads until now, to 10 ms."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def idle_percent(self, seconds: float) -> float:
        """What the process costs over so many seconds, in percent of one core."""
        before, began = self.cpu_seconds, time.monotonic()
        time.sleep(seconds)
        return (self.cpu_seconds - before) / (time.monotonic() - began) * 100

    def close(self) -> None:
        """Kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def warm(paths: Sequence[Path]) -> None:
    """Read files once, so that the first run finds them in the page cache too."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


@contextlib.contextmanager
def steps(title: str, count: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over ``count`` steps; call what it gives with the name of each step that begins."""
    from kata_lab.progress import Progress

    with Progress(title, total=count) as bar:
        done = 0

        def begin(name: str) -> None:
            nonlocal done
            bar.advance_to(done, name)
            done += 1

        yield begin
