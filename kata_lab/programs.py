"""Programs of the machine that make or tell something, and end by themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence


def run_apart(
    command: Sequence[str], environment: Mapping[str, str] | None = None, descriptors: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in a process group of its own.

    Ctrl-C at a terminal and a notebook's stop button signal a whole group: they are for this process, which knows what
    is to be undone, and not for a program in the middle of what it makes.

    Args:
        command: the program and its arguments.
        environment: its variables, if not ours.
        descriptors: file descriptors that it keeps open.

    Raises:
        OSError: it cannot be started.
    """
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        pass_fds=descriptors,
        process_group=0,
        check=False,
    )
