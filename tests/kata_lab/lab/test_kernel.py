"""A real Jupyter kernel: the stop button while something takes long, and what a restart leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import pytest
from jupyter_client import KernelManager
from jupyter_client.blocking import BlockingKernelClient

SECONDS = 120.0  # for what takes two seconds on an idle machine
HAVE_SANDBOX = """
from kata_lab import lab
from kata_lab.runtime import Sandbox, sync
if globals().get("sandbox") is None or str(sandbox.state) != "running":
    sandbox = Sandbox.create(memory_mib=192)
    await sandbox.start()
"""


@dataclass
class Result:
    """What became of a cell.

    Attributes:
        error: the exception's name, or nothing.
        text: what it printed.
    """

    error: str
    text: str


class Kernel:
    """A kernel and a client of it, one cell at a time."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self._client = client

    @property
    def processes(self) -> list[psutil.Process]:
        """Those that the kernel started, and their own."""
        return psutil.Process(self.manager.provisioner.process.pid).children(recursive=True)

    def run(self, code: str, cell: str = "", when: Callable[[str], None] | None = None) -> Result:
        """Run a cell to its end.

        Args:
            code: of the cell.
            cell: its id.
            when: called with each piece of text that it prints, as it comes.
        """
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = self._client.session.msg("execute_request", content, metadata={"cellId": cell} if cell else {})
        self._client.shell_channel.send(message)
        printed, error = "", ""
        while True:
            said = self._client.get_iopub_msg(timeout=SECONDS)
            if said["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                continue
            content = said["content"]
            if said["msg_type"] == "stream":
                printed += content["text"]
                if when is not None:
                    when(content["text"])
            elif said["msg_type"] == "error":
                error = content["ename"]
            elif said["msg_type"] == "status" and content["execution_state"] == "idle":
                self._client.get_shell_msg(timeout=SECONDS)
                return Result(error, printed.strip())

    def interrupt_at(self, word: str) -> Callable[[str], None]:
        """What presses the stop button when a cell prints a word."""
        return lambda text: self.manager.interrupt_kernel() if word in text else None

    def restart(self) -> None:
        """As the restart button does; returns when the new kernel is ready."""
        self.manager.restart_kernel(now=False)
        self._client.wait_for_ready(timeout=SECONDS)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    manager = KernelManager()
    manager.start_kernel()
    try:
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=SECONDS)
        yield Kernel(manager, client)
        client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)


def test_a_start_that_is_interrupted_leaves_nothing_and_the_next_cell_works(kernel: Kernel) -> None:
    starts = "from kata_lab.runtime import Sandbox\nhalf = Sandbox.create()\nprint('starts')\nawait half.start()"

    interrupted = kernel.run(starts, when=kernel.interrupt_at("starts"))
    after = kernel.run("print(half.state, half.directory.exists())")
    works = kernel.run(HAVE_SANDBOX + "print((await sandbox.run(['echo', 'hello'])).output)")

    assert interrupted.error in ("CancelledError", "KeyboardInterrupt")
    assert after == Result("", "stopped False")
    assert works == Result("", "hello")


def test_a_run_that_is_interrupted_leaves_no_container_and_the_next_cell_works(kernel: Kernel) -> None:
    kernel.run(HAVE_SANDBOX)

    interrupted = kernel.run(
        "container = await sandbox.new_container(['sleep', '1000'])\n"
        "process = await container.start()\n"
        "print('waits')\n"
        "await process.wait()",
        when=kernel.interrupt_at("waits"),
    )
    works = kernel.run("await container.remove()\nprint((await sandbox.run(['echo', 'again'])).output)")
    run = kernel.run("print('runs')\nawait sandbox.run(['sleep', '1000'])", when=kernel.interrupt_at("runs"))
    left = kernel.run("print(len(sandbox.containers))")

    assert interrupted.error in ("CancelledError", "KeyboardInterrupt")
    assert works == Result("", "again")
    assert run.error in ("CancelledError", "KeyboardInterrupt")
    assert left == Result("", "0")


def test_a_script_without_asyncio_can_be_interrupted_too(kernel: Kernel) -> None:
    kernel.run(HAVE_SANDBOX)
    script = "with sync.Sandbox.create(memory_mib=192) as other:\n    print('runs')\n    other.run(['sleep', '1000'])"

    interrupted = kernel.run(script, when=kernel.interrupt_at("runs"))
    after = kernel.run("print(other.state)")

    assert interrupted.error == "KeyboardInterrupt"
    assert after == Result("", "stopped")


def test_a_terminal_goes_when_its_cell_is_run_again_and_stays_when_another_is(kernel: Kernel) -> None:
    kernel.run(HAVE_SANDBOX)
    opens = (
        "shown = lab.terminal(sandbox, ['cat'])\n"
        "while not shown.status.startswith('cat in'): await asyncio.sleep(0.02)\n"
        "print(len(sandbox.containers))"
    )

    first = kernel.run("import asyncio\n" + opens, cell="one")
    other = kernel.run("earlier = shown\n" + opens, cell="two")
    again = kernel.run("await earlier.wait_closed()\n" + opens, cell="one")

    assert [first.text, other.text, again.text] == ["1", "2", "2"]


def test_a_restart_leaves_no_process_and_no_sandbox(kernel: Kernel) -> None:
    kernel.run(HAVE_SANDBOX)
    kernel.run(
        "split = Sandbox.create(memory_mib=192, hypervisor='rpc')\nawait split.start()\nterminal = lab.terminal(split)"
    )
    processes = kernel.processes
    assert processes

    kernel.restart()
    _, left = psutil.wait_procs(processes, timeout=SECONDS)
    works = kernel.run(HAVE_SANDBOX + "print((await sandbox.run(['echo', 'anew'])).output)")

    assert left == []
    assert works == Result("", "anew")
