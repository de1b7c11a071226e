"""``kata-lab run`` and its family with real guests: few of them, since each takes seconds to boot."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kata_lab.shim.client import ShimClient
from kata_lab.shim.records import ShimDirectory
from tests.kata_lab.cli_process import COMMAND, SECONDS, OnTerminal, Started, kata_lab

WEB = "kata-lab-test-web"


@pytest.fixture(scope="module", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """State of its own, but the cache with its images is everybody's."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="kl-") as directory:
        patch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A container that runs and writes a line."""
    done = kata_lab(
        "run", "-d", "--name", WEB, "-e", "GREETING=hello", "busybox", "sh", "-c", "echo up; exec sleep 9999"
    )
    assert done.returncode == 0, done.stderr.decode()
    yield WEB
    kata_lab("rm", "-f", WEB)


def said(*arguments: str) -> str:
    done = kata_lab(*arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def left(directory: Path) -> list[str]:
    """What there is of containers, sandboxes, shims and volumes; a lock is nobody's."""
    return [str(each) for each in (directory / "kata-lab").glob("*/*") if not each.name.startswith(".")]


def inspected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said("inspect", name))[0]
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it has not come to be within {SECONDS:g} s"
        time.sleep(0.05)


def test_run_gives_the_container_what_was_asked_for_and_leaves_nothing(tmp_path: Path, runtime_directory: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "given").write_text("from the host")
    script = (
        "echo $GREETING; pwd; id -u; cat /data/given; cat; echo guest > /data/made; "
        "touch /fixed/x 2>/dev/null || echo refused; hostname; exit 7"
    )

    done = kata_lab(
        *("run", "--rm", "-i", "-e", "GREETING=hello", "-w", "/tmp", "-u", "0:100", "--hostname", "till"),
        *("-v", f"{tmp_path}/shared:/data", "-v", f"{tmp_path}/shared:/fixed:ro", "--cpus", "1.5", "-m", "64m"),
        *("busybox", "sh", "-c", script),
        typed=b"typed \xff\x00 bytes\n",
    )

    expected = b"hello\n/tmp\n0\nfrom the hosttyped \xff\x00 bytes\nrefused\ntill\n"
    assert (done.returncode, done.stdout, done.stderr) == (7, expected, b"")
    assert (tmp_path / "shared" / "made").read_text() == "guest\n"
    assert left(runtime_directory) == []


def test_detached_container_is_listed_and_logged(web: str) -> None:
    until(lambda: said("logs", web) == "up\n")

    assert web in said("ps")
    assert inspected(web)["state"] == "running"
    names = [each["name"] for each in json.loads(said("timeline", "--json", web))]
    assert names.index("process") < names.index("agent answers") < names.index("sandbox ready")


def test_exec_has_the_containers_environment_and_its_own(web: str) -> None:
    done = kata_lab(
        "exec", "-e", "MORE=1", "-u", "nobody", "-w", "/var", web, "sh", "-c", "echo $GREETING $MORE; id -un; pwd"
    )

    assert (done.returncode, done.stdout) == (0, b"hello 1\nnobody\n/var\n")


@pytest.mark.parametrize(
    ("command", "status"),
    [(("sh", "-c", "exit 3"), 3), (("nosuch",), 127), (("/etc/passwd",), 126), (("sh", "-c", "kill -9 $$"), 137)],
)
def test_exec_exits_as_its_process_does(web: str, command: tuple[str, ...], status: int) -> None:
    assert kata_lab("exec", web, *command).returncode == status


def test_binary_data_passes_both_ways(web: str) -> None:
    data = os.urandom(1 << 20)

    assert kata_lab("exec", "-i", web, "cat", typed=data).stdout == data


def test_fifty_execs_at_once(web: str) -> None:
    container = inspected(web)["id"]

    async def one(client: ShimClient, number: int) -> tuple[bytes, int]:
        name, output, status = f"e{number}", b"", -1
        await client.exec(container, name, {"args": ["sh", "-c", f"echo {number}; exit {number}"]})
        async with client.attach(container, name) as stream:
            await client.task("Start", id=container, exec_id=name)
            async for message in stream:
                output += message["stdout"]
                status = message["exit_status"] if message["ended"] else status
        return output, status

    async def all_of_them() -> list[tuple[bytes, int]]:
        async with ShimClient.connect(container) as client:
            return await asyncio.gather(*(one(client, number) for number in range(50)))

    assert asyncio.run(all_of_them()) == [(b"%d\n" % number, number) for number in range(50)]


