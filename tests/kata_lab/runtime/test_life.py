"""The life of a sandbox when steps of it fail, hang, are cancelled, or come at once; with a VM that has no guest."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata_lab.errors import ImageError, KataLabError
from kata_lab.hypervisor import HypervisorError
from kata_lab.resource.rootfs import DirectoryRoot
from kata_lab.runtime import ContainerState, RuntimeFault, Sandbox, SandboxState
from kata_lab.runtime import sandbox as sandbox_module
from kata_lab.runtime.state import sandboxes_directory
from kata_lab.ttrpc import RpcError, StatusCode
from tests.kata_lab.runtime.fake import FakeHypervisor, Fault, Hang

SPEC: dict[str, Any] = {
    "ociVersion": "1.1.0",
    "root": {"path": "rootfs"},
    "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": []},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State of its own, and an image that costs nothing."""
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "home"))
    files = {"kernel": tmp_path / "kernel", "root": tmp_path / "initrd"}
    image = SimpleNamespace(architecture="riscv64", append="", release=lambda: None, **files)
    monkeypatch.setattr("kata_lab.image.build.build_named", lambda name: image)
    monkeypatch.setattr("kata_lab.runtime.preparation.make_scratch", lambda path, lasting: path.write_bytes(b""))
    (tmp_path / "rootfs").mkdir()
    return tmp_path


def made(**faults: Fault) -> tuple[Sandbox, FakeHypervisor]:
    hypervisor = FakeHypervisor(**faults)
    return Sandbox.create(id="one", hypervisor=hypervisor), hypervisor


def left() -> list[str]:
    """Directories of sandboxes."""
    return [each for each in os.listdir(sandboxes_directory()) if each != ".lock"]


async def others() -> set[asyncio.Task[Any]]:
    """Tasks beside this one, when those that are about to end have."""
    while writing := [each for each in asyncio.all_tasks() if each.get_name().startswith("record-")]:
        await asyncio.wait(writing)
    for _ in range(10):
        await asyncio.sleep(0)
    return asyncio.all_tasks() - {asyncio.current_task()}


STEPS = ["load", "prepare_vm", "start_vm", "CreateSandbox", "SetGuestDateTime", "CopyFile"]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_undoes_those_before_it(step: str) -> None:
    async def life() -> None:
        fault = RpcError(StatusCode.INTERNAL, "no") if step[0].isupper() else HypervisorError("no")
        sandbox, hypervisor = made(**{step: fault})

        with pytest.raises(KataLabError, match=r"^no$"):
            await sandbox.start()

        assert sandbox.state is SandboxState.STOPPED
        assert sandbox.reason == "its start failed: no"
        assert not hypervisor.running
        assert hypervisor.cleaned == (step != "load")
        assert not left()
        assert not await others()
        with pytest.raises(RuntimeFault, match="is stopped and cannot be started again"):
            await sandbox.start()

    asyncio.run(life())


def test_an_image_that_cannot_be_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> None:
        raise ImageError("no such image")

    monkeypatch.setattr("kata_lab.image.build.build_named", build)

    async def life() -> None:
        sandbox, _ = made(load=Hang())
        with pytest.raises(ImageError, match="no such image"):
            await sandbox.start()
        assert not left()
        assert not await others()

    asyncio.run(life())


def test_a_missing_tool_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kata_lab.resource.scratch import make_scratch

    monkeypatch.setattr("kata_lab.runtime.preparation.make_scratch", make_scratch)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)

    async def life() -> None:
        with pytest.raises(KataLabError, match="no mke2fs to make a disk with: install the package e2fsprogs"):
            await made()[0].start()
        assert not left()

    asyncio.run(life())


def test_an_agent_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "CONNECT_AGENT_SECONDS", 0.05)

    async def life() -> None:
        for fault in ({"dial": HypervisorError("nobody listens")}, {"Check": Hang()}):
            sandbox, hypervisor = made(**fault)
            with pytest.raises(KataLabError, match=r"the agent did not answer within 0\.05 s"):
                await sandbox.start()
            assert hypervisor.cleaned
            assert not await others()

    asyncio.run(life())


