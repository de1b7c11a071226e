"""Real sandboxes: several at once, the ways in which they end, root file systems, a shared PID namespace, and what
they tell of themselves."""

from __future__ import annotations

import asyncio
import io
import json
import re
from dataclasses import dataclass, field
from typing import cast

import pytest

from kata_lab.errors import KataLabError
from kata_lab.oci import ImageConfig, ImageHandle, open_image
from kata_lab.oci.layered import LayeredTree
from kata_lab.runtime import Container, Process, Sandbox, SandboxState
from kata_lab.runtime.logs import log_as_json
from kata_lab.runtime.metrics import sandbox_metrics
from kata_lab.runtime.state import StateDirectory
from kata_lab.ttrpc import RpcError
from tests.kata_lab.runtime.conftest import Loop
from vmm.actions import ShutdownMicroVm


async def begun(sandbox: Sandbox) -> tuple[Container, Process]:
    container = await sandbox.new_container(["sleep", "1000"])
    return container, await container.start()


async def killed_agent(sandbox: Sandbox) -> None:
    from kata_lab.hypervisor.fused import FusedHypervisor

    assert isinstance(sandbox.hypervisor, FusedHypervisor)
    sandbox.hypervisor.vm.console.write(
        b"\nkill -9 $(grep -l 'kata-lab/[a]gent' /proc/[0-9]*/cmdline | cut -d / -f 3)\n"
    )


async def panicked(sandbox: Sandbox) -> None:
    from kata_lab.hypervisor.fused import FusedHypervisor

    assert isinstance(sandbox.hypervisor, FusedHypervisor)
    sandbox.hypervisor.vm.console.write(b"\necho c > /proc/sysrq-trigger\n")


async def unplugged(sandbox: Sandbox) -> None:
    from kata_lab.hypervisor.fused import FusedHypervisor

    assert isinstance(sandbox.hypervisor, FusedHypervisor)
    sandbox.hypervisor.vm.request(ShutdownMicroVm())


async def powered_off(sandbox: Sandbox) -> None:
    from kata_lab.hypervisor.fused import FusedHypervisor

    assert isinstance(sandbox.hypervisor, FusedHypervisor)
    sandbox.hypervisor.vm.console.write(b"\npoweroff -f\n")


ENDS = {
    killed_agent: "its agent is lost",
    panicked: "the guest's kernel panicked: sysrq triggered crash",
    unplugged: "the host shut the VM down",
    powered_off: "the guest shut down",
}


def test_four_at_once_end_in_four_ways_and_say_why(loop: Loop) -> None:
    async def life() -> list[tuple[str, str, SandboxState, list[object]]]:
        sandboxes = [Sandbox.create(memory_mib=128) for _ in ENDS]
        try:
            async with asyncio.timeout(180):
                await asyncio.gather(*(each.start() for each in sandboxes))
                first = [await begun(each) for each in sandboxes]
                told = []
                for sandbox, (_, process), end in zip(sandboxes, first, ENDS, strict=True):
                    waiting = [process.wait(), process.stdout.read(), process.communicate()]
                    tasks = [asyncio.create_task(each) for each in waiting]
                    await asyncio.sleep(0.05)
                    await end(sandbox)
                    outcomes: list[object] = list(await asyncio.gather(*tasks, return_exceptions=True))
                    await sandbox.stopped.wait()
                    told.append((ENDS[end], sandbox.reason, sandbox.state, outcomes))
                return told
        finally:
            await asyncio.gather(*(each.stop() for each in sandboxes))

    for expected, reason, state, outcomes in loop(life(), 200):
        assert expected in reason
        assert state is SandboxState.STOPPED
        assert all(isinstance(each, RpcError) and reason in str(each) for each in outcomes), (reason, outcomes)


