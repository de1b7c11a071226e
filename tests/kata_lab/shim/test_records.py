"""Containers on disk: names, locks, the truth about dead shims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.state import ProcessIdentity
from kata_lab.shim.names import QUALITIES, THINGS, made_up_name
from kata_lab.shim.records import (
    UNKNOWN_STATUS,
    ContainerRecord,
    RecordError,
    ShimDirectory,
    find_container,
    list_containers,
    new_container,
    others_in,
)

pytestmark = pytest.mark.usefixtures("home")


def made(name: str = "", sandbox: str = "") -> ContainerRecord:
    return new_container(ContainerRecord(id="", name=name, sandbox=sandbox)).read()


def test_container_is_found_by_name_id_and_beginning_of_its_id() -> None:
    record = made("web")

    for name in ("web", record.id, record.id[:4]):
        assert find_container(name).id == record.id


def test_unknown_and_ambiguous_names_are_refused() -> None:
    for _ in range(17):
        made()
    first = [each.id[0] for each in list_containers()]
    twice = next(each for each in first if first.count(each) > 1)

    with pytest.raises(RecordError, match=r"there is no container 'nosuch': kata-lab ps -a lists"):
        find_container("nosuch")
    with pytest.raises(RecordError, match="give more of it"):
        find_container(twice)


def test_name_that_is_taken_or_can_be_none_is_refused() -> None:
    made("web")

    with pytest.raises(RecordError, match="there is a container 'web' already"):
        made("web")
    with pytest.raises(RuntimeFault, match="begin with a letter or digit"):
        made("../web")


def test_of_many_at_once_with_one_name_one_is_made() -> None:
    outcomes: list[str] = []

    def make() -> None:
        try:
            outcomes.append(made("web").id)
        except RecordError:
            outcomes.append("")

    threads = [threading.Thread(target=make) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert len([each for each in outcomes if each]) == 1
    assert len(list_containers()) == 1


def test_names_are_made_up_that_are_not_taken() -> None:
    everything = {f"{quality}_{thing}" for quality in QUALITIES for thing in THINGS}

    assert made_up_name(()) in everything
    assert made_up_name(everything) not in everything


def test_container_whose_shim_is_gone_has_stopped() -> None:
    directory = new_container(ContainerRecord(id="", name="web", sandbox=""))
    record = directory.read()
    record.state, record.creator = "running", None
    directory.write(record)

    found = directory.read()

    assert (found.state, found.status) == ("stopped", UNKNOWN_STATUS)
    assert found.reason == "the process of its sandbox is gone"


def test_container_whose_shim_lives_runs() -> None:
    directory = new_container(ContainerRecord(id="", name="web", sandbox=""))
    record = directory.read()
    record.state, record.creator = "running", None
    directory.write(record)
    shim = ShimDirectory(record.sandbox)
    shim.make()
    shim.claim()

    assert directory.read().state == "running"
    assert shim.owner() == ProcessIdentity.of(os.getpid())


def test_process_number_that_is_used_again_is_no_shim() -> None:
    shim = ShimDirectory("web")
    shim.make()
    (shim.path / "shim.json").write_text(json.dumps({"version": 1, "pid": os.getpid(), "started": 1}))

    assert shim.owner() is None


def test_container_that_is_being_made_by_a_dead_command_has_stopped() -> None:
    code = "from kata_lab.shim.records import *; new_container(ContainerRecord(id='', name='web', sandbox=''))"
    repository = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(repository)})

    assert find_container("web").read().state == "stopped"
    assert made("other").state == "creating"


def test_lock_makes_the_second_wait_for_the_first() -> None:
    directory = new_container(ContainerRecord(id="", name="web", sandbox=""))
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with directory.locked():
            order.append("second")

    with directory.locked():
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        order.append("first")
    thread.join()

    assert order == ["first", "second"]


def test_whoever_waited_for_a_container_that_was_removed_is_told() -> None:
    directory = new_container(ContainerRecord(id="", name="web", sandbox=""))
    told: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        try:
            with directory.locked():
                told.append("locked")
        except RecordError as error:
            told.append(str(error))

    with directory.locked():
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        directory.remove()
    thread.join()

    assert told == [f"there is no container {directory.id} any more"]


def test_record_of_a_removed_container_is_not_written() -> None:
    directory = new_container(ContainerRecord(id="", name="web", sandbox=""))
    record = directory.read()
    directory.remove()

    directory.write(record)

    assert not directory.path.exists()
    assert list_containers() == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "id": "x", "surprise": 1}'])
def test_damaged_record_is_told_and_does_not_hide_others(text: str) -> None:
    directory = new_container(ContainerRecord(id="", name="web", sandbox=""))
    other = made("other")
    (directory.path / "container.json").write_text(text)

    with pytest.raises(RecordError, match="record"):
        directory.read()
    assert [each.id for each in list_containers()] == [other.id]


def test_others_of_a_sandbox_are_those_that_live() -> None:
    first, second = made("first", "pod-a"), made("second", "pod-a")
    made("third", "pod-b")

    assert [each.id for each in others_in(first)] == [second.id]
