"""What is on disk of sandboxes, also of those whose process is dead; and how large a sandbox is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kata_lab.resource.sizing import SandboxSize, size_for
from kata_lab.runtime import RuntimeFault
from kata_lab.runtime.state import (
    RECORD,
    ProcessIdentity,
    SandboxRecord,
    StateDirectory,
    list_sandboxes,
    sandboxes_directory,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path))


def record_of(name: str, pid: int | None = None) -> SandboxRecord:
    owner = ProcessIdentity.of(os.getpid() if pid is None else pid)
    assert owner is not None
    return SandboxRecord(name, "running", owner, 1.5, {"vcpus": 2}, {"c": {"args": ["true"]}})


def dead_record(name: str) -> SandboxRecord:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        record = record_of(name, process.pid)
    assert not record.owner.alive
    return record


def test_record_is_read_as_it_was_written() -> None:
    directory = StateDirectory("one")
    directory.make(record_of("one"))

    assert directory.read() == record_of("one")
    assert [each.id for each in list_sandboxes()] == ["one"]
    assert oct(directory.path.stat().st_mode)[-3:] == "700"
    directory.remove()
    directory.remove()
    assert directory.read() is None


def test_directories_of_dead_processes_are_cleared_away() -> None:
    for name in ("dead", "other"):
        StateDirectory(name).make(record_of(name))
    for name in ("dead", "other"):
        StateDirectory(name).write(dead_record(name))
    (sandboxes_directory() / ".new-1-half").mkdir()
    (sandboxes_directory() / "dead/scratch").write_text("x")

    StateDirectory("dead").make(record_of("dead"))

    assert [each.id for each in list_sandboxes()] == ["dead"]
    assert sorted(os.listdir(sandboxes_directory())) == [".lock", "dead"]
    assert os.listdir(sandboxes_directory() / "dead") == [RECORD]


def test_a_number_that_is_used_again_is_another_process() -> None:
    record = record_of("one")
    earlier = ProcessIdentity(record.owner.pid, record.owner.started - 1)

    assert record.owner.alive
    assert not earlier.alive


def test_one_of_many_at_once_gets_a_name() -> None:
    outcomes: list[str] = []

    def make() -> None:
        try:
            StateDirectory("one").make(record_of("one"))
            outcomes.append("made")
        except RuntimeFault as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=make) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert outcomes.count("made") == 1
    assert sum("exists already" in each for each in outcomes) == 15


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read"),
        ("[]", "is not of version 1"),
        (json.dumps({"version": 2}), "is not of version 1"),
        (json.dumps({"version": 1, "id": "one"}), "is damaged"),
        (json.dumps({"version": 1, "id": "one", "owner": [1]}), "is damaged"),
    ],
)
def test_a_record_that_is_none_is_for_a_person_to_judge(text: str, complaint: str) -> None:
    directory = StateDirectory("one")
    directory.make(record_of("one"))
    (directory.path / RECORD).write_text(text)

    with pytest.raises(RuntimeFault, match=complaint):
        directory.read()
    with pytest.raises(RuntimeFault, match="exists already"):
        directory.make(record_of("one"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a" * 65, "a\n", "ä"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(RuntimeFault, match="must have 1 to 64"):
        StateDirectory(name)


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ([{}], SandboxSize(1, 256)),
        ([{"memory": {"limit": 64 << 20}}], SandboxSize(1, 192)),
        ([{"memory": {"limit": (64 << 20) + 1}}], SandboxSize(1, 193)),
        ([{"memory": {"limit": -1}, "cpu": {"quota": -1}}], SandboxSize(1, 256)),
        ([{"cpu": {"quota": 10_000}}, {"cpu": {"quota": 20_000, "period": 100_000}}], SandboxSize(1, 384)),
        ([{"cpu": {"quota": 150_000}}, {"cpu": {"quota": 100_000}}], SandboxSize(3, 384)),
        ([{"cpu": {"quota": 100_000_000}}], SandboxSize(32, 256)),
    ],
)
def test_size_is_the_sum_of_what_containers_may_use(limits: list[dict[str, object]], size: SandboxSize) -> None:
    assert size_for([{"linux": {"resources": each}} for each in limits]) == size