@pytest.mark.parametrize("rootfs", ["fs", "block"])
def test_other_root_file_systems_show_the_same_files(loop: Loop, rootfs: str) -> None:
    listing = (
        "find / -xdev ! -path '/proc*' ! -path '/etc/*' ! -path '/dev*' ! -type d | sort | xargs stat -c '%A %u %n'"
    )
    script = f"{listing}; echo x > /new && cat /new; hostname > /tmp/x"
    images = ("busybox",) if rootfs == "block" else ()

    async def life() -> list[str]:
        async with Sandbox.create(rootfs=rootfs, images=images, memory_mib=128, shared_pid_namespace=True) as sandbox:
            first = await sandbox.run(["sh", "-c", script])
            again = await sandbox.run(["sh", "-c", script])
            assert (first.status, first.stderr) == (0, b"")
            assert first == again  # what was written went with the container
            await sandbox_shares_processes(sandbox)
            if rootfs == "block":
                with pytest.raises(KataLabError, match="no disk of image 'other'"):
                    await sandbox.new_container(["true"], cast(ImageHandle, _Other()))
            assert not [*(sandbox.directory / "roots").glob("*")]
            return first.output.splitlines()

    lines = loop(life())

    with open_image("busybox") as image:
        files = {f"/{each.relative_to(layer)}" for layer in image.layers() for each in layer.rglob("*")}
    shown = {line.split()[-1] for line in lines}
    assert {each for each in files if each.startswith("/bin/")} <= shown | {"/bin/"}
    assert lines[-1] == "x"


async def sandbox_shares_processes(sandbox: Sandbox) -> None:
    container, _ = await begun(sandbox)
    seen = await sandbox.run(["sh", "-c", "ps -o args | grep '^sleep 1000'; echo $$"])
    assert seen.output.splitlines()[0] == "sleep 1000"
    assert seen.output.splitlines()[-1] != "1"
    await container.remove()
    assert (await sandbox.run(["sh", "-c", "ps -o args | grep -c '^sleep 1000'"])).output == "0\n"


@dataclass(frozen=True)
class _Other:
    """An image of which the sandbox has no disk."""

    digest: str = "sha256:" + "0" * 64
    reference: str = "other"
    config: ImageConfig = field(default_factory=lambda: ImageConfig("riscv64"))

    def tree(self) -> LayeredTree:
        return LayeredTree([])


def test_it_logs_json_with_its_name_and_tells_metrics(loop: Loop) -> None:
    said = io.StringIO()

    async def life() -> tuple[str, str, str]:
        async with Sandbox.create(id="talker", memory_mib=128) as sandbox:
            container, _ = await begun(sandbox)
            metrics = await sandbox_metrics(sandbox)
            while (record := StateDirectory("talker").read()) is None or list(record.containers) != [container.id]:
                await asyncio.sleep(0.01)
            assert (record.state, record.owner.alive) == ("running", True)
            names = [name for name, _ in sandbox.timeline]
            await asyncio.sleep(0.1)
        return metrics, container.id, " < ".join(names)

    with log_as_json(said):
        metrics, container_id, marks = loop(life())

    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert {line["sandbox"] for line in lines} == {"talker"}
    told = [(line["logger"], line["msg"], line.get("container", "")) for line in lines]
    assert ("kata_lab.runtime", "container created", container_id) in told
    assert ("kata_lab.agent", "sandbox created", "") in told
    assert told[-1][:2] == ("kata_lab.runtime", "sandbox stopped")
    assert lines[-1]["reason"] == "it was stopped"
    assert re.search("prepared .*VM runs .*agent answers .*sandbox ready", marks)
    assert 'kata_lab_sandbox_state{state="running"} 1\n' in metrics
    assert re.search(r'kata_lab_vcpu_instructions_total\{vcpu="0"\} [1-9]\d{7,}\n', metrics)
    assert f'kata_lab_container_processes{{container="{container_id}"}} 1\n' in metrics
    count = r'kata_shim_agent_rpc_durations_histogram_milliseconds_count\{action="CreateContainer"\} 1\n'
    assert re.search(count, metrics)
    assert "kata_guest_meminfo" in metrics
    families = re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE)
    assert len(families) == len(set(families))
