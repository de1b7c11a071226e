"""Containers through the agent's API: what their configuration asks for is what they are."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from tests.kata_lab.agent.guest import AgentGuest, InGuest, StatusCode, configuration

TWO_CAPABILITIES = {
    name: ["CAP_CHOWN", "CAP_KILL"] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")
}


def test_a_container_has_its_arguments_environment_and_directory(guest: AgentGuest) -> None:
    script = 'echo "$0 $1|$COLOUR|$(pwd)|$(hostname)|$$"'
    said = guest.output(
        ["/bin/sh", "-c", script, "zero", "one two"],
        env=["PATH=/bin", "COLOUR=blue = green"],
        cwd="/tmp",
        hostname="inside",
    )
    assert said == (0, "zero one two|blue = green|/tmp|inside|1\n")


@pytest.mark.parametrize("status", [0, 3, 255])
def test_the_exit_status_is_told(guest: AgentGuest, status: int) -> None:
    assert guest.output(["/bin/sh", "-c", f"exit {status}"]) == (status, "")


def test_a_user_with_groups_and_capabilities(guest: AgentGuest) -> None:
    status, said = guest.output(
        ["/bin/sh", "-c", "id -u; id -g; id -G; grep -E 'Cap(Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status"],
        user={"uid": 1000, "gid": 1001, "additionalGids": [7, 8]},
        capabilities=TWO_CAPABILITIES,
        noNewPrivileges=True,
    )
    words = said.split()
    assert status == 0
    assert words[:5] == ["1000", "1001", "1001", "7", "8"]
    values = dict(zip(words[5::2], words[6::2], strict=True))
    assert {int(values[f"Cap{name}:"], 16) for name in ("Eff", "Bnd", "Amb")} == {1 << 0 | 1 << 5}
    assert values["NoNewPrivs:"] == "1"


def test_a_read_only_root_has_a_tmpfs_and_masked_paths(guest: AgentGuest) -> None:
    status, said = guest.output(
        ["/bin/sh", "-c", "touch /x; touch /tmp/y && echo made; wc -c < /proc/keys; echo 1 > /proc/sys/vm/swappiness"],
        readonly=True,
        mounts=[{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=1777"]}],
        linux={"maskedPaths": ["/proc/keys"], "readonlyPaths": ["/proc/sys"]},
    )
    assert status != 0
    assert said.startswith("made\n0\n")
    assert said.count("Read-only file system") == 2


def test_limits_of_resources_and_sysctls_are_set(guest: AgentGuest) -> None:
    script = "ulimit -n; cat /proc/sys/kernel/msgmax; cd /sys/fs/cgroup; cat memory.max pids.max cpu.max"
    status, said = guest.output(
        ["/bin/sh", "-c", script],
        rlimits=[{"type": "RLIMIT_NOFILE", "hard": 100, "soft": 99}],
        mounts=[{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}],
        linux={
            "namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts", "cgroup")],
            "sysctl": {"kernel.msgmax": "4242"},
            "resources": {
                "memory": {"limit": 32 << 20},
                "pids": {"limit": 17},
                "cpu": {"quota": 50000, "period": 100000, "shares": 512},
            },
        },
    )
    assert (status, said.split()) == (0, ["99", "4242", str(32 << 20), "17", "50000", "100000"])


def test_devices_are_made_and_the_others_are_refused(guest: AgentGuest) -> None:
    status, said = guest.output(
        ["/bin/sh", "-c", "ls -l /dev/zeroes; head -c 3 /dev/zeroes | wc -c; mknod /k b 1 0 && cat /k"],
        mounts=[{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}],
        linux={
            "devices": [{"path": "/dev/zeroes", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "gid": 5}],
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm"},
                    {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
                    {"allow": True, "type": "b", "access": "m"},
                ]
            },
        },
        capabilities={name: ["CAP_MKNOD"] for name in ("bounding", "effective", "permitted")},
    )
    assert said.startswith("crw-r-----")
    assert "1,   5" in said
    assert "\n3\n" in said
    assert status == 1
    assert "Operation not permitted" in said


def test_seccomp_refuses_a_call_with_the_error_that_was_asked_for(guest: AgentGuest) -> None:
    rule = {"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    status, said = guest.output(
        ["/bin/mkdir", "/tmp/new"], linux={"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}}
    )
    assert (status, "No space left" in said) == (1, True)


def test_containers_can_share_the_pid_namespace_of_the_sandbox(guest: AgentGuest) -> None:
    with (
        guest.container(["/bin/sleep", "1234"], request={"sandbox_pidns": True}),
        guest.container(["/bin/sh", "-c", "ps | grep -c 'slee[p] 1234'"], request={"sandbox_pidns": True}) as other,
    ):
        assert other.finish() == (0, "1\n")


def test_a_volume_is_mounted_once_for_two_containers(guest: AgentGuest) -> None:
    place = "/run/kata-containers/sandbox/volume"
    storage = {
        "driver": "ephemeral",
        "source": "tmpfs",
        "fstype": "tmpfs",
        "mount_point": place,
        "options": ["mode=0700"],
    }
    wishes: dict[str, Any] = {
        "mounts": [{"destination": "/volume", "type": "bind", "source": place, "options": ["rbind"]}],
        "request": {"storages": [storage]},
    }
    with guest.container(["/bin/sh", "-c", "echo kept > /volume/file"], **wishes) as writer:
        assert writer.finish() == (0, "")
        assert guest.output(["/bin/cat", "/volume/file"], **wishes) == (0, "kept\n")
        assert guest.output(["/bin/cat", "/volume/file"], **wishes) == (0, "kept\n")


def test_wait_may_come_before_start(guest: AgentGuest) -> None:
    with guest.container(["/bin/sh", "-c", "exit 9"], start=False) as container:

        async def both() -> int:
            waiting = asyncio.create_task(guest.agent.call("WaitProcess", **container.ids()))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await guest.agent.call("StartContainer", container_id=container.id)
            return int((await waiting)["status"])

        assert guest.run(both()) == 9
        assert container.wait() == 9


def test_every_signal_arrives(guest: AgentGuest) -> None:
    traps = " ".join(f"trap 'echo {number}' {number};" for number in (1, 2, 3, 10, 12, 15, 28, 34, 64))
    with guest.container(["/bin/sh", "-c", f"{traps} echo ready; while :; do sleep 0.05; done"]) as container:
        container.read(until=b"ready\n")
        for number in (1, 2, 3, 10, 12, 15, 28, 34, 64):
            container.signal(number)
            assert container.read(until=b"\n") == f"{number}\n".encode()
        container.signal(signal.SIGKILL)
        assert container.wait() == 128 + signal.SIGKILL


def test_a_first_process_that_does_not_handle_sigterm_is_killed(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"]) as container:
        container.signal(signal.SIGTERM)
        assert container.wait() == 128 + signal.SIGKILL
        error = guest.refused("SignalProcess", **container.ids(), signal=15)
        assert (error.code, "has ended" in str(error)) == (StatusCode.NOT_FOUND, True)


def test_a_signal_to_nobody_in_particular_is_for_all(guest: AgentGuest) -> None:
    with guest.container(["/bin/sh", "-c", "sleep 1000 & sleep 1001 & wait; echo all; exit 4"]) as container:
        container.exec("look", ["/bin/sh", "-c", "while [ $(ps | grep -c 'slee[p]') -lt 2 ]; do sleep 0.02; done"])
        container.wait("look")
        container.exec("kill", ["/bin/kill", "-0", "1"])
        container.wait("kill")
        guest.call("SignalProcess", container_id=container.id, exec_id="", signal=int(signal.SIGINT))
        assert container.wait() in (4, 128 + signal.SIGINT)


def test_exec_has_its_own_user_directory_and_environment(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"], hostname="inside") as container:
        container.exec(
            "e",
            ["/bin/sh", "-c", "id -u; pwd; echo $WHO; hostname; grep CapEff /proc/self/status; exit 6"],
            user={"uid": 33, "gid": 33},
            cwd="/tmp",
            env=["PATH=/bin", "WHO=me"],
            capabilities={"bounding": ["CAP_KILL"], "effective": [], "permitted": []},
        )
        status, said = container.finish("e")
        assert (status, said.split()[:4]) == (6, ["33", "/tmp", "me", "inside"])
        assert int(said.split()[-1], 16) == 0
        assert container.wait("e") == 6, "whoever asks later is told, too"


def test_what_cannot_be_run_is_said_and_leaves_nothing(guest: AgentGuest) -> None:
    name = guest.name()
    descriptors = guest.metric("kata_agent_process_open_fds")
    with pytest.raises(Exception, match=r"no-such-program") as failed, guest.container(["/no-such-program"]):
        pass
    assert "No such file" in str(failed.value)
    assert guest.metric("kata_agent_process_open_fds") == descriptors
    with guest.container(["/bin/sleep", "1000"]) as container:
        error = guest.refused("ExecProcess", **container.ids("e"), process={"Args": ["/missing"], "Cwd": "/"})
        assert error.code is StatusCode.NOT_FOUND
        assert "/missing" in str(error)
        container.exec("e", ["/bin/true"])
        assert container.wait("e") == 0
    assert guest.refused("WaitProcess", container_id=name, exec_id=name).code is StatusCode.NOT_FOUND


def test_what_is_asked_for_wrongly_is_refused_with_its_code(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"]) as container:
        spec = {"Process": {"Args": ["x"]}, "Root": {"Path": "/"}}
        again = guest.refused("CreateContainer", container_id=container.id, exec_id=container.id, OCI=spec)
        assert again.code is StatusCode.ALREADY_EXISTS
        for name in ("", "../x", "a/b", ".hidden", "x" * 129):
            error = guest.refused("CreateContainer", container_id=name, exec_id=name, OCI=spec)
            assert error.code is StatusCode.INVALID_ARGUMENT
        assert guest.refused("CreateContainer", container_id="n", exec_id="n").code is StatusCode.INVALID_ARGUMENT
        assert guest.refused("StartContainer", container_id=container.id).code is StatusCode.FAILED_PRECONDITION
        error = guest.refused("ExecProcess", **container.ids(), process={"Args": ["/bin/true"]})
        assert error.code is StatusCode.ALREADY_EXISTS
        assert guest.refused("SignalProcess", **container.ids(), signal=65).code is StatusCode.INVALID_ARGUMENT
        for method in ("WaitProcess", "ReadStdout", "CloseStdin", "TtyWinResize"):
            assert guest.refused(method, **container.ids("nobody")).code is StatusCode.NOT_FOUND
        error = guest.refused("TtyWinResize", **container.ids(), row=1, column=1)
        assert error.code is StatusCode.FAILED_PRECONDITION
        assert guest.refused("StatsContainer", container_id="nobody").code is StatusCode.NOT_FOUND
        assert guest.refused("AddSwap").code is StatusCode.UNIMPLEMENTED
        assert guest.refused("CreateSandbox", sandbox_id="s2").code is StatusCode.ALREADY_EXISTS


def test_removing_a_container_takes_what_it_wrote_and_nothing_below(guest: AgentGuest) -> None:
    container = InGuest(guest, guest.name())
    for script, said in (("echo mine > /file", ""), ("ls /file /bin/busybox 2>/dev/null", "/bin/busybox\n")):
        container.create(configuration(["/bin/sh", "-c", script]))
        guest.call("StartContainer", container_id=container.id)
        assert container.finish()[1] == said
        guest.call("RemoveContainer", container_id=container.id)


def test_a_storage_that_fails_undoes_those_before_it(guest: AgentGuest) -> None:
    good = {"driver": "ephemeral", "mount_point": "/run/kata-containers/good", "fstype": "tmpfs"}
    bad = {"driver": "blk", "source": "serial=none", "fstype": "ext4", "mount_point": "/run/kata-containers/bad"}
    spec = {"Process": {"Args": ["x"]}, "Root": {"Path": "/"}}
    for _ in range(2):
        error = guest.refused("CreateContainer", container_id="n", exec_id="n", OCI=spec, storages=[good, bad])
        assert error.code is StatusCode.NOT_FOUND
    with guest.container(["/bin/cat", "/proc/1/mounts"], linux={"namespaces": [{"type": "mount"}]}) as container:
        assert "/run/kata-containers/good" not in container.finish()[1]
    outside = {**good, "mount_point": "/etc"}
    error = guest.refused("CreateContainer", container_id="n", exec_id="n", OCI=spec, storages=[outside])
    assert error.code is StatusCode.INVALID_ARGUMENT


def test_a_paused_container_stands_still(guest: AgentGuest) -> None:
    with guest.container(["/bin/sh", "-c", "while read x; do echo $x; done"]) as container:
        guest.call("PauseContainer", container_id=container.id)
        container.write(b"one\n")
        error = guest.refused("ExecProcess", **container.ids("e"), process={"Args": ["/bin/true"], "Cwd": "/"})
        assert error.code is StatusCode.FAILED_PRECONDITION
        guest.call("ResumeContainer", container_id=container.id)
        assert container.read(until=b"\n") == b"one\n"
        guest.call("PauseContainer", container_id=container.id)


def test_limits_change_while_it_runs_and_use_is_told(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"], linux={"resources": {"memory": {"limit": 64 << 20}}}) as container:
        resources = {"Memory": {"Limit": 24 << 20}, "Pids": {"Limit": 9}, "CPU": {"Quota": 20000, "Period": 100000}}
        guest.call("UpdateContainer", container_id=container.id, resources=resources)
        stats = guest.call("StatsContainer", container_id=container.id)
        memory, pids = stats["cgroup_stats"]["memory_stats"], stats["cgroup_stats"]["pids_stats"]
        assert memory["usage"]["limit"] == 24 << 20
        assert 0 < memory["usage"]["usage"] < 24 << 20
        assert pids == {"current": 1, "limit": 9}
        assert stats["cgroup_stats"]["cpu_stats"]["cpu_usage"]["total_usage"] > 0
        assert [each["name"] for each in stats["network_stats"]] == ["lo"]


def test_too_many_processes_are_refused_by_the_kernel(guest: AgentGuest) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; echo reached"
    status, said = guest.output(["/bin/sh", "-c", script], linux={"resources": {"pids": {"limit": 4}}})
    assert "can't fork" in said
    assert (status, "reached" in said) == (2, False)


def test_memory_that_ran_out_is_told(guest: AgentGuest) -> None:
    limit = {"resources": {"memory": {"limit": 8 << 20, "swap": 8 << 20}}}
    script = "x=0123456789abcdef; while :; do x=$x$x; done"
    with guest.container(["/bin/sh", "-c", script], linux=limit) as container:
        assert container.wait() == 128 + signal.SIGKILL
        assert guest.call("GetOOMEvent") == {"container_id": container.id}


def test_many_lives_leave_nothing(guest: AgentGuest) -> None:
    def cycle(execs: int) -> None:
        with guest.container(["/bin/sleep", "1000"]) as container:
            for number in range(execs):
                container.exec(f"e{number}", ["/bin/true"])
                assert container.finish(f"e{number}") == (0, "")

    cycle(2)
    descriptors = guest.metric("kata_agent_process_open_fds")
    for _ in range(5):
        cycle(2)
    assert guest.metric("kata_agent_process_open_fds") == descriptors
    assert guest.metric("kata_agent_process_resident_memory_bytes") <= 8 << 20
    look = ["/bin/sh", "-c", "ps -o stat,args | grep -c '^Z'"]
    assert guest.output(look, linux={"namespaces": [{"type": "mount"}]}) == (1, "0\n")
