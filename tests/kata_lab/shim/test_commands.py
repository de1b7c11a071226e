"""``kata-lab run`` and its family, with sandboxes whose containers are processes of the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kata_lab.cli_process import OnTerminal, environment
from tests.kata_lab.shim.cli import COMMAND, cli, said


@pytest.fixture
def state(home: Path, root: Path) -> Iterator[Path]:
    """The state directory; at the end nothing of what was in it runs."""
    yield home / "state"
    for record in ps():
        cli("rm", "-f", record["id"])
    assert left(home / "state") == []


def left(state: Path) -> list[str]:
    """What there is of containers and sandboxes."""
    found = (each for kind in ("containers", "shims", "sandboxes") for each in (state / kind).glob("*"))
    # A lock is nobody's.
    return [str(each) for each in found if each.name != ".lock"]


def ps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said("ps", "-a", "--json"))
    return found


def run(root: Path, *arguments: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return cli("run", "--rootfs", str(root), *arguments, typed=typed)


def test_output_errors_and_status_are_the_containers(root: Path, state: Path) -> None:
    done = run(root, "--rm", "sh", "-c", "echo out; echo err >&2; exit 7")

    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert left(state) == []


def test_binary_input_comes_back_as_it_was(root: Path, state: Path) -> None:
    data = bytes(range(256)) * 10_000

    done = run(root, "--rm", "-i", "cat", typed=data)

    assert (done.returncode, done.stdout == data, done.stderr) == (0, True, b"")


def test_without_i_there_is_no_input(root: Path, state: Path) -> None:
    assert run(root, "--rm", "cat", typed=b"unseen").stdout == b""


def test_input_from_a_file_is_read_to_its_end(root: Path, state: Path, home: Path) -> None:
    (home / "input").write_bytes(b"from a file")
    with (home / "input").open("rb") as file:
        command = [*COMMAND, "run", "--rm", "-i", "--rootfs", str(root), "cat"]
        done = subprocess.run(command, stdin=file, capture_output=True, env=environment(), check=False)

    assert done.stdout == b"from a file"


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["nosuchprogram"], 127, "not found"),
        (["-m", "4k", "true"], 125, "a memory of 4k is no limit"),
        (["-v", "relative:/x", "true"], 125, "must be a path, such as ./relative"),
        (["-e", "NO_SUCH_VARIABLE", "true"], 2, "the environment has no variable NO_SUCH_VARIABLE"),
        (["-it", "true"], 125, "the standard input is no terminal"),
        (["--name", "-x-", "true"], 2, "expected one argument"),
        (["--name", "a/b", "true"], 125, "the container's name 'a/b'"),
        (["--pod", "nosuch", "true"], 125, "there is no container 'nosuch'"),
        (["--cap-add", "FLY", "true"], 125, "there is no capability 'FLY'"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_and_leaves_nothing(
    root: Path, state: Path, arguments: list[str], status: int, complaint: str
) -> None:
    done = run(root, *arguments)

    assert done.returncode == status
    assert complaint in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""
    assert left(state) == []


def test_run_without_an_image_says_what_to_give(state: Path) -> None:
    done = cli("run")

    assert (done.returncode, done.stderr) == (
        2,
        b"kata-lab: an image must be named, or --rootfs or --bundle given\n",
    )


def test_what_the_shim_builds_is_shown_where_somebody_watches(root: Path, state: Path) -> None:
    arguments = ("run", "--rm", "--rootfs", str(root), "echo", "up")

    seen = cli(*arguments, FAKE_BUILD="1", KATA_LAB_PROGRESS="lines")
    unseen = cli(*arguments, FAKE_BUILD="1")

    begun, ended = seen.stderr.decode().splitlines()
    assert (seen.stdout, begun) == (b"up\n", "Building the guest…")
    assert ended.startswith("Building the guest: done after ")
    assert (unseen.stdout, unseen.stderr) == (b"up\n", b"")


def test_life_of_a_detached_container(root: Path, state: Path) -> None:
    done = run(root, "-d", "--name", "web", "-e", "A=1", "sh", "-c", "echo $A; echo err >&2; exec sleep 60")
    name = done.stdout.decode().strip()
    (record,) = ps()
    assert (record["id"], record["name"], record["state"]) == (name, "web", "running")
    assert "web" in said("ps")

    assert cli("exec", "web", "sh", "-c", "echo in; exit 3").returncode == 3
    assert cli("exec", "-i", name[:5], "cat", typed=b"typed").stdout == b"typed"
    while b"err" not in cli("logs", "web").stderr:
        time.sleep(0.05)
    logs = cli("logs", "web")
    assert (logs.stdout, logs.stderr) == (b"1\n", b"err\n")

    assert said("pause", "web") == "web\n"
    assert ps()[0]["state"] == "paused"
    assert cli("exec", "web", "true").returncode == 125
    assert said("unpause", "web") == "web\n"
    assert "web" in said("stats", "--no-stream")
    assert json.loads(said("timeline", "--json", "web"))[0]["name"] == "process"
    assert "kata_shim_threads" in said("metrics", "web")
    assert said("update", "--memory", "64m", "web") == "web\n"

    refused = cli("rm", "web")
    assert (refused.returncode, b"stop it first, or remove it with -f" in refused.stderr) == (1, True)
    assert said("stop", "-t", "5", "web") == "web\n"
    assert said("stop", "web") == "web\n"
    assert (ps()[0]["state"], ps()[0]["status"]) == ("stopped", 143)
    assert said("wait", "web") == "143\n"
    assert said("logs", "--tail", "1", "web") == ""
    assert said("ps") == said("ps", "-q") or "web" not in said("ps")
    assert said("rm", "web") == "web\n"
    assert ps() == []


def test_stopped_container_starts_again(root: Path, state: Path) -> None:
    script = f"echo x >> {root}/count; wc -l < {root}/count; exit 4"
    assert run(root, "--name", "again", "sh", "-c", script).returncode == 4

    started = cli("start", "-a", "again")

    assert (started.returncode, started.stdout) == (4, b"2\n")
    assert said("logs", "again") == "1\n2\n"


def test_created_container_waits_until_it_is_started(root: Path, state: Path) -> None:
    created = cli("create", "--name", "later", "--rootfs", str(root), "sh", "-c", "echo started")
    assert created.returncode == 0
    assert ps()[0]["state"] == "created"

    started = cli("start", "-a", "later")

    assert (started.returncode, started.stdout) == (0, b"started\n")


def test_created_container_is_removed(root: Path, state: Path) -> None:
    said("create", "--name", "never", "--rootfs", str(root), "true")

    assert said("rm", "never") == "never\n"
    assert ps() == []


def test_container_of_a_killed_shim_is_dead_and_can_be_removed_or_started(root: Path, state: Path) -> None:
    run(root, "-d", "--name", "web", "sleep", "60")
    (shown,) = json.loads(said("inspect", "web"))
    os.kill(shown["shim"]["pid"], signal.SIGKILL)
    while ps()[0]["state"] != "stopped":
        time.sleep(0.02)

    assert "Exited" not in said("ps", "-a")
    assert "the process of its sandbox is gone" in said("ps", "-a")
    assert said("wait", "web") == "255\n"
    assert cli("exec", "web", "true").returncode == 125
    assert said("start", "web") == "web\n"
    assert ps()[0]["state"] == "running"
    (shown,) = json.loads(said("inspect", "web"))
    os.kill(shown["shim"]["pid"], signal.SIGKILL)
    assert said("rm", "-f", "web") == "web\n"
    assert left(state) == []


def test_client_of_a_killed_shim_is_told(root: Path, state: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "--name", "web", "--rootfs", str(root), "sh", "-c", "echo up; sleep 60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    (shown,) = json.loads(said("inspect", "web"))
    os.kill(shown["shim"]["pid"], signal.SIGKILL)

    output, errors = process.communicate(timeout=30)

    assert (process.returncode, output) == (255, b"")
    assert b"is gone" in errors


def test_killed_client_leaves_its_container_running(root: Path, state: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "run", "--name", "web", "--rootfs", str(root), "sh", "-c", "echo up; sleep 60"],
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()

    assert ps()[0]["state"] == "running"
    assert said("kill", "web") == "web\n"
    assert said("wait", "web") == "137\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_container(root: Path, state: Path, number: int) -> None:
    script = "trap 'echo got; exit 9' TERM INT USR1; echo up; while :; do sleep 0.02; done"
    process = subprocess.Popen(
        [*COMMAND, "run", "--rm", "--rootfs", str(root), "sh", "-c", script], stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)

    output, _ = process.communicate(timeout=30)

    assert (process.returncode, output) == (9, b"got\n")


def test_signal_before_the_container_runs_leaves_nothing(root: Path, state: Path) -> None:
    with subprocess.Popen([*COMMAND, "run", "--rootfs", str(root), "sleep", "60"], env=environment()) as process:
        while not left(state):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)

    # Whether the signal came before the start or after, it ended what was begun.
    assert process.returncode in (143, 128 + 15)
    while [each for each in ps() if each["state"] == "running"]:
        time.sleep(0.05)


def test_output_that_nobody_reads_ends_the_container(root: Path, state: Path) -> None:
    command = " ".join([*COMMAND, "run", "--rm", "--rootfs", str(root), "yes"])

    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )

    assert done.stdout == b"y\n141\n"
    while ps():
        time.sleep(0.05)


def test_two_commands_on_one_container_come_one_after_the_other(root: Path, state: Path) -> None:
    run(root, "-d", "--name", "web", "sleep", "60")

    both = [subprocess.Popen([*COMMAND, "rm", "-f", "web"], env=environment(), stderr=subprocess.PIPE) for _ in "12"]
    outcomes = [each.communicate(timeout=30)[1] for each in both]

    assert sorted(each.returncode for each in both) in ([0, 0], [0, 1])
    assert all(not each or b"there is no container" in each for each in outcomes)
    assert ps() == []


def test_containers_share_a_sandbox(root: Path, state: Path) -> None:
    run(root, "-d", "--name", "first", "sleep", "60")
    joined = run(root, "--name", "second", "--pod", "first", "echo", "joined")

    assert joined.stdout == b"joined\n"
    assert [each["state"] for each in ps()] == ["stopped", "running"]
    assert ps()[0]["sandbox"] == ps()[1]["sandbox"]
    assert said("rm", "second") == "second\n"
    assert ps()[0]["state"] == "running"


def test_terminal_is_raw_has_this_terminals_size_and_can_be_left(root: Path, state: Path) -> None:
    script = (
        'echo ready; read line; stty size; echo "<$line>"; '
        "until [ \"$(stty size)\" = '20 40' ]; do sleep 0.05; done; echo changed; sleep 60"
    )
    command = [*COMMAND, "run", "-it", "--name", "tty", "--rootfs", str(root), "bash", "-c", script]
    with OnTerminal(command, rows=33, columns=77) as terminal:
        before = termios.tcgetattr(terminal.device)
        # Long before the terminal is raw.
        terminal.type(b"early\r")
        terminal.see(b"ready")
        terminal.see(b"33 77\r\n<early>")
        terminal.resize(20, 40)
        terminal.see(b"changed")
        terminal.type(b"\x10\x11")

        assert terminal.status() == 0
        assert termios.tcgetattr(terminal.device) == before
    assert ps()[0]["state"] == "running"


def test_pod_that_is_not_understood_is_refused_with_its_path(home: Path, state: Path) -> None:
    (home / "pod.yaml").write_text("kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [], extra: 1}\n")

    refused = cli("pod", "apply", "-f", str(home / "pod.yaml"))

    assert refused.returncode == 1
    assert b"$.spec.extra is not understood" in refused.stderr
    assert left(state) == []


@pytest.mark.parametrize("command", ["--help", "ps", "logs", "wait", "pod get"])
def test_commands_that_need_no_machine_import_nothing_heavy(home: Path, command: str) -> None:
    heavy = ("numba", "numpy", "asyncio", "vmm", "yaml", "kata_lab.ttrpc", "subprocess")
    code = (
        "import sys\nfrom kata_lab.cli import main\n"
        f"try:\n    main({command.split()!r})\nexcept SystemExit:\n    pass\n"
        f"print([each for each in {heavy!r} if each in sys.modules], file=sys.stderr)"
    )

    done = subprocess.run(
        [COMMAND[0], "-c", code], capture_output=True, env=environment(), check=True, stdin=subprocess.DEVNULL
    )

    assert done.stderr.splitlines()[-1] == b"[]"