def test_a_guest_that_ends_before_its_agent_answers_says_why() -> None:
    async def life() -> None:
        sandbox, hypervisor = made(dial=HypervisorError("nobody listens"))
        starting = asyncio.create_task(sandbox.start())
        while not hypervisor.running:
            await asyncio.sleep(0.001)
        hypervisor.end("the guest's kernel panicked: no init")
        with pytest.raises(KataLabError, match="gone before its agent answered: the guest's kernel panicked: no init"):
            await starting

    asyncio.run(life())


def test_a_guest_that_ends_while_it_is_told_of_its_sandbox_says_why() -> None:
    async def life() -> None:
        sandbox, hypervisor = made(CreateSandbox=Hang())
        starting = asyncio.create_task(sandbox.start())
        while "CreateSandbox" not in hypervisor.agent.seen:
            await asyncio.sleep(0.001)
        hypervisor.end("the guest's kernel panicked: out of memory")
        with pytest.raises(KataLabError, match=r"the guest is gone: the guest's kernel panicked: out of memory$"):
            await starting
        assert sandbox.reason.endswith("the guest is gone: the guest's kernel panicked: out of memory")

    asyncio.run(life())


@pytest.mark.parametrize("step", [*STEPS, "dial", "Check"])
@pytest.mark.parametrize("how", ["cancelled", "stopped"])
def test_a_start_that_hangs_can_be_ended(step: str, how: str) -> None:
    async def life() -> None:
        sandbox, hypervisor = made(**{step: Hang()})
        starting = asyncio.create_task(sandbox.start())
        await asyncio.sleep(0.05)
        if how == "cancelled":
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            await asyncio.gather(sandbox.stop(), sandbox.stop())
            with pytest.raises(RuntimeFault, match="was stopped while it started"):
                await starting
        assert sandbox.state is SandboxState.STOPPED
        assert not hypervisor.running
        assert not left()
        assert not await others()

    asyncio.run(life())


def cancelled_everywhere(work: Callable[[], Any], check: Callable[[], Any]) -> int:
    """Run work, cancelled after every number of turns of the loop until it gets through; that number."""
    for turns in itertools.count():

        async def once(turns: int = turns) -> bool:
            task = asyncio.create_task(work())
            for _ in range(turns):
                if task.done():
                    break
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await check()
            assert not await others()
            return done

        if asyncio.run(once()):
            return turns
    raise AssertionError


def test_a_start_that_is_cancelled_anywhere_leaves_nothing() -> None:
    current: list[FakeHypervisor] = []

    async def work() -> None:
        sandbox, hypervisor = made()
        current[:] = [hypervisor]
        await sandbox.start()
        await sandbox.stop()

    async def check() -> None:
        assert not left()
        assert not current or not current[0].running

    assert cancelled_everywhere(work, check) > 20


def test_a_run_that_is_cancelled_anywhere_leaves_nothing(place: Path) -> None:
    async def life() -> None:
        sandbox, hypervisor = made()
        async with sandbox:
            before = await others()

            async def work() -> None:
                container = await sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs"), "c")
                try:
                    await container.start()
                finally:
                    await container.remove()

            for turns in itertools.count():
                task = asyncio.create_task(work())
                for _ in range(turns):
                    await asyncio.sleep(0)
                done = task.done()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert not hypervisor.agent.containers
                assert not hypervisor.shares
                assert not sandbox.containers
                assert await others() == before
                if done:
                    break
            assert turns > 20

    asyncio.run(life())


@pytest.mark.parametrize("step", ["add_share", "CreateContainer"])
def test_a_container_that_cannot_be_created_leaves_nothing(place: Path, step: str) -> None:
    async def life() -> None:
        fault = RpcError(StatusCode.INTERNAL, "no") if step[0].isupper() else HypervisorError("no")
        sandbox, hypervisor = made(**{step: fault})
        async with sandbox:
            with pytest.raises(KataLabError, match=r"^no$"):
                await sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs"), "c")
            assert not hypervisor.shares
            assert not sandbox.containers
            hypervisor.faults.clear()
            await sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs"), "c")
        assert not await others()

    asyncio.run(life())


