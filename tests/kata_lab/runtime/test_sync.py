"""The runtime without asyncio: streams, several sandboxes, and Ctrl-C in a script."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from kata_lab.runtime import ContainerState, RuntimeFault
from kata_lab.runtime.sync import THREAD, Sandbox

SCRIPT = """
import os, signal, sys, threading
from kata_lab.runtime.sync import Sandbox
# Also where the test itself was started with Ctrl-C ignored, as in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
held = len(os.listdir("/proc/self/fd"))
sandbox = Sandbox.create(id="interrupted", memory_mib=128)
try:
    print("starts", flush=True)
    with sandbox:
        print("started", flush=True)
        sandbox.run(["sleep", "1000"])
except KeyboardInterrupt:
    threads = sorted(each.name for each in threading.enumerate())
    print("interrupted", threads, len(os.listdir("/proc/self/fd")) - held, flush=True)
"""


def test_script_uses_a_sandbox_as_it_stands() -> None:
    with Sandbox.create(memory_mib=128) as sandbox:
        assert str(sandbox.state) == "running"
        assert sandbox.run(["cat"], stdin=b"in").stdout == b"in"
        container = sandbox.new_container(["sh", "-c", "cat; exit 7"])
        process = container.start()
        process.write(b"one ")
        process.write(b"two")
        process.close_stdin()
        assert b"".join(process.output()) == b"one two"
        assert process.wait() == container.wait() == process.status == 7
        assert container.state is ContainerState.STOPPED
        container.remove()
        assert sandbox.timeline
        refused: list[str] = []

        def pause(_: object) -> None:
            try:
                sandbox.pause()
            except RuntimeFault as error:
                refused.append(str(error))

        sandbox.asynchronous.agent.on_call = pause
        assert sandbox.run(["true"]).status == 0
        assert "the thread that it is called on" in refused[0]

    assert str(sandbox.state) == "stopped"
    assert THREAD not in {each.name for each in threading.enumerate()}
    with pytest.raises(RuntimeFault, match="no sandbox is open"):
        sandbox.run(["true"])


@pytest.mark.parametrize(
    ("when", "seconds"), [("starts", 0.0), ("starts", 0.1), ("starts", 0.4), ("starts", 0.8), ("started", 0.3)]
)
def test_ctrl_c_leaves_nothing_behind(when: str, seconds: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        while script.stdout.readline() != f"{when}\n":
            assert script.poll() is None
        # Wherever it is by then.
        threading.Event().wait(seconds)
        script.send_signal(signal.SIGINT)
        said, errors = script.communicate(timeout=60)

    assert said.removeprefix("started\n") == "interrupted ['MainThread'] 0\n", errors
    assert errors == ""
