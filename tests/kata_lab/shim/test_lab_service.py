"""Containers with records, and what ``kata-lab`` asks of their shim."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from kata_lab.errors import KataLabError
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.shim.output_log import read_log
from kata_lab.shim.records import UNKNOWN_STATUS, RecordError, ShimDirectory
from kata_lab.ttrpc import RpcError, StatusCode
from tests.kata_lab.shim.serving import bounded, output_of, recorded, run_alone, serving, until


def test_attached_before_the_start_nothing_is_missed(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sh", "-c", "echo out; echo err >&2; exit 7")
        assert await run_alone(directory) == (7, b"out\n", b"err\n")
        record = directory.read()
        assert (record.state, record.status) == ("stopped", 7)
        assert {(piece.stream, piece.data) for piece in read_log(directory.log)} == {
            ("stdout", b"out\n"),
            ("stderr", b"err\n"),
        }
        assert not ShimDirectory(directory.id).path.exists()

    bounded(body)


def test_all_bytes_of_input_and_output_pass_to_every_viewer(root: Path) -> None:
    async def body() -> None:
        data = bytes(range(256)) * 4096
        directory = recorded(root, "cat", stdin=True)
        async with (
            serving(directory.id, directory) as serves,
            serves.client() as first,
            serves.client() as second,
            first.attach(directory.id) as stream,
            second.attach(directory.id) as watching,
        ):
            await first.task("Start", id=directory.id)
            seen = asyncio.create_task(output_of(watching))
            typed = asyncio.create_task(output_of(stream))
            for at in range(0, len(data), 50_000):
                await stream.send({"stdin": data[at : at + 50_000]})
            await stream.send({"close_stdin": True})
            assert await typed == (0, data, b"")
            assert await seen == (0, data, b"")

    bounded(body)


def test_container_without_input_reads_its_end(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "cat")
        assert await run_alone(directory) == (0, b"", b"")

    bounded(body)


def test_viewer_that_has_gone_does_not_stop_the_container(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sh", "-c", "head -c 5000000 /dev/zero; echo end >&2; read x", stdin=True)
        async with serving(directory.id, directory) as serves:
            async with serves.client() as client, client.attach(directory.id):
                await client.task("Start", id=directory.id)
            await until(lambda: any(piece.stream == "stderr" for piece in read_log(directory.log)))
            assert directory.read().state == "running"

    bounded(body)


def test_terminal_has_the_size_that_it_was_told_before_the_start_and_later(root: Path) -> None:
    async def body() -> None:
        script = "while :; do stty size; sleep 0.02; done"
        directory = recorded(root, "sh", "-c", script, wishes={"tty": True}, terminal=True)
        async with (
            serving(directory.id, directory) as serves,
            serves.client() as client,
            client.attach(directory.id) as stream,
        ):

            async def shown(text: bytes) -> None:
                seen = b""
                while text not in seen:
                    seen += ((await stream.receive()) or {})["stdout"]

            await client.task("ResizePty", id=directory.id, width=34, height=12)
            await client.task("Start", id=directory.id)
            await shown(b"12 34\r\n")
            await stream.send({"rows": 56, "columns": 78})
            await shown(b"56 78\r\n")
            await client.task("Kill", id=directory.id, signal=signal.SIGKILL)
            assert (await output_of(stream))[0] == 137

    bounded(body)


def test_output_kept_open_by_a_child_does_not_hide_the_end(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sh", "-c", "sleep 60 & echo started")
        assert await run_alone(directory) == (0, b"started\n", b"")

    bounded(body)


def test_container_that_removes_itself_is_gone_before_its_client_is_told(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "true", auto_remove=True)
        async with (
            serving(directory.id, directory) as serves,
            serves.client() as client,
            client.attach(directory.id) as stream,
        ):
            await client.task("Start", id=directory.id)
            await output_of(stream)
            assert not directory.path.exists()

    bounded(body)


def test_program_that_does_not_exist_fails_the_start_and_stops_the_container(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "/no/such/program")
        async with serving(directory.id, directory) as serves, serves.client() as client:
            with pytest.raises(RpcError, match="not found"):
                await client.task("Start", id=directory.id)
            record = directory.read()
            assert (record.state, record.status) == ("stopped", 127)
            assert "not found" in record.reason

    bounded(body)


def test_start_that_fails_leaves_nothing(root: Path) -> None:
    async def too_large() -> None:
        directory = recorded(root, "true", wishes={"memory": "100g"})
        with pytest.raises(RuntimeFault, match="too large for this machine"):
            async with serving(directory.id, directory):
                pass
        assert not ShimDirectory(directory.id).path.exists()

    async def second_container() -> None:
        first, second = recorded(root, "true", sandbox="pod-a"), recorded(root, "/no/create", sandbox="pod-a")
        with pytest.raises(KataLabError, match="cannot be created"):
            async with serving("pod-a", first, second):
                pass
        assert not ShimDirectory("pod-a").path.exists()
        assert first.read().state == "stopped"

    bounded(too_large)
    bounded(second_container)


def test_image_that_does_not_exist_fails_the_start(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root / "nothing", "true")
        with pytest.raises(RuntimeFault, match="must be a directory that exists"):
            async with serving(directory.id, directory):
                pass

    bounded(body)


def test_sandbox_is_sized_by_the_limits_of_its_containers(root: Path) -> None:
    async def body() -> None:
        first = recorded(root, "true", sandbox="pod-a", pod="shop", wishes={"cpus": 1.5, "memory": "64m"})
        second = recorded(root, "true", sandbox="pod-a", pod="shop", wishes={"cpus": 1, "memory": "32m"})
        async with serving("pod-a", first, second) as serves:
            config = serves.sandboxes[0].config
            assert (config.vcpus, config.memory_mib, config.hostname) == (3, 224, "shop")

    bounded(body)


def test_guest_that_dies_stops_its_containers_and_ends_the_shim(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sleep", "60")
        async with serving(directory.id, directory) as serves, serves.client() as client:
            async with client.attach(directory.id) as stream:
                await client.task("Start", id=directory.id)
                serves.sandboxes[0].lose("the kernel panicked")
                await output_of(stream)
            assert await client.closed(10)
        record = directory.read()
        assert (record.state, record.reason) == ("stopped", "the kernel panicked")

    bounded(body)


def test_guest_that_dies_before_the_start_stops_its_container(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "true")
        async with serving(directory.id, directory) as serves:
            serves.sandboxes[0].lose("the kernel panicked")
            await until(lambda: directory.read().state == "stopped")
        assert directory.read().status == UNKNOWN_STATUS

    bounded(body)


def test_containers_join_and_leave_a_sandbox(root: Path) -> None:
    async def body() -> None:
        first = recorded(root, "sleep", "60", sandbox="pod-a")
        async with serving("pod-a", first) as serves, serves.client() as client:
            await client.task("Start", id=first.id)
            joined = recorded(root, "sh", "-c", "exit 3", sandbox="pod-a")
            await client.lab("Create", id=joined.id)
            await client.task("Start", id=joined.id)
            assert (await client.task("Wait", id=joined.id))["exit_status"] == 3
            listed = (await client.lab("List"))["containers"]
            assert {each["id"]: each["state"] for each in listed} == {first.id: "running", joined.id: "stopped"}
            # One that has stopped starts anew.
            await client.lab("Create", id=joined.id)
            await client.task("Start", id=joined.id)
            assert (await client.task("Wait", id=joined.id))["exit_status"] == 3
            await client.task("Delete", id=joined.id)
            with pytest.raises(RpcError, match="has no container"):
                await client.task("State", id=joined.id)

    bounded(body)


def test_container_that_runs_is_not_created_again(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sleep", "60")
        async with serving(directory.id, directory) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)
            with pytest.raises(RpcError, match="is running already") as raised:
                await client.lab("Create", id=directory.id)
            assert raised.value.code is StatusCode.ALREADY_EXISTS
            with pytest.raises(RpcError, match="no container 0123456789ab any more"):
                await client.lab("Create", id="0123456789ab")

    bounded(body)


@pytest.mark.parametrize(
    ("policy", "status", "again"), [("on-failure", 1, True), ("on-failure", 0, False), ("always", 0, True)]
)
def test_policy_decides_whether_a_container_starts_again(root: Path, policy: str, status: int, again: bool) -> None:
    async def body() -> None:
        count = root / "count"
        script = f"echo x >> {count}; [ $(wc -l < {count}) -lt 3 ] || sleep 60; exit {status}"
        directory = recorded(root, "sh", "-c", script, restart=policy)
        async with serving(directory.id, directory) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)
            if again:
                await until(lambda: directory.read().restarts == 2 and directory.read().state == "running")
                # What somebody ends stays ended.
                await client.task("Kill", id=directory.id, signal=signal.SIGKILL)
            assert await client.closed(10)
        record = directory.read()
        assert (record.state, record.restarts) == ("stopped", 2 if again else 0)

    bounded(body)


def test_container_that_waits_to_start_again_can_be_ended(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "false", restart="always")
        async with serving(directory.id, directory) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)
            await until(lambda: directory.read().restarts == 1 and directory.read().state == "restarting")
            await client.task("Kill", id=directory.id, signal=signal.SIGTERM)
            assert await client.closed(10)
        assert directory.read().state == "stopped"

    bounded(body)


def test_logs_follow_until_the_end(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sh", "-c", "echo one; echo two; read x; echo three", stdin=True)
        async with serving(directory.id, directory) as serves, serves.client() as client, serves.client() as other:
            await client.task("Start", id=directory.id)
            await until(lambda: b"two\n" in b"".join(piece.data for piece in read_log(directory.log)))
            request = {"id": directory.id, "follow": True, "tail": 1}
            async with other._client.stream("katalab.v1.Lab", "Logs", request) as stream:
                first = await stream.receive()
                assert first is not None
                assert (first["stream"], first["data"]) == ("stdout", b"two\n")
                async with client.attach(directory.id) as typing:
                    await typing.send({"stdin": b"\n"})
                    assert [message["data"] async for message in stream] == [b"three\n"]

    bounded(body)


def test_timeline_and_metrics_tell_of_the_start(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "sh", "-c", "echo hello; exec sleep 60")
        async with serving(directory.id, directory) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)
            await until(lambda: list(read_log(directory.log)) != [])
            steps = (await client.lab("Timeline"))["milestones"]
            names = [each["name"] for each in steps]
            assert names[0] == "process"
            assert {"sandbox ready", f"{directory.id} started", f"first output of {directory.id}"} <= set(names)
            times = [each["at_us"] for each in steps]
            assert times == sorted(times)
            text = (await client.lab("Metrics"))["text"]
            assert 'kata_lab_containers{state="running"} 1\n' in text
            assert text.endswith("kata_guest_load 0.5\n")
            calls = "kata_shim_agent_rpc_durations_histogram_milliseconds"
            assert f'{calls}_count{{action="StartContainer"}} 1\n' in text
            assert f'{calls}_bucket{{action="StartContainer",le="1"}} 0\n' in text
            assert f'{calls}_bucket{{action="StartContainer",le="2"}} 1\n' in text
            names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
            assert len(names) == len(set(names))
            for line in text.splitlines():
                assert line.startswith("#") or float(line.rpartition(" ")[2]) >= 0

    bounded(body)


def test_attaching_to_what_is_not_there_is_refused(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "true", sandbox="pod-a")
        other = recorded(root, "sleep", "60", sandbox="pod-a")
        async with serving("pod-a", directory, other) as serves, serves.client() as client:
            await client.task("Start", id=directory.id)
            await client.task("Wait", id=directory.id)
            with pytest.raises(RpcError, match="has ended with status 0: start it first"):
                async with client.attach(directory.id):
                    pass
            with pytest.raises(RpcError, match="has no process 'x'"):
                async with client.attach(other.id, "x"):
                    pass

    bounded(body)


def test_record_that_is_gone_fails_the_start(root: Path) -> None:
    async def body() -> None:
        directory = recorded(root, "true")
        directory.remove()
        with pytest.raises(RecordError, match="any more"):
            async with serving(directory.id, directory):
                pass

    bounded(body)
