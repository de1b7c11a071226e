"""The load of ``kata-lab bench io``, in a shell of the host with programs that only tell how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kata_lab.bench.io import FINISHED, LOADS, SCRIPT

PROGRAMS = {
    # Field n holds n; what is asked for is told on the other output.
    "fio": "echo \"$*\" >&2; seq -s ';' 60",
    "udhcpc": "exit",
    "ip": "echo default via 10.0.2.2 dev eth0",
    "iperf3": "echo \"$*\" >&2; echo '[  5] 0.00-3.00 sec 200 MBytes  512 Mbits/sec  receiver'",
}


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """The environment in which they are found."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(environment: dict[str, str], *loads: str) -> tuple[list[str], list[str]]:
    """What it told, and how it called fio and iperf3."""
    done = subprocess.run(
        ["sh", "-c", SCRIPT, "bench-io", "3", "5201", *loads],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_every_load_tells_its_figure(programs: dict[str, str]) -> None:
    told, called = run(programs, *LOADS)

    assert told == [
        "RESULT seq_read_kib_s 7",
        "RESULT seq_write_kib_s 48",
        "RESULT rand_read_iops 8",
        "RESULT rand_write_iops 49",
        "RESULT net_to_host_mbit_s 512",
        "RESULT net_to_guest_mbit_s 512",
        FINISHED,
    ]
    assert called[-2:] == ["-c 10.0.2.2 -p 5201 -t 3 -f m", "-c 10.0.2.2 -p 5201 -t 3 -f m -R"]


def test_one_load_is_run_alone(programs: dict[str, str]) -> None:
    told, (called,) = run(programs, "seq_read")

    assert told == ["RESULT seq_read_kib_s 7", FINISHED]
    assert "--direct=1" in called
    assert "--rw=read --bs=1M" in called
