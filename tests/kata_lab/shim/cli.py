"""The command line with fake sandboxes as processes, as a person starts it."""

from __future__ import annotations

import subprocess
import sys

from tests.kata_lab.cli_process import SECONDS, environment

COMMAND = (sys.executable, "-m", "tests.kata_lab.shim.fake_cli")


def cli(*arguments: str, typed: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run to the end, with ``typed`` as standard input."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=typed,
        capture_output=True,
        env=environment(**variables),
        timeout=SECONDS,
        check=False,
    )


def said(*arguments: str) -> str:
    """What a command prints that succeeds."""
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()
