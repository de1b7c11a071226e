"""Whose word counts when a VM ends that a file system process serves."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.hypervisor.vm_end import end_of_vm
from tests.kata_lab.runtime.conftest import Loop, loop
from vmm.vhost.process import FsProcess

__all__ = ["loop"]


@pytest.fixture
def files() -> Iterator[FsProcess]:
    with tempfile.TemporaryDirectory() as place, FsProcess(Path(place) / "fs") as process:
        yield process


def test_vmm_says_why_it_went_after_its_file_system_process_did(loop: Loop, files: FsProcess) -> None:
    async def story() -> str:
        vmm = asyncio.get_running_loop().create_future()
        end = asyncio.ensure_future(end_of_vm(vmm, files))
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(os.fspath(files.socket))
        await asyncio.wrap_future(files.ended)
        done, _ = await asyncio.wait((end,), timeout=0.1)
        assert not done
        vmm.set_result("the guest's kernel panicked: no reason")
        return await end

    assert loop(story()) == "the guest's kernel panicked: no reason"
    assert files.status == 0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGTERM, "ended with status 1: the file system process gave up: it was told to by SIGTERM"),
    ],
)
def test_file_system_process_that_is_ended_is_told_while_its_vmm_lives(
    loop: Loop, files: FsProcess, how: signal.Signals, words: str
) -> None:
    async def story() -> str:
        os.kill(files.pid, how)
        return await end_of_vm(asyncio.get_running_loop().create_future(), files)

    assert loop(story(), 60) == f"the file system process (process {files.pid}) {words}"


def test_vm_without_a_file_system_process_ends_with_its_vmm(loop: Loop) -> None:
    async def story() -> str:
        vmm = asyncio.get_running_loop().create_future()
        vmm.set_result("the guest shut down")
        return await end_of_vm(vmm, None)

    assert loop(story()) == "the guest shut down"
