"""The checks of notebook 4: what is unsolved is "not yet", what is wrong is named, what is right passes.

The solutions are the instructor's answers, and nowhere in the notebook. One sandbox serves all tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kata_lab.lab.container_exercise import check_configuration, check_pod
from kata_lab.oci import ImageHandle, ensure_busybox, make_spec
from kata_lab.runtime import Container, Sandbox
from tests.kata_lab.lab.answers import answered

pytestmark = pytest.mark.usefixtures("boot_guest")

WRITE = "while :; do echo $((n=n+1)) >>/out/numbers; sleep 0.2; done"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def image() -> Iterator[ImageHandle]:
    with ensure_busybox(progress="off") as handle:
        yield handle


async def started() -> Sandbox:
    sandbox = Sandbox.create(memory_mib=192)
    await sandbox.start()
    return sandbox


@pytest.fixture(scope="module")
def sandbox(runner: asyncio.Runner) -> Iterator[Sandbox]:
    made = runner.run(started())
    try:
        yield made
    finally:
        runner.run(made.stop())


def solution(original: dict[str, Any]) -> dict[str, Any]:
    mine = copy.deepcopy(original)
    answered("04-configuration", mine=mine)
    return mine


def without_user(mine: dict[str, Any]) -> None:
    mine["process"]["user"] = {"uid": 0, "gid": 0}


def with_writable_root(mine: dict[str, Any]) -> None:
    mine["root"]["readonly"] = False


def without_tmpfs(mine: dict[str, Any]) -> None:
    mine["mounts"].pop()


def with_private_tmpfs(mine: dict[str, Any]) -> None:
    mine["mounts"][-1]["options"] = ["mode=0755"]


def without_limit(mine: dict[str, Any]) -> None:
    del mine["linux"]["resources"]["memory"]


def with_unknown_field(mine: dict[str, Any]) -> None:
    mine["root"]["readOnly"] = True


def without_process(mine: dict[str, Any]) -> None:
    del mine["process"]


def with_another_program(mine: dict[str, Any]) -> None:
    mine["process"]["args"] = ["true"]


def test_the_unsolved_configuration_is_not_yet(runner: asyncio.Runner, sandbox: Sandbox, image: ImageHandle) -> None:
    spec = make_spec(image, ["sleep", "1000"])

    assert runner.run(check_configuration(copy.deepcopy(spec), spec, image, sandbox)).verdict == "not yet"


def test_the_right_configuration_passes(runner: asyncio.Runner, sandbox: Sandbox, image: ImageHandle) -> None:
    spec = make_spec(image, ["sleep", "1000"])

    assert runner.run(check_configuration(solution(spec), spec, image, sandbox)).passed
    assert not sandbox.containers


@pytest.mark.parametrize(
    ("spoil", "hint"),
    [
        (without_user, "look at process.user"),
        (with_writable_root, "look at root"),
        (without_tmpfs, "no mount at all"),
        (with_private_tmpfs, "user 1000 cannot write to it"),
        (without_limit, "memory.max is max"),
        (with_unknown_field, "did you mean 'readonly'?"),
        (with_another_program, "nothing in process.args"),
        (without_process, "process"),
    ],
)
def test_a_wrong_configuration_is_told_what_it_lacks(
    runner: asyncio.Runner,
    sandbox: Sandbox,
    image: ImageHandle,
    spoil: Callable[[dict[str, Any]], None],
    hint: str,
) -> None:
    spec = make_spec(image, ["sleep", "1000"])
    mine = solution(spec)
    spoil(mine)

    feedback = runner.run(check_configuration(mine, spec, image, sandbox))

    assert feedback.verdict == "not right"
    assert hint in feedback.text


@contextlib.asynccontextmanager
async def container(sandbox: Sandbox, command: str, *volumes: str) -> AsyncIterator[Container]:
    made = await sandbox.new_container(["sh", "-c", command], volumes=volumes)
    try:
        await made.start()
        yield made
    finally:
        await made.remove()


def test_the_unsolved_pod_is_not_yet(runner: asyncio.Runner, sandbox: Sandbox, tmp_path: Path) -> None:
    assert runner.run(check_pod(sandbox, None, None, tmp_path)).verdict == "not yet"


def test_the_right_pod_passes_and_a_half_one_does_not(runner: asyncio.Runner, sandbox: Sandbox, tmp_path: Path) -> None:
    async def check() -> None:
        async with (
            container(sandbox, WRITE, f"{tmp_path}:/out") as writer,
            container(sandbox, "sleep 1000", f"{tmp_path}:/in:ro") as reader,
        ):
            assert (await check_pod(sandbox, writer, reader, tmp_path)).passed
            assert "reader is None" in (await check_pod(sandbox, writer, None, tmp_path)).text
            assert "the same container" in (await check_pod(sandbox, writer, writer, tmp_path)).text
            assert "to be at /out there" in (await check_pod(sandbox, reader, writer, tmp_path)).text
        assert "no container of this sandbox" in (await check_pod(sandbox, writer, reader, tmp_path)).text

    runner.run(check())


def test_the_answer_to_the_pod_passes(runner: asyncio.Runner, sandbox: Sandbox, tmp_path: Path) -> None:
    async def container_named(name: str, args: list[str], **wishes: Any) -> Container:
        made = await sandbox.new_container(args, container_id=name, **wishes)
        await made.start()
        return made

    async def remove() -> None:
        for each in tuple(sandbox.containers.values()):
            await each.remove()

    try:
        answer = answered("04-pod", runner, place=tmp_path, container_named=container_named)

        assert runner.run(check_pod(sandbox, answer["writer"], answer["reader"], tmp_path)).passed
    finally:
        runner.run(remove())


@pytest.mark.parametrize(
    ("write", "access", "hint"),
    [
        (WRITE, "", "the reader could make a file"),
        ("echo 1 >>/out/numbers; sleep 1000", ":ro", "does not grow"),
        ("sleep 1000", ":ro", "not there or empty"),
        ("exit 3", ":ro", "with status 3"),
    ],
)
def test_a_wrong_pod_is_told_what_it_lacks(
    runner: asyncio.Runner, sandbox: Sandbox, tmp_path: Path, write: str, access: str, hint: str
) -> None:
    async def check() -> str:
        async with (
            container(sandbox, write, f"{tmp_path}:/out") as writer,
            container(sandbox, "sleep 1000", f"{tmp_path}:/in{access}") as reader,
        ):
            if write.startswith("exit"):
                await writer.wait()
            feedback = await check_pod(sandbox, writer, reader, tmp_path)
            assert feedback.verdict == "not right"
            return feedback.text

    assert hint in runner.run(check())


def test_numbers_that_somebody_else_writes_are_seen(runner: asyncio.Runner, sandbox: Sandbox, tmp_path: Path) -> None:
    async def check() -> str:
        async with (
            container(sandbox, "sleep 1000", f"{tmp_path}:/out") as writer,
            container(sandbox, WRITE, f"{tmp_path}:/out", f"{tmp_path}:/in") as reader,
        ):
            return (await check_pod(sandbox, writer, reader, tmp_path)).text

    assert "grows although the writer is paused" in runner.run(check())


def test_the_fourth_notebook_holds_the_exercises_and_not_their_solutions() -> None:
    place = Path(__file__).parents[3] / "notebooks" / "04-run-a-container.ipynb"
    cells = [cell.source for cell in nbformat.read(place, as_version=4).cells]

    assert any("await check_configuration(mine, spec, image, sandbox)" in cell for cell in cells)
    assert any("await check_pod(sandbox, writer, reader, place)" in cell for cell in cells)
    assert not any(">>/out/numbers" in cell or ":/in:ro" in cell or "1777" in cell for cell in cells)
