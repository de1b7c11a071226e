"""containerd's Task API, as containerd calls it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kata_lab.protocol.proto import load
from kata_lab.protocol.wire import decode
from kata_lab.shim.client import ShimClient
from kata_lab.ttrpc import RpcError, StatusCode
from tests.kata_lab.cli_process import environment
from tests.kata_lab.shim.serving import bounded, bundle_of, output_of, recorded, serving, until

STATUS = load("task.proto").enums["containerd.v1.types.Status"]


async def created(client: ShimClient, home: Path, name: str, *args: str, **request: Any) -> None:
    bundle = bundle_of(home / f"bundle-{name}", *args)
    await client.task("Create", id=name, bundle=str(bundle), **request)


def test_life_of_a_container_from_a_bundle_through_named_pipes(home: Path) -> None:
    async def body() -> None:
        for name in ("in", "out", "err"):
            os.mkfifo(home / name)
        streams = {f"std{name}": str(home / name) for name in ("in", "out", "err")}
        reader = os.open(home / "out", os.O_RDONLY | os.O_NONBLOCK)
        async with serving("c1", stay=True) as serves, serves.client() as client:
            await created(client, home, "c1", "sh", "-c", "cat; echo err >&2; exit 3", **streams)
            state = await client.task("State", id="c1")
            assert (state["status"], state["stdout"]) == (STATUS["CREATED"], str(home / "out"))
            assert (await client.task("Start", id="c1"))["pid"] == os.getpid()
            assert (await client.task("State", id="c1"))["status"] == STATUS["RUNNING"]
            with (home / "in").open("wb") as typed:
                typed.write(b"hello\0\xff")
            await client.task("CloseIO", id="c1", stdin=True)
            ended = await client.task("Wait", id="c1")
            assert ended["exit_status"] == 3
            assert ended["exited_at"]["seconds"] > 1_600_000_000
            assert os.read(reader, 100) == b"hello\0\xff"
            state = await client.task("State", id="c1")
            assert (state["status"], state["exit_status"]) == (STATUS["STOPPED"], 3)
            assert (await client.task("Delete", id="c1"))["exit_status"] == 3
            with pytest.raises(RpcError) as raised:
                await client.task("State", id="c1")
            assert raised.value.code is StatusCode.NOT_FOUND
            await client.task("Shutdown", id="c1")
            assert await client.closed(10)
        os.close(reader)

    bounded(body)


def test_output_goes_to_files_too(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            place = f"file://{home}/out%20put"
            await created(client, home, "c1", "sh", "-c", "echo out", stdout=place)
            await client.task("Start", id="c1")
            await client.task("Wait", id="c1")
            await until(lambda: (home / "out put").read_bytes() == b"out\n")

    bounded(body)


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        ({"stdout": "binary:///bin/sh?x"}, StatusCode.INVALID_ARGUMENT, "stdout is 'binary:///bin/sh\\?x'"),
        ({"checkpoint": "/tmp/x"}, StatusCode.UNIMPLEMENTED, "makes no checkpoints"),
        ({"rootfs": [{"type": "ext4"}]}, StatusCode.UNIMPLEMENTED, r"rootfs\[0\].type is 'ext4': it must be bind"),
        ({"rootfs": [{"type": "bind", "source": "a"}]}, StatusCode.INVALID_ARGUMENT, r"rootfs\[0\].source is 'a'"),
        (
            {"rootfs": [{"type": "bind", "source": "/", "target": "../../x"}]},
            StatusCode.INVALID_ARGUMENT,
            "must not lead out of the root",
        ),
        (
            {"rootfs": [{"type": "overlay", "options": ["lowerdir=" + "x" * 5000]}]},
            StatusCode.INVALID_ARGUMENT,
            "more than the 4095 bytes",
        ),
    ],
)
def test_requests_that_cannot_be_carried_out_say_so(
    home: Path, request_: dict[str, Any], code: StatusCode, said: str
) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            with pytest.raises(RpcError, match=said) as raised:
                await created(client, home, "c1", "true", **request_)
            assert raised.value.code is code

    bounded(body)


def test_bundle_with_a_wrong_configuration_is_refused_with_its_path(home: Path) -> None:
    async def body() -> None:
        bundle = bundle_of(home / "bundle", "true")
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"]["cwd"] = "/../etc"
        (bundle / "config.json").write_text(json.dumps(spec))
        async with serving("c1", stay=True) as serves, serves.client() as client:
            with pytest.raises(RpcError, match=r"\$\.process\.cwd"):
                await client.task("Create", id="c1", bundle=str(bundle))
            assert serves.sandboxes == []

    bounded(body)


def snapshot(home: Path) -> list[dict[str, Any]]:
    """Two layers, and a directory that is bound over one of theirs."""
    for name in ("lower/data", "upper", "more"):
        (home / name).mkdir(parents=True)
    (home / "lower" / "file").write_text("lower")
    (home / "upper" / "file").write_text("upper")
    (home / "more" / "bound").write_text("bound")
    overlay = {"type": "overlay", "source": "overlay", "options": [f"lowerdir={home}/upper:{home}/lower"]}
    return [overlay, {"type": "bind", "source": f"{home}/more", "target": "/data", "options": ["rbind", "ro"]}]


def mounts_below(home: Path) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line]


def test_mounts_of_the_request_are_the_root_until_the_container_is_deleted(home: Path) -> None:
    async def body() -> None:
        root = home / "bundle-c1" / "rootfs"
        mounts = snapshot(home)
        async with serving("c1", stay=True) as serves, serves.client() as client:
            if os.geteuid() != 0:
                with pytest.raises(RpcError, match="which only root may do"):
                    await created(client, home, "c1", "true", rootfs=mounts)
                return
            await created(client, home, "c1", "true", rootfs=mounts)
            assert ((root / "file").read_text(), (root / "data" / "bound").read_text()) == ("upper", "bound")
            with pytest.raises(OSError, match="Read-only"):
                (root / "data" / "bound").write_text("changed")
            await client.task("Start", id="c1")
            await client.task("Wait", id="c1")
            await client.task("Delete", id="c1")
            assert (mounts_below(home), list(root.iterdir())) == ([], [])

    bounded(body)


@pytest.mark.parametrize("fault", ["mount", "container", "end"])
def test_mounts_go_when_the_container_cannot_be_made_or_its_sandbox_ends(home: Path, fault: str) -> None:
    async def body() -> None:
        mounts = snapshot(home)
        if fault == "mount":
            mounts.append({"type": "bind", "source": f"{home}/nowhere", "options": ["bind"]})
        async with serving("c1", stay=True) as serves, serves.client() as client:
            with contextlib.suppress(RpcError) if fault == "end" else pytest.raises(RpcError):
                await created(client, home, "c1", "/no/create" if fault == "container" else "true", rootfs=mounts)
        assert mounts_below(home) == []

    bounded(body)


def test_mounts_of_a_shim_are_nobody_elses_and_end_with_it(home: Path) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "tests.kata_lab.shim.fake", "--id", "c1", "--stay", "--ready", str(writer)]
    with subprocess.Popen(command, env=environment(), pass_fds=[writer]) as shim:
        os.close(writer)
        assert os.read(reader, 100) == b"{}\n"
        os.close(reader)

        async def body() -> None:
            async with ShimClient.connect("c1") as client:
                with contextlib.suppress(RpcError) if os.geteuid() else contextlib.nullcontext():
                    await created(client, home, "c1", "true", rootfs=snapshot(home))

        bounded(body)
        seen = mounts_below(home)
        shim.kill()

    assert (seen, list((home / "bundle-c1" / "rootfs").iterdir())) == ([], [])


def test_checkpoints_are_not_made(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            with pytest.raises(RpcError, match="this shim makes no checkpoints") as raised:
                await client.task("Checkpoint", id="c1")
            assert raised.value.code is StatusCode.UNIMPLEMENTED

    bounded(body)


def test_pause_stats_update_and_pids(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            await created(client, home, "c1", "sleep", "60")
            await client.task("Start", id="c1")
            await client.task("Pause", id="c1")
            assert (await client.task("State", id="c1"))["status"] == STATUS["PAUSED"]
            with pytest.raises(RpcError, match="is paused; to be paused it must be running"):
                await client.task("Pause", id="c1")
            await client.task("Resume", id="c1")
            assert (await client.task("Pids", id="c1"))["processes"] == [{"pid": os.getpid(), "info": None}]
            await client.update("c1", {"memory": {"limit": 64 << 20}})
            assert serves.sandboxes[0].agent.updates[0]["Memory"]["Limit"] == 64 << 20
            with pytest.raises(RpcError, match=r"\$\.memory\.limit"):
                await client.update("c1", {"memory": {"limit": "lots"}})
            found = (await client.task("Stats", id="c1"))["stats"]
            assert found["type_url"] == "io.containerd.cgroups.v2.Metrics"
            metrics = decode(load("cgroup_metrics.proto").messages, found["type_url"], found["value"])
            assert (metrics["cpu"]["usage_usec"], metrics["memory"]["usage_limit"]) == (5000, 64 << 20)
            connect = await client.task("Connect", id="c1")
            assert (connect["shim_pid"], connect["version"]) == (os.getpid(), "2")

    bounded(body)


def test_container_that_runs_is_not_deleted(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            await created(client, home, "c1", "sleep", "60")
            await client.task("Start", id="c1")
            with pytest.raises(RpcError, match="is running: kill it first"):
                await client.task("Delete", id="c1")
            with pytest.raises(RpcError, match="to be started it must be created"):
                await client.task("Start", id="c1")
            await client.task("Kill", id="c1", signal=signal.SIGKILL)
            assert (await client.task("Wait", id="c1"))["exit_status"] == 137
            with pytest.raises(RpcError, match="has ended already") as raised:
                await client.task("Kill", id="c1", signal=signal.SIGKILL)
            assert raised.value.code is StatusCode.NOT_FOUND

    bounded(body)


def test_container_that_was_never_started_is_deleted(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            await created(client, home, "c1", "true")
            await client.task("Delete", id="c1")
            assert serves.sandboxes[0].containers == {}
            await created(client, home, "c2", "true")
            await client.task("Kill", id="c2", signal=signal.SIGKILL)
            assert serves.sandboxes[0].containers == {}

    bounded(body)


def test_exec_has_a_life_of_its_own(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            await created(client, home, "c1", "sleep", "60")
            process = {"args": ["sh", "-c", "echo in; exit 4"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
            spec = {"type_url": "types.containerd.io/Process", "value": json.dumps(process).encode()}
            ids = {"id": "c1", "exec_id": "e1"}
            with pytest.raises(RpcError, match="to be entered it must be running"):
                await client.task("Exec", **ids, spec=spec)
            await client.task("Start", id="c1")
            await client.task("Exec", **ids, spec=spec, stdout=str(home / "out"))
            assert (await client.task("State", **ids))["status"] == STATUS["CREATED"]
            with pytest.raises(RpcError, match="has a process 'e1' already"):
                await client.task("Exec", **ids, spec=spec)
            await client.task("Start", **ids)
            assert (await client.task("Wait", **ids))["exit_status"] == 4
            assert (await client.task("State", **ids))["status"] == STATUS["STOPPED"]
            await until(lambda: (home / "out").read_bytes() == b"in\n")
            assert (await client.task("Delete", **ids))["exit_status"] == 4
            with pytest.raises(RpcError, match="has no process 'e1'"):
                await client.task("State", **ids)

    bounded(body)


def test_exec_that_says_only_how_it_differs_takes_the_rest_from_its_container(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sleep", "60", wishes={"hostname": "till"})
        async with serving(directory.id, directory) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)
            wish = {"args": ["sh", "-c", "echo $HOSTNAME $NEW"], "env": ["NEW=1"]}
            await client.exec(directory.id, "e1", wish)
            async with client.attach(directory.id, "e1") as stream:
                await client.task("Start", id=directory.id, exec_id="e1")
                assert await output_of(stream) == (0, b"till 1\n", b"")
            with pytest.raises(RpcError, match="nosuch"):
                await client.exec(directory.id, "e2", {**wish, "user": "nosuch"})

    bounded(body)


def test_fifty_execs_at_once_each_have_their_own_output(root: Path) -> None:
    import asyncio

    async def body() -> None:
        directory = recorded(root, "sleep", "60")
        async with serving(directory.id, directory) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)

            async def one(number: int) -> tuple[int, bytes, bytes]:
                name = f"e{number}"
                await client.exec(directory.id, name, {"args": ["sh", "-c", f"echo {number}; exit {number}"]})
                async with client.attach(directory.id, name) as stream:
                    await client.task("Start", id=directory.id, exec_id=name)
                    return await output_of(stream)

            found = await asyncio.gather(*(one(number) for number in range(50)))
            assert found == [(number, b"%d\n" % number, b"") for number in range(50)]

    bounded(body)


def test_nothing_of_no_container_is_known(home: Path) -> None:
    async def body() -> None:
        async with serving("c1", stay=True) as serves, serves.client() as client:
            for method in ("State", "Start", "Delete", "Pids", "Pause", "Resume", "Kill", "Wait", "Stats", "Update"):
                with pytest.raises(RpcError, match=r"has no container 'c9'|must be the JSON") as raised:
                    await client.task(method, id="c9")
                assert raised.value.code in (StatusCode.NOT_FOUND, StatusCode.INVALID_ARGUMENT)

    bounded(body)