def test_a_guest_that_ends_ends_whatever_waits(place: Path) -> None:
    async def life() -> None:
        sandbox, hypervisor = made(ReadStdout=Hang(), StatsContainer=Hang(), ExecProcess=Hang())
        await sandbox.start()
        container = await sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs"), "c")
        process = await container.start()
        waiting = [
            *(process.wait(), process.wait(), process.stdout.read(), process.communicate(), container.stats()),
            container.exec(SPEC["process"]),
        ]
        tasks = [asyncio.create_task(each) for each in waiting]
        await asyncio.sleep(0.02)
        hypervisor.end("the guest's kernel panicked: sysrq")
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            await sandbox.stopped.wait()

        assert {type(each) for each in outcomes} == {RpcError}
        assert {str(each) for each in outcomes} == {"sandbox one has ended: the guest's kernel panicked: sysrq"}
        assert sandbox.reason == "the guest's kernel panicked: sysrq"
        assert container.state is ContainerState.STOPPED
        with pytest.raises(
            RuntimeFault, match=r"is stopped \(the guest's kernel panicked: sysrq\) and cannot be given"
        ):
            await sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs"), "d")
        await container.remove()
        await sandbox.stop()
        assert not left()
        assert not await others()

    asyncio.run(life())


def test_an_agent_that_is_lost_ends_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "FATE_SECONDS", 0.02)

    async def life() -> None:
        sandbox, hypervisor = made()
        await sandbox.start()
        for each in hypervisor._serving:
            each.cancel()
        async with asyncio.timeout(5):
            await sandbox.stopped.wait()
        assert sandbox.reason.startswith("its agent is lost: ")
        assert hypervisor.cleaned
        assert not await others()

    asyncio.run(life())


def test_an_agent_that_is_silent_ends_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEALTH_SECONDS", 0.01), ("SILENT_SECONDS", 0.05)):
        monkeypatch.setattr(sandbox_module, name, seconds)

    async def life() -> None:
        sandbox, hypervisor = made()
        await sandbox.start()
        await sandbox.pause()
        hypervisor.faults["Check"] = Hang()
        await asyncio.sleep(0.2)
        assert sandbox.state is SandboxState.RUNNING  # who is paused may be silent
        await sandbox.resume()
        async with asyncio.timeout(5):
            await sandbox.stopped.wait()
        assert sandbox.reason == "its agent has not answered for 0.05 s"

    asyncio.run(life())


def test_stop_does_not_wait_for_a_command_that_hangs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "DESTROY_SECONDS", 0.05)

    async def life() -> None:
        sandbox, hypervisor = made(CreateContainer=Hang())
        await sandbox.start()
        creating = asyncio.create_task(sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs")))
        await asyncio.sleep(0.02)
        async with asyncio.timeout(2):
            await asyncio.gather(sandbox.stop(), sandbox.stop(), sandbox.stop())
        with pytest.raises(RpcError, match="sandbox one has ended: it was stopped"):
            await creating
        assert hypervisor.cleaned
        assert not await others()

    asyncio.run(life())


def test_stop_of_a_paused_sandbox_does_not_ask_its_agent() -> None:
    async def life() -> None:
        sandbox, hypervisor = made(DestroySandbox=Hang())
        await sandbox.start()
        await sandbox.pause()
        async with asyncio.timeout(2):
            await sandbox.stop()
        assert "DestroySandbox" not in hypervisor.agent.seen

    asyncio.run(life())


def test_two_hundred_lives_leave_nothing(place: Path) -> None:
    async def lives() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(200):
            sandbox, hypervisor = made()
            async with sandbox:
                container = await sandbox.create_container(SPEC, DirectoryRoot(place / "rootfs"))
                await container.start()
                await container.remove()
            assert hypervisor.cleaned
        assert not await others()
        assert not left()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(lives())


def test_a_name_is_taken_while_its_owner_lives(tmp_path: Path) -> None:
    async def life() -> None:
        sandbox, _ = made()
        async with sandbox:
            with pytest.raises(RuntimeFault, match="a sandbox 'one' exists already"):
                await made()[0].start()
            assert left() == ["one"]
            assert sandbox.directory.is_dir()

    asyncio.run(life())


def test_bad_configurations_are_refused() -> None:
    for wishes, complaint in (
        ({"memory": 5}, "a sandbox has no memory; it has id, image, vcpus"),
        ({"rootfs": "nfs"}, "rootfs is 'nfs', it must be one of 'split', 'fs', 'block'"),
        ({"rootfs": "block"}, "images names none"),
        ({"images": ["busybox"]}, "it must be 'block'"),
        ({"rootfs": "block", "images": "busybox"}, "it must be a list"),
        ({"id": "a/b"}, "the sandbox's name 'a/b'"),
    ):
        with pytest.raises(RuntimeFault, match=complaint):
            Sandbox.create(**wishes)
