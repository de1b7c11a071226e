"""What the agent does for the whole guest: files, time, logs, console, processors, and its end."""

from __future__ import annotations

import json
import time

import pytest

from tests.kata_lab.agent.guest import STORAGES, AgentGuest, InGuest, StatusCode, configuration
from tests.kata_lab.agent.referee import console

HOST = {"linux": {"namespaces": [{"type": "mount"}]}}
RUN = {"destination": "/guest", "type": "bind", "source": "/run/kata-containers/sandbox", "options": ["rbind", "rw"]}


def _copy(guest: AgentGuest, path: str, data: bytes, **more: object) -> None:
    fields = {"file_size": len(data), "file_mode": 0o100644, "dir_mode": 0o755, "uid": 0, "gid": 0, "offset": 0, **more}
    guest.call("CopyFile", path=path, data=data, **fields)


def test_the_agent_says_who_it_is(guest: AgentGuest) -> None:
    assert guest.run(guest.agent.version()).startswith("3.")
    details = guest.call("GetGuestDetails")["agent_details"]
    assert details["supports_seccomp"]
    assert {"virtio-fs", "blk", "overlayfs"} <= set(details["storage_handlers"])


def test_a_file_that_comes_in_pieces_appears_when_it_is_whole(guest: AgentGuest) -> None:
    place = "/run/kata-containers/sandbox/files/deep/file"
    _copy(guest, place, b"first ", file_size=12, uid=7, gid=8)
    look = ["/bin/sh", "-c", "cd /guest/files/deep; ls; cat file; stat -c %a:%u:%g file"]
    status, said = guest.output(look, mounts=[RUN])
    assert (status, "No such file" in said) == (1, True)
    _copy(guest, place, b"second", file_size=12, offset=6, uid=7, gid=8)
    assert guest.output(look, mounts=[RUN]) == (0, "file\nfirst second644:7:8\n")


def test_directories_and_links_are_copied_too(guest: AgentGuest) -> None:
    base = "/run/kata-containers/sandbox/kinds"
    _copy(guest, base, b"", file_mode=0o040711)
    _copy(guest, f"{base}/link", b"file", file_mode=0o120777)
    _copy(guest, f"{base}/file", b"content")
    look = ["/bin/sh", "-c", "stat -c %a /guest/kinds; cat /guest/kinds/link"]
    assert guest.output(look, mounts=[RUN]) == (0, "711\ncontent")


@pytest.mark.parametrize("path", ["/etc/passwd", "/run/../etc/x", "/run//x", "run/x", "/run/x/..", "/run/./x", "/run/"])
def test_a_file_outside_run_is_refused(guest: AgentGuest, path: str) -> None:
    assert guest.refused("CopyFile", path=path, file_size=0).code is StatusCode.INVALID_ARGUMENT


def test_a_container_cannot_lead_a_copied_file_astray(guest: AgentGuest) -> None:
    links = "ln -s /etc /guest/astray; ln -s /etc/victim /guest/victim"
    assert guest.output(["/bin/sh", "-c", links], mounts=[RUN]) == (0, "")
    base = "/run/kata-containers/sandbox"
    error = guest.refused("CopyFile", path=f"{base}/astray/x", file_size=0)
    assert (error.code, "astray" in str(error)) == (StatusCode.INVALID_ARGUMENT, True)
    _copy(guest, f"{base}/victim", b"a file, not what the link names")
    look = ["/bin/sh", "-c", "test -L /guest/victim || cat /guest/victim"]
    assert guest.output(look, mounts=[RUN]) == (0, "a file, not what the link names")


def test_pieces_that_do_not_fit_are_refused(guest: AgentGuest) -> None:
    place = "/run/kata-containers/sandbox/piece"
    for fields in ({"offset": 5, "file_size": 4}, {"offset": -1, "file_size": 4}, {"offset": 0, "file_size": -1}):
        error = guest.refused("CopyFile", path=place, data=b"xx", **fields)
        assert error.code is StatusCode.INVALID_ARGUMENT


def test_the_clock_is_set(guest: AgentGuest) -> None:
    now = int(time.time())
    guest.call("SetGuestDateTime", Sec=now, Usec=250000)
    status, said = guest.output(["/bin/date", "+%s"])
    assert status == 0
    assert now <= int(said) <= now + 120
    assert guest.refused("SetGuestDateTime", Sec=1, Usec=1000000).code is StatusCode.INVALID_ARGUMENT


def test_the_random_generator_is_seeded(guest: AgentGuest) -> None:
    assert guest.call("ReseedRandomDev", data=bytes(range(64))) == {}


