"""A process that the agent starts in a container is what ``crun exec`` in the same container starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kata_lab.commands.run import failure_status
from kata_lab.ttrpc import RpcError
from tests.kata_lab.agent.guest import AgentGuest, InGuest, StatusCode, process
from tests.kata_lab.agent.referee import Console, Outcome, console

HELD = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_MKNOD"]
SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
TWO = {name: ["CAP_CHOWN", "CAP_KILL"] for name in SETS}
MOUNTS: list[dict[str, Any]] = [
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
]
PREPARE = """
mkdir -m 700 /private; echo > /private/x; chmod 755 /private/x; chown 33:34 /private
mkdir /some; printf 'echo script "$0" "$@"' > /some/script; chmod 755 /some/script; printf x > /some/text
printf '#!/bin/sh\\necho interpreted "$0" "$@"' > /some/tool; chmod 755 /some/tool
printf '#!/nosuch\\n' > /some/orphan; chmod 755 /some/orphan; chmod 700 /some/text; chmod 600 /some/text
echo 'root:x:0:0::/root:/bin/sh' > /etc/passwd; echo 'web:x:33:34::/srv/web:/bin/sh' >> /etc/passwd
touch /ready; exec sleep 1000
"""
STATUS = "grep -E '^(Umask|Uid|Gid|Groups|NoNewPrivs|Seccomp|Sig(Pnd|Blk|Ign|Cgt)|Shd|Cap)' /proc/self/status"
LEADS = "read p c s pp g ss rest < /proc/$$/stat; test $g = $$ && test $ss = $$ && echo leads; echo $((pp))"
WEB = {"uid": 33, "gid": 34, "additionalGids": [5, 6]}


def script(text: str, **wishes: Any) -> dict[str, Any]:
    return process(["/bin/sh", "-c", text], **wishes)


CASES: dict[str, dict[str, Any]] = {
    "status of the process": script(STATUS),
    "status of another user's process": script(STATUS, user=WEB),
    "user and groups": script("id -u; id -g; id -G; echo $HOME", user=WEB),
    "two capabilities": script(STATUS, capabilities=TWO),
    "two capabilities of another user": script(STATUS, capabilities=TWO, user=WEB),
    "one bounding capability": script(STATUS, capabilities={"bounding": ["CAP_KILL"]}),
    "no new privileges": script(STATUS, noNewPrivileges=True, user=WEB),
    "limits": script("ulimit -a", rlimits=[{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]),
    "limits that were not asked for": script("ulimit -a; ulimit -Ha"),
    "score of killing, which only a container has": script("cat /proc/self/oom_score_adj", oomScoreAdj=321),
    "control group": script("cat /proc/self/cgroup; grep -c . /sys/fs/cgroup/cgroup.procs"),
    "namespaces": script(
        "for x in /proc/self/ns/*; do test $(readlink $x) = $(readlink /proc/1/ns/${x##*/}) || echo $x; done"
    ),
    "session": script(LEADS),
    "open files": script("ls /proc/self/fd | wc -l"),
    "owner of the streams": script("stat -L -c %u:%g /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2", user=WEB),
    "home": script("env | sort"),
    "home of a user": script("echo $HOME", user=WEB),
    "home of nobody in particular": script("echo $HOME", user={"uid": 77, "gid": 77}),
    "variables that are said twice": script("env", env=["PATH=/bin", "B=1", "A=", "B=2 3", "HOME=/x"]),
    "no variables": process(["/bin/env"], env=[]),
    "both outputs and a status": script("echo out; echo err >&2; exit 42"),
    "signal": script("kill -9 $$"),
    "directory": script("pwd", cwd="/some"),
    "directory of another user": script("pwd", cwd="/private", user=WEB, capabilities={}),
    "words": process(["echo", "a b", "", "$x", "é"]),
    "interpreted": process(["/some/tool", "a b"]),
    "relative": process(["./tool"], cwd="/some"),
    "by the path": process(["tool"], env=["PATH=/nosuch:/some:/bin"]),
    "working directory in the path": process(["tool"], env=["PATH=/nosuch:."], cwd="/some"),
    "message queues": script("ls /dev; cat /proc/sys/kernel/hostname; cut -d' ' -f5 /proc/self/mountinfo"),
    "umask": script("umask; touch /tmp/mask$$; stat -c %a /tmp/mask$$"),
    "first process": script("tr '\\0' ' ' < /proc/1/cmdline"),
}
A_DIRECTORY = "the path `/some` is not a regular file: Operation not permitted\n"
FAILURES: dict[str, tuple[dict[str, Any], int]] = {
    "no such program": (process(["/nosuch"]), 127),
    "no such program in the path": (process(["nosuch"]), 127),
    "no program by an empty path": (process(["nosuch"], env=["PATH="]), 127),
    "no interpreter": (process(["/some/orphan"]), 127),
    "not executable": (process(["/some/text"]), 126),
    "not executable in the path": (process(["text"], env=["PATH=/some"]), 126),
    "not executable for this user": (process(["/private/x"], user={"uid": 77, "gid": 77}, capabilities={}), 126),
    "no format": (process(["/some/script"]), 126),
    "directory as a program": (process(["/some"]), 126),
    "no such directory": (script("pwd", cwd="/nosuch"), 125),
    "directory of the runtime": (script("pwd", cwd="/proc/self/fd/5"), 125),
}


@pytest.fixture(scope="module")
def referee(guest: AgentGuest) -> Iterator[Console]:
    with console(guest) as made:
        yield made


@pytest.fixture(scope="module")
def container(guest: AgentGuest) -> Iterator[InGuest]:
    wishes: dict[str, Any] = {
        "mounts": MOUNTS,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), HELD),
        "linux": {"namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts", "cgroup")]},
        "hostname": "inside",
        "user": {"uid": 0, "gid": 0, "additionalGids": [9]},
    }
    with guest.container(["/bin/sh", "-c", PREPARE], **wishes) as made:
        waiting = "while ! test -e /ready; do usleep 10000; done"
        assert exec_by_agent(guest, made, script(waiting)).status == 0
        yield made


def exec_by_agent(guest: AgentGuest, container: InGuest, described: dict[str, Any]) -> Outcome:
    name = guest.name()
    container.exec(name, described["args"], **{key: value for key, value in described.items() if key != "args"})
    container.write(b"", name, close=True)
    output, errors = container.read(name), container.read(name, "ReadStderr")
    return Outcome(container.wait(name), output.decode(), errors.decode())


@pytest.mark.parametrize("name", CASES)
def test_a_process_is_what_crun_makes_of_it(guest: AgentGuest, container: InGuest, referee: Console, name: str) -> None:
    expected = referee.exec(container.id, CASES[name])

    found = exec_by_agent(guest, container, CASES[name])

    assert found == expected


def test_a_terminal_is_of_the_container_and_belongs_to_the_user(guest: AgentGuest, container: InGuest) -> None:
    text = "tty; stty size; stat -c %u $(tty); test -t 0 && test -t 1 && test -t 2; echo $?; " + LEADS
    described = script(text, terminal=True, consoleSize={"height": 33, "width": 99}, user=WEB)
    name = guest.name()
    container.exec(name, described["args"], **{key: value for key, value in described.items() if key != "args"})

    said = container.read(name).decode().split()

    assert (container.wait(name), said) == (0, ["/dev/pts/0", "33", "99", "33", "0", "leads", "0"])


@pytest.mark.parametrize("name", FAILURES)
def test_what_crun_refuses_is_refused_with_the_same_status(
    guest: AgentGuest, container: InGuest, referee: Console, name: str
) -> None:
    described, status = FAILURES[name]
    expected = referee.exec(container.id, described)

    with pytest.raises(RpcError) as failed:
        exec_by_agent(guest, container, described)

    assert expected.status != 0
    # crun says of a directory that it is none, and of nothing else.
    assert (expected.errors, failure_status(expected.errors)) in ((expected.errors, status), (A_DIRECTORY, 125))
    assert (str(failed.value), failure_status(str(failed.value))) == (str(failed.value), status)
    known = {126: StatusCode.PERMISSION_DENIED, 127: StatusCode.NOT_FOUND}
    assert status not in known or failed.value.code is known[status]