@pytest.fixture
def aside(web: str) -> Iterator[str]:
    """A container in the sandbox of ``web``, so that what a test leaves running there goes with it."""
    said("run", "-d", "--name", "aside", "--pod", web, "busybox", "sleep", "9999")
    try:
        yield "aside"
    finally:
        said("rm", "-f", "aside")


def test_terminal_follows_the_size_of_the_window(aside: str) -> None:
    with OnTerminal([*COMMAND, "exec", "-it", aside, "sh"], rows=33, columns=77) as terminal:
        # Typed long before anybody reads it.
        terminal.type(b"stty size; tty\r")
        terminal.see(b"33 77")
        terminal.see(b"/dev/pts/")
        terminal.resize(20, 40)
        terminal.type(b"until stty size | grep 20; do sleep 0.1; done\r")
        terminal.see(b"20 40")
        # Ctrl-C goes to what runs in the guest: to sleep, once the shell has let it have the terminal.
        terminal.type(b"sh -c 'echo sum $((40 + 2)); exec sleep 9999'\r")
        terminal.see(b"sum 42")
        terminal.type(b"\x03")
        terminal.see(b"# ")
        terminal.type(b"exit 5\r")

        assert terminal.status() == 5


def test_container_joins_with_a_root_that_cannot_be_written_and_a_limit(web: str) -> None:
    joined = ("run", "--rm", "--pod", web)

    fixed = kata_lab(*joined, "--read-only", "--tmpfs", "/scratch", "busybox", "sh", "-c", "echo x > /scratch/a; > /b")
    assert (fixed.returncode, b"Read-only file system" in fixed.stderr) == (1, True)
    dropped = kata_lab(*joined, "--cap-drop", "ALL", "busybox", "grep", "CapEff", "/proc/self/status")
    assert dropped.stdout.split()[1] == b"0000000000000000"


def test_container_that_shares_a_sandbox_keeps_what_it_wrote_until_it_is_removed(web: str) -> None:
    run = ("run", "--name", "guest", "--pod", web, "busybox", "sh", "-c", "cat /written; echo before >> /written")

    assert kata_lab(*run).stdout == b""
    assert said("start", "-a", "guest") == "before\n"
    said("rm", "guest")
    assert kata_lab(*run).stdout == b""
    said("rm", "guest")


def test_container_that_takes_too_much_memory_is_killed_and_that_is_told(web: str) -> None:
    command = ("head -c 100000000 /dev/zero | tail -c 100000000 | wc -c",)
    done = kata_lab("run", "--name", "greedy", "--pod", web, "-m", "16m", "busybox", "sh", "-c", *command)

    shown = inspected("greedy")
    assert (done.stdout, shown["out_of_memory"]) == (b"0\n", True)
    assert "out of memory" in said("ps", "-a")
    said("rm", "greedy")


def test_pause_stats_and_limits_of_a_container(web: str) -> None:
    said("pause", web)
    assert inspected(web)["state"] == "paused"
    said("resume", web)
    said("update", "-m", "48m", web)
    (found,) = json.loads(said("stats", "--no-stream", "--json", web))

    assert (found["memory_limit"], found["pids"]) == (48 << 20, 1)
    assert 0 < found["memory"] < 48 << 20


def test_killed_shim_takes_everything_with_it_and_the_container_starts_again(web: str) -> None:
    before = inspected(web)
    os.kill(before["shim"]["pid"], signal.SIGKILL)
    until(lambda: str(inspected(web)["state"]) == "stopped")
    assert inspected(web)["reason"] == "the process of its sandbox is gone"

    said("start", web)
    assert inspected(web)["state"] == "running"
    # busybox's sleep is the first process and has no handler, so that it must be killed.
    said("stop", "-t", "0", web)

    assert inspected(web)["status"] == 137
    said("rm", web)
    assert json.loads(said("ps", "-a", "--json")) == []


