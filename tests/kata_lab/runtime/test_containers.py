"""Containers in a real guest: what their processes see, say and may do."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kata_lab.errors import KataLabError
from kata_lab.runtime import ContainerState, RuntimeFault
from kata_lab.ttrpc import RpcError
from tests.kata_lab.runtime.conftest import Guest
from tests.kata_lab.runtime.cycles import Held, settled, steady

SHELL = {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin:/usr/bin"]}


def entered(script: str, **more: Any) -> dict[str, Any]:
    """The description of an exec."""
    return {**SHELL, "args": ["sh", "-c", script], **more}


def test_environment_user_and_directory_are_as_asked(guest: Guest) -> None:
    result = guest.shell("echo $A; id -u; id -g; pwd; hostname", env=["A=b c"], user="33:34", cwd="/tmp", hostname="me")

    assert result.splitlines() == ["b c", "33", "34", "/tmp", "me"]


def test_capabilities_are_those_asked_for(guest: Guest) -> None:
    script = "grep CapEff /proc/self/status"

    assert int(guest.shell(script, cap_drop=["ALL"]).split()[1], 16) == 0
    assert int(guest.shell(script, cap_drop=["ALL"], cap_add=["SYS_TIME"]).split()[1], 16) == 1 << 25


def test_read_only_root_has_writable_tmpfs(guest: Guest) -> None:
    script = "touch /x 2>/dev/null && exit 9; touch /scratch/x; df -k /scratch | tail -1 | awk '{print $2}'"

    assert guest.shell(script, read_only=True, tmpfs=["/scratch:size=1m"]).strip() == "1024"


def test_what_a_container_writes_is_its_own_and_goes_with_it(guest: Guest) -> None:
    free = "df -k / | tail -1 | awk '{print $3}'"
    before = int(guest.shell(free))
    guest.shell("echo x > /etc/left; dd if=/dev/zero of=/large bs=1M count=9; mkdir -p /a/b/c", container_id="same")

    assert guest.run("cat", "/etc/left", container_id="same").status == 1
    for _ in range(20):
        if int(guest.shell(free)) < before + 4000:
            return
    pytest.fail("the disk still has what it wrote")


def test_limits_are_seen_in_the_control_group(guest: Guest) -> None:
    script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max"

    assert guest.shell(script, memory="16m", cpus=0.5, pids=20).split() == ["16777216", "50000", "100000", "20"]


def test_first_process_is_number_one_and_sees_only_its_own(guest: Guest) -> None:
    assert guest.shell("echo $$; ls -d /proc/[0-9]* | wc -l").split()[0] == "1"


@pytest.mark.parametrize("status", [0, 1, 42, 127, 255])
def test_exit_status_is_told(guest: Guest, status: int) -> None:
    assert guest.run("sh", "-c", f"exit {status}").status == status


def test_signals_end_a_process_with_their_numbers(guest: Guest) -> None:
    container, _ = guest.started("sleep", "1000")
    numbers = [
        *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT, signal.SIGKILL, signal.SIGUSR1, signal.SIGUSR2),
        *(signal.SIGPIPE, signal.SIGALRM, signal.SIGTERM, signal.SIGVTALRM, signal.SIGRTMIN, signal.SIGRTMAX),
    ]

    async def ended(number: int) -> int:
        process = await container.exec({**SHELL, "args": ["sleep", "1000"]})
        await process.kill(number)
        return await process.wait()

    async def every() -> list[int]:
        return await asyncio.gather(*(ended(number) for number in numbers))

    try:
        assert guest.wait(every()) == [128 + number for number in numbers]
        # To all: those that were started in it, too.
        late = guest.wait(container.exec({**SHELL, "args": ["sleep", "1000"]}))
        guest.wait(container.kill(signal.SIGKILL, everyone=True))
        assert guest.wait(late.wait()) == guest.wait(container.wait()) == 137
        assert container.state is ContainerState.STOPPED
    finally:
        guest.remove(container)


def test_signal_is_handled_by_the_first_process(guest: Guest) -> None:
    container, process = guest.started("sh", "-c", "trap 'echo got; exit 5' TERM; echo up; while :; do sleep 0.1; done")
    try:
        assert guest.wait(process.stdout.read()) == b"up\n"
        guest.wait(process.kill(signal.SIGTERM))

        assert guest.wait(process.communicate()) == (5, b"got\n", b"")
        guest.wait(process.kill(signal.SIGTERM))  # it has ended, which is no error
    finally:
        guest.remove(container)


def test_input_reaches_its_end_byte_for_byte(guest: Guest) -> None:
    data = os.urandom(300_000)

    result = guest.run("sh", "-c", "tee /dev/stderr; sync", stdin=data)

    assert (result.status, result.stdout, result.stderr) == (0, data, data)


def test_a_process_that_wants_no_input_is_not_waited_for(guest: Guest) -> None:
    result = guest.run("sh", "-c", "exec <&-; echo done", stdin=bytes(1 << 20))

    assert (result.status, result.stdout) == (0, b"done\n")


def test_a_hundred_megabytes_of_output_arrive_whole(guest: Guest, tmp_path: Path) -> None:
    data = os.urandom(100_000_000)
    (tmp_path / "data").write_bytes(data)

    result = guest.run("cat", "/data", volumes=[f"{tmp_path}/data:/data:ro"])

    assert hashlib.sha256(result.stdout).hexdigest() == hashlib.sha256(data).hexdigest()


def test_more_output_than_allowed_is_refused_in_one_sentence(guest: Guest) -> None:
    with pytest.raises(RuntimeFault, match="more than 1000 bytes"):
        guest.run("yes", limit=1000)

    assert not guest.sandbox.containers


def test_terminal_has_a_size_that_can_change(guest: Guest) -> None:
    script = "trap 'stty size' WINCH; tty; echo up; read a || read a; echo [$a]; cat; exit 3"
    container, process = guest.started("sh", "-c", script, tty=True)

    async def until(end: bytes) -> bytes:
        seen = b""
        while end not in seen:
            chunk = await process.stdout.read()
            assert chunk, seen
            seen += chunk
        return seen

    try:
        assert b"/dev/pts/0" in guest.wait(until(b"up\r\n"))
        guest.wait(process.resize(33, 44))
        guest.wait(process.stdin.write(b"hello\n"))
        assert b"33 44" in guest.wait(until(b"[hello]"))
        guest.wait(process.stdin.close())
        assert guest.wait(process.wait()) == 3
    finally:
        guest.remove(container)


def test_fifty_execs_at_once(guest: Guest) -> None:
    container, _ = guest.started("sleep", "1000")

    async def execute(number: int) -> tuple[int, bytes, bytes]:
        process = await container.exec(entered(f"cat; echo {number} >&2; exit {number}"))
        return await process.communicate(f"{number}".encode())

    async def every() -> list[tuple[int, bytes, bytes]]:
        return await asyncio.gather(*(execute(number) for number in range(50)))

    try:
        results = guest.wait(every())
    finally:
        guest.remove(container)

    assert results == [(number, f"{number}".encode(), f"{number}\n".encode()) for number in range(50)]
    assert not container.execs


def test_exec_has_its_own_user_and_refuses_a_name_that_is_taken(guest: Guest) -> None:
    container, _ = guest.started("sleep", "1000")
    try:
        process = guest.wait(container.exec(entered("id -u; cat", user={"uid": 7, "gid": 7}), "mine"))
        with pytest.raises(RuntimeFault, match="a process 'mine' already"):
            guest.wait(container.exec(SHELL, "mine"))
        assert guest.wait(process.communicate(b"!")) == (0, b"7\n!", b"")
        with pytest.raises(RpcError, match="nosuch"):
            guest.wait(container.exec({**SHELL, "args": ["nosuch"]}))
        assert not container.execs
    finally:
        guest.remove(container)


def test_container_that_ran_out_of_memory_says_so(guest: Guest) -> None:
    container, process = guest.started("dd", "if=/dev/zero", "of=/dev/null", "bs=64M", memory="8m")

    async def seen() -> bool:
        for _ in range(200):
            if container.out_of_memory:
                return True
            await asyncio.sleep(0.01)
        return False

    try:
        assert guest.wait(process.wait()) == 137
        assert guest.wait(seen())
    finally:
        guest.remove(container)


def test_limits_change_while_it_runs(guest: Guest) -> None:
    container, _ = guest.started("sleep", "1000", memory="16m")
    try:
        guest.wait(container.update({"memory": {"limit": 32 << 20}, "cpu": {"quota": 20000, "period": 100000}}))

        shown = guest.wait(container.exec(entered("cd /sys/fs/cgroup; cat memory.max cpu.max")))
        assert guest.wait(shown.communicate())[1].split() == [b"33554432", b"20000", b"100000"]
        with pytest.raises(KataLabError, match=r"\$\.memory"):
            guest.wait(container.update({"memory": {"limit": "much"}}))
    finally:
        guest.remove(container)


def test_paused_container_stands_still(guest: Guest) -> None:
    script = "while :; do echo x >> /count; sleep 0.01; done"
    container, _ = guest.started("sh", "-c", script)

    async def usage() -> int:
        return int((await container.stats())["cgroup_stats"]["cpu_stats"]["cpu_usage"]["total_usage"])

    async def still() -> bool:
        before = await usage()
        await asyncio.sleep(0.1)
        return await usage() == before

    try:
        guest.wait(container.pause())
        assert container.state is ContainerState.PAUSED
        assert guest.wait(still())
        with pytest.raises(RuntimeFault, match="is paused; to be paused it must be running"):
            guest.wait(container.pause())
        guest.wait(container.resume())
        assert not guest.wait(still())
        guest.wait(container.pause())
    finally:
        guest.remove(container)  # also one that is paused


def test_stats_count_what_it_uses(guest: Guest) -> None:
    container, _ = guest.started("sleep", "1000", memory="16m", pids=9)
    try:
        stats = guest.wait(container.stats())["cgroup_stats"]
    finally:
        guest.remove(container)

    assert stats["memory_stats"]["usage"]["limit"] == 16 << 20
    assert 0 < stats["memory_stats"]["usage"]["usage"] < 16 << 20
    assert (stats["pids_stats"]["current"], stats["pids_stats"]["limit"]) == (1, 9)


def test_volumes_are_directories_and_files_of_the_host(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("from the host\n")
    (tmp_path / "safe").write_text("safe\n")
    volumes = [f"{tmp_path}/directory:/data", f"{tmp_path}/file:/etc/one", f"{tmp_path}/safe:/etc/safe:ro"]
    script = "cat /etc/one; echo changed > /etc/one; echo made > /data/new; echo x > /etc/safe"

    result = guest.run("sh", "-c", script, volumes=volumes)

    assert result.stdout == b"from the host\n"
    assert result.status == 1
    assert b"Read-only" in result.stderr
    assert (tmp_path / "directory/new").read_text() == "made\n"
    assert (tmp_path / "file").read_text() == "changed\n"
    assert (tmp_path / "safe").read_text() == "safe\n"


def test_volume_is_shared_by_two_containers(guest: Guest, tmp_path: Path) -> None:
    reader, process = guest.started(
        *("sh", "-c", "while [ ! -s /data/word ]; do sleep 0.02; done; cat /data/word"), volumes=[f"{tmp_path}:/data"]
    )
    try:
        guest.shell("echo hello > /data/part; mv /data/part /data/word", volumes=[f"{tmp_path}:/data"])

        assert guest.wait(process.communicate())[1] == b"hello\n"
    finally:
        guest.remove(reader)


def test_a_name_can_be_used_again_for_another_volume(guest: Guest, tmp_path: Path) -> None:
    seen = []
    for number in range(3):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "number").write_text(str(number))
        seen.append(guest.shell("cat /data/number", container_id="again", volumes=[f"{place}:/data"]))

    assert seen == ["0", "1", "2"]


def test_container_is_removed_while_an_exec_runs(guest: Guest) -> None:
    container, first = guest.started("sleep", "1000")
    process = guest.wait(container.exec(entered("echo up; sleep 1000")))
    assert guest.wait(process.stdout.read()) == b"up\n"

    async def removed() -> tuple[int, int]:
        waiting = asyncio.create_task(process.wait())
        reading = asyncio.create_task(process.stdout.read())
        await asyncio.sleep(0)
        await asyncio.gather(container.remove(), container.remove())
        await asyncio.gather(reading, return_exceptions=True)
        return await waiting, await first.wait()

    assert guest.wait(removed()) == (137, 137)
    assert container.id not in guest.sandbox.containers
    with pytest.raises(RuntimeFault, match="is removed and cannot be entered"):
        guest.wait(container.exec(SHELL))


def test_commands_at_once_are_ordered(guest: Guest) -> None:
    container = guest.container("sleep", "1000", container_id="busy")

    async def at_once() -> Any:
        commands = [container.start(), container.start(), container.pause(), container.resume(), container.pause()]
        more = [
            guest.sandbox.new_container(["true"], container_id="busy"),
            container.remove(),
            container.remove(),
            container.remove(),
        ]
        return await asyncio.gather(*commands, *more, return_exceptions=True)

    outcomes = guest.wait(at_once())

    assert outcomes[0] is container.process
    assert "is running; to be started it must be created" in str(outcomes[1])
    assert "already" in str(outcomes[5])
    assert outcomes[2:5] == outcomes[6:] == [None, None, None]
    assert guest.run("true", container_id="busy").status == 0


def test_creation_that_is_cancelled_leaves_no_container(guest: Guest) -> None:
    async def cancelled(seconds: float) -> None:
        creating = asyncio.create_task(guest.sandbox.run(["true"], container_id="brief"))
        await asyncio.sleep(seconds)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        assert "brief" not in guest.sandbox.containers

    for seconds in (0, 0.002, 0.01, 0.03, 0.06, 0.1, 0.2):
        guest.wait(cancelled(seconds))

    assert guest.run("true", container_id="brief").status == 0
    assert not guest.sandbox.containers


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({"cwd": "relative"}, r"\$\.process\.cwd"),
        ({"volumes": ["/nosuch:/x"]}, "does not exist"),
        ({"volumes": ["/dev/null:/x"]}, "neither a directory nor a file"),
        ({"volumes": ["/etc:/../x"]}, "without '..'"),
        ({"user": "nosuch"}, "nosuch"),
        ({"cap_add": ["EVERYTHING"]}, "EVERYTHING"),
        ({"memory": "1"}, "memory"),
        ({"hostname": "a" * 300}, "hostname"),
        ({"container_id": "../up"}, "name"),
    ],
)
def test_a_bad_wish_is_refused_and_leaves_nothing(guest: Guest, wish: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KataLabError, match=complaint):
        guest.run("true", **wish)

    assert not guest.sandbox.containers


def test_a_program_that_is_not_there_is_told(guest: Guest) -> None:
    with pytest.raises(KataLabError, match="nosuch"):
        guest.run("/bin/nosuch")

    assert not guest.sandbox.containers


def test_sandbox_that_is_paused_stands_still_and_takes_nothing_new(guest: Guest) -> None:
    guest.wait(guest.sandbox.pause())
    with pytest.raises(RuntimeFault, match="is paused and cannot be given a container; resume it first"):
        guest.run("true")
    with pytest.raises(RuntimeFault, match="is paused and cannot be paused"):
        guest.wait(guest.sandbox.pause())
    guest.wait(guest.sandbox.resume())

    assert guest.run("true").status == 0
    with pytest.raises(RuntimeFault, match="is running and cannot be resumed"):
        guest.wait(guest.sandbox.resume())


def test_twenty_containers_leave_nothing(guest: Guest) -> None:
    async def lives() -> tuple[Held, Held]:
        await guest.sandbox.run(["true"])
        before = await steady()
        for _ in range(20):
            assert (await guest.sandbox.run(["echo", "x"])).output == "x\n"
        return before, await settled(before)

    before, after = guest.wait(lives())

    assert after == before
    metrics = guest.wait(guest.sandbox.agent.call("GetMetrics"))["metrics"]
    assert "kata_agent_containers 0" in metrics.splitlines()