def test_processors_are_counted(guest: AgentGuest) -> None:
    assert guest.call("OnlineCPUMem", nb_cpus=1, cpu_only=True) == {}


def test_loopback_is_listed_and_an_unknown_interface_refused(guest: AgentGuest) -> None:
    interfaces = guest.call("ListInterfaces")["Interfaces"]
    assert [(each["name"], each["mtu"]) for each in interfaces] == [("lo", 65536)]
    assert {"address": "127.0.0.1", "mask": "8", "family": 0}.items() <= interfaces[0]["IPAddresses"][0].items()
    wanted = {"name": "eth0", "hwAddr": "02:00:00:00:00:99"}
    assert guest.refused("UpdateInterface", interface=wanted).code is StatusCode.NOT_FOUND
    assert guest.refused("UpdateInterface").code is StatusCode.INVALID_ARGUMENT
    assert guest.call("ListRoutes")["Routes"] == []


def test_metrics_are_in_prometheus_form(guest: AgentGuest) -> None:
    lines = guest.call("GetMetrics")["metrics"].splitlines()
    names = {line.split("{")[0].split()[0] for line in lines}
    assert {"kata_guest_meminfo", "kata_guest_load", "kata_agent_process_resident_memory_bytes"} <= names
    assert all(float(line.split()[-1]) >= 0 for line in lines)


def test_the_log_tells_what_was_and_what_comes(guest: AgentGuest) -> None:
    with guest.dial(1025) as connection, connection.makefile("rb") as lines:
        first = json.loads(lines.readline())
        assert (first["msg"], first["sandbox"], first["level"]) == ("sandbox created", "s1", "info")
        with guest.container(["/bin/true"]) as container:
            while True:
                line = json.loads(lines.readline())
                if line.get("container") == container.id:
                    break
        assert line["msg"] == "container created"


def test_the_debug_console_is_a_terminal(guest: AgentGuest) -> None:
    descriptors = guest.metric("kata_agent_process_open_fds")
    with guest.dial(1026) as connection:
        connection.sendall(b"tty; echo $((6 * 7))x; exit\n")
        said = b""
        while data := connection.recv(4096):
            said += data
    assert b"/dev/pts/" in said
    assert b"42x" in said
    with guest.dial(1026) as connection:
        connection.sendall(b"sleep 1000\n")
        connection.recv(100)
    # A guest of its own for each who comes, and nothing left of those who went.
    deadline = time.monotonic() + 20
    while guest.metric("kata_agent_process_open_fds") > descriptors and time.monotonic() < deadline:
        time.sleep(0.05)
    assert guest.metric("kata_agent_process_open_fds") <= descriptors


def test_the_agent_s_interpreter_cannot_be_changed(guest: AgentGuest) -> None:
    # What enters a container is the agent's interpreter until its program runs.
    with console(guest) as shell:
        done = shell.run("chmod 755 /usr/bin/micropython")
    assert done.status != 0
    assert "Read-only file system" in done.errors


def test_frames_that_are_too_long_or_no_message_do_not_end_the_connection(guest: AgentGuest) -> None:
    error = guest.refused("CopyFile", path="/run/x", file_size=1 << 20, data=bytes(1 << 20))
    assert (error.code, "longer" in str(error)) == (StatusCode.RESOURCE_EXHAUSTED, True)
    with guest.dial(1024) as connection:
        connection.sendall((6).to_bytes(4, "big") + (1).to_bytes(4, "big") + b"\x01\x00" + b"\xff" * 6)
        answer = connection.recv(10)
        assert (int.from_bytes(answer[4:8], "big"), answer[8]) == (1, 2)
    guest.run(guest.agent.check())


def test_a_sandbox_ends_and_another_one_begins(guest: AgentGuest) -> None:
    with guest.dial(1025) as connection:
        left = InGuest(guest, guest.name())
        left.create(configuration(["/bin/sleep", "1000"]))
        guest.call("DestroySandbox")
        spec = {"Process": {"Args": ["x"]}, "Root": {"Path": "/"}}
        assert guest.refused("StartContainer", container_id=left.id).code is StatusCode.NOT_FOUND
        error = guest.refused("CreateContainer", container_id="n", exec_id="n", OCI=spec)
        assert error.code is StatusCode.FAILED_PRECONDITION
        guest.call("CreateSandbox", sandbox_id="s2", hostname="other", storages=STORAGES, sandbox_pidns=True)
        connection.recv(1)
    assert guest.output(["/bin/cat", "/proc/sys/kernel/hostname"], **HOST) == (0, "other\n")
