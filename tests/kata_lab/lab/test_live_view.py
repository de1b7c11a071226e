"""Views that are drawn again: what makes them, what they show, and that they stop."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kata_lab import lab
from kata_lab.errors import KataLabError
from kata_lab.lab.machines import LabError
from kata_lab.resource.sizing import SandboxSize
from kata_lab.runtime import SandboxConfig, SandboxState
from kata_lab.runtime.logs import logger_of
from vmm.config import BlockConfig
from vmm.metrics import ProcessMemory, VmMetrics

MIB = 1 << 20


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook's kernel looks like from inside."""
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))


def container(name: str, args: list[str], used: int = 0) -> Any:
    async def stats() -> dict[str, Any]:
        return {"cgroup_stats": {"memory_stats": {"usage": {"usage": used}}}}

    process = SimpleNamespace(status=None)
    return SimpleNamespace(
        id=name,
        spec={"process": {"args": args}},
        state="running",
        process=process,
        execs={"debug": process},
        stats=stats,
    )


def sandbox(*containers: Any) -> Any:
    """A stand-in that runs."""
    hypervisor = SimpleNamespace(
        name="rpc",
        get_pids=lambda: [4242],
        get_thread_ids=lambda: {"vcpu-0": 1, "vcpu-1": 2, "vm-loop": 3},
        get_hypervisor_metrics=lambda: VmMetrics(1.0, (), ProcessMemory(300 * MIB, 200 * MIB)),
    )
    return SimpleNamespace(
        id="web",
        state=SandboxState.RUNNING,
        paused=False,
        config=SandboxConfig(max_vcpus=4),
        size=SandboxSize(2, 256),
        most=SandboxSize(4, 256),
        plugged={"disk0": BlockConfig(path="/disk")},
        hypervisor=hypervisor,
        containers={each.id: each for each in containers},
        log=logger_of("web"),
        agent=SimpleNamespace(on_call=None),
        stopped=asyncio.Event(),
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_topology_names_every_part_from_the_host_to_the_process() -> None:
    shown = lab.topology_table(sandbox(container("shop", ["httpd", "-p", "80"])))

    parts = [tuple(row[:3]) for row in shown.rows]
    assert ("host", "VMM", "4242") in parts
    assert ("VM", "vCPUs", "2") in parts
    assert ("VM", "virtio-fs", "shared") in parts
    assert ("VM", "Block", "disk0") in parts
    assert parts[-3:] == [
        ("guest", "container", "shop"),
        ("guest", "process", "httpd -p 80"),
        ("guest", "process", "debug"),
    ]


def test_a_topology_is_drawn_with_its_words_and_with_what_a_guest_says_made_harmless() -> None:
    many = [container(f"c{number}", ["<script>"]) for number in range(20)]

    shown = lab.sandbox_topology(sandbox(*many))

    assert "container c19 (running)" in repr(shown)
    assert "<script>" not in shown.markup
    assert "and 8 more" in shown.markup


def test_a_sandbox_that_does_not_run_has_a_topology_of_the_host_alone() -> None:
    stopped = sandbox()
    stopped.state = SandboxState.STOPPED

    assert [row[0] for row in lab.topology_table(stopped).rows] == ["host"]
    assert "stopped" in repr(lab.sandbox_topology(stopped))


@pytest.mark.usefixtures("notebook")
def test_what_a_sandbox_says_draws_the_view_again() -> None:
    watched, drawn = sandbox(), []
    heard: list[object] = []
    watched.agent.on_call = heard.append
    view = lab.live(lambda: drawn.append(0) or lab.Picture("<p>", f"{len(drawn)}"), watched)
    with view:
        count = len(drawn)
        watched.log.debug("reached")
        until(lambda: len(drawn) > count)
        count = len(drawn)
        watched.agent.on_call("a call")
        until(lambda: len(drawn) > count)

    assert heard == ["a call"]
    assert watched.log.listeners == []
    assert watched.agent.on_call == heard.append
    count = len(drawn)
    view.changed()
    view.close()
    assert len(drawn) == count
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("live-")]


@pytest.mark.usefixtures("notebook")
def test_the_clock_draws_what_nobody_tells_of() -> None:
    drawn: list[int] = []

    with lab.live(lambda: drawn.append(0) or lab.Picture("<p>", ""), every=0.2):
        until(lambda: len(drawn) >= 3)

    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("live-")])


def test_without_widgets_a_view_is_the_picture_as_it_is() -> None:
    words = ["one"]
    view = lab.live(lambda: lab.Picture("<p>", words[-1]), every=1)
    words.append("two")

    assert repr(view) == "two"
    assert not any("widget" in kind for kind in view._repr_mimebundle_())


def test_a_view_that_cannot_be_drawn_yet_says_why() -> None:
    assert "start the sandbox first" in repr(lab.live(lambda: lab.sandbox_timeline([]), every=1))


def test_a_view_of_nothing_that_changes_is_refused() -> None:
    with pytest.raises(LabError, match="needs a sandbox to hear from, or a number of seconds"):
        lab.live(lambda: lab.Picture("", ""))
    with pytest.raises(LabError, match=re.escape("every is 0.01 s, it must be at least 0.2")):
        lab.live(lambda: lab.Picture("", ""), every=0.01)


async def watch_memory() -> lab.MemoryWatch:
    watched = sandbox(container("shop", ["httpd"], used=3 * MIB), container("db", ["db"], used=4 * MIB))
    with lab.MemoryWatch(watched, every=0.01) as watch:
        async with asyncio.timeout(30):
            while len(watch.samples) < 3:
                await asyncio.sleep(0.005)
        watched.state = SandboxState.STOPPED
        watched.stopped.set()
        await asyncio.wait_for(asyncio.wait([watch._task]), 30)
    return watch


def test_memory_is_sampled_until_the_sandbox_stops() -> None:
    watch = asyncio.run(watch_memory())

    last = watch.samples[-1]
    assert (last.guest, last.host, last.containers) == (256.0, 200.0, 7.0)
    assert "containers use 7.0 MiB" in repr(watch)
    assert watch.table.rows[-1][1:] == ("256.0", "200.0", "7.0")


def test_watching_memory_needs_an_event_loop() -> None:
    with pytest.raises(LabError, match="needs the sandbox's event loop"):
        lab.MemoryWatch(sandbox())


async def move_sliders() -> tuple[list[int], list[str], Any]:
    asked, told, watched = [], [], sandbox()

    async def resize(vcpus: int | None = None, memory_mib: int | None = None) -> SandboxSize:
        if vcpus == 4:
            raise KataLabError("there are not so many")
        asked.append(vcpus or 0)
        watched.size = SandboxSize(vcpus or watched.size.vcpus, memory_mib or watched.size.memory_mib)
        return watched.size

    watched.resize = resize
    controls = lab.HotplugControls(watched, told.append)
    slider = controls.widget().children[0]
    slider.value = 3  # as the page does
    await controls.settled()
    slider.value = 4
    await controls.settled()
    await controls.set(vcpus=1)
    return asked, told, slider


@pytest.mark.usefixtures("notebook")
def test_sliders_ask_and_then_stand_where_the_guest_is() -> None:
    asked, told, slider = asyncio.run(move_sliders())

    assert asked == [3, 1]
    assert told == [
        "the guest has 3 vCPUs and 256 MiB",
        "there are not so many; the guest has 3 vCPUs and 256 MiB",
        "the guest has 1 vCPUs and 256 MiB",
    ]
    assert slider.value == 1