def test_shim_that_is_killed_while_its_guest_boots_leaves_nothing(runtime_directory: Path) -> None:
    def shim() -> int:
        booting = (runtime_directory / "kata-lab" / "sandboxes").glob("*/vsock")
        ids = [each.parent.name for each in booting]
        owner = ShimDirectory(ids[0]).owner() if ids else None
        return owner.pid if owner is not None else 0

    with Started(["run", "--name", "early", "busybox", "true"]) as client:
        until(lambda: shim() > 0)
        os.kill(shim(), signal.SIGKILL)
        status, errors = client.status(), client.errors()

    assert (status, errors.count("\n")) == (125, 1)
    assert "was killed by signal 9 before it was ready" in errors
    assert left(runtime_directory) == []


def test_container_that_is_started_again_has_what_it_wrote_and_its_limits(runtime_directory: Path) -> None:
    script = "cat /written 2>/dev/null; echo $((40 + 2)) >> /written; cat /sys/fs/cgroup/memory.max; exec sleep 9999"
    said("run", "-d", "--name", "twice", "-m", "64m", "busybox", "sh", "-c", script)
    try:
        until(lambda: said("logs", "twice") == f"{64 << 20}\n")
        said("update", "-m", "48m", "twice")
        said("stop", "-t", "0", "twice")
        said("start", "twice")
        until(lambda: said("logs", "twice").endswith(f"\n42\n{48 << 20}\n"))

        # What a killed sandbox had on its disk is there again, too; a limit can be changed meanwhile.
        said("exec", "twice", "sync")
        os.kill(inspected("twice")["shim"]["pid"], signal.SIGKILL)
        until(lambda: str(inspected("twice")["state"]) == "stopped")
        said("update", "-m", "56m", "twice")
        said("start", "twice")
        until(lambda: said("logs", "twice").endswith(f"\n42\n42\n{56 << 20}\n"))
    finally:
        said("rm", "-f", "twice")
    assert left(runtime_directory) == []


def test_pod_of_two_containers_that_share_a_volume(tmp_path: Path, runtime_directory: Path) -> None:
    (tmp_path / "pod.yaml").write_text(
        """
apiVersion: v1
kind: Pod
metadata: {name: shop}
spec:
  restartPolicy: OnFailure
  volumes: [{name: shared, emptyDir: {}}]
  containers:
    - name: writer
      image: busybox
      command: [sh, -c]
      args: ["[ -e /out/first ] || { touch /out/first; exit 1; }; echo from $(hostname) > /out/word; sleep 9999"]
      volumeMounts: [{name: shared, mountPath: /out}]
      resources: {limits: {memory: 32Mi, cpu: 500m}}
    - name: reader
      image: busybox
      command: [sh, -c, "until cat /in/word 2>/dev/null; do sleep 0.1; done"]
      securityContext: {runAsUser: 1000}
      volumeMounts: [{name: shared, mountPath: /in, readOnly: true}]
"""
    )

    assert said("pod", "apply", "-f", str(tmp_path / "pod.yaml")) == "pod/shop started\n"
    assert said("wait", "shop-reader") == "0\n"

    assert said("logs", "shop-reader") == "from shop\n"
    (pod,) = json.loads(said("pod", "get", "--json"))
    assert (pod["phase"], [each["restarts"] for each in pod["containers"]]) == ("Running", [1, 0])
    assert said("pod", "delete", "-t", "0", "shop") == "pod/shop removed\n"
    assert left(runtime_directory) == []


def test_published_port_leads_into_the_container(runtime_directory: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    serve = "mkdir /tmp/w; echo from the guest > /tmp/w/index.html; exec httpd -f -v -p 80 -h /tmp/w"
    said("run", "-d", "--name", "published", "-p", f"{port}:80", "busybox", "sh", "-c", serve)
    try:
        answer = _fetched(port)

        assert answer == b"from the guest\n"
        assert "nameserver" in said("exec", "published", "cat", "/etc/resolv.conf") or not _has_resolver()
    finally:
        said("rm", "-f", "published")


def _fetched(port: int) -> bytes:
    """What the server says, once it listens."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                return bytes(answer.read())
        except OSError:
            assert time.monotonic() < deadline, f"nobody answered at port {port} within {SECONDS:g} s"
            time.sleep(0.05)


def _has_resolver() -> bool:
    return "nameserver" in Path("/etc/resolv.conf").read_text()
