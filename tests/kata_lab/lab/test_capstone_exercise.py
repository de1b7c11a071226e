"""The bench and the check of notebook 7. One right design and one wrong one are measured, and judged in many variants.

The right one is the instructor's answer, and is nowhere in the notebook.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kata_lab.image.description import find_description, load_description
from kata_lab.image.library import Library
from kata_lab.lab import history_table, score_card
from kata_lab.lab.capstone import DesignBench, Inside, Measured
from kata_lab.lab.capstone_exercise import START, check_design, judge
from kata_lab.lab.machines import LabError
from tests.kata_lab.lab.answers import answered

MIB = 1 << 20
RIGHT: dict[str, Any] = answered(
    "07-design", copy=copy, load_description=load_description, find_description=find_description
)["design"]


@pytest.fixture(scope="module")
def bench(boot_guest: object) -> Iterator[DesignBench]:
    made = DesignBench("off")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def right(bench: DesignBench) -> Measured:
    return bench.measure(RIGHT)


def changed(part: str, **fields: Any) -> dict[str, Any]:
    """The right design, but for these fields of one part."""
    design = copy.deepcopy(RIGHT)
    design[part] |= fields
    return design


def test_the_right_design_meets_every_line(right: Measured) -> None:
    feedback = check_design(RIGHT, right)

    assert not right.failed
    assert all(line.met for line in judge(right)), score_card(right)
    assert feedback.passed
    assert feedback.exercise == "07-design"
    assert not score_card(right).marked
    assert right.processes == ("runtime",)
    assert [name for name, _ in right.timeline if name.endswith("answer")] == ["first answer"]


def test_the_design_that_one_begins_with_is_not_yet(right: Measured) -> None:
    assert check_design(START, None).verdict == "not yet"
    assert check_design(START, replace(right, design=START)).verdict == "not yet"


def test_a_design_that_was_changed_since_is_not_yet(right: Measured) -> None:
    assert "changed since it was measured" in check_design(changed("web", memory="9m"), right).text
    assert check_design(RIGHT, None).verdict == "not yet"


def test_a_careless_design_meets_hardly_a_line(bench: DesignBench) -> None:
    design = copy.deepcopy(dict(START)) | {"cook": {"cpus": 1.5, "memory": "16m"}}
    measured = bench.measure(design)
    # Two vCPUs from the beginning wait for each other by spinning, as long as the host lets them: any number.
    unmet = [line.name for line in judge(measured) if not line.met and line.name != "first answer"]
    feedback = check_design(design, measured)

    assert unmet == ["answers", "limits", "promises", "guest", "vCPUs", "processes", "disk", "console"]
    assert feedback.verdict == "not right"
    assert "Cook was ended for want of memory" in feedback.text
    assert " more not met.)" in feedback.text
    assert len(score_card(measured).marked) >= len(unmet)
    assert set(measured.processes) == {"runtime", "vmm", "fs"}
    assert "answers, limits" in repr(history_table(bench.history))


WEB = Inside(limit=8 * MIB, used=MIB, available=60 * MIB, cpus=2, out_of_memory=False)
COOK = Inside(limit=32 * MIB, used=MIB, available=60 * MIB, cpus=2, out_of_memory=False)


@pytest.mark.parametrize(
    ("changes", "names", "hint"),
    [
        ({"answer": "done: something"}, "answers", "look at both containers"),
        ({"inside": {"web": WEB, "cook": replace(COOK, out_of_memory=True)}}, "answers", "cook was ended"),
        ({"inside": {"web": replace(WEB, limit=None), "cook": COOK}}, "limits, promises", "web may use all memory"),
        ({"design": changed("cook", cpus=1)}, "limits", "how much of CPUs cook may use"),
        ({"inside": {"web": WEB, "cook": replace(COOK, limit=99 * MIB)}}, "promises", "all limits together"),
        ({"design": changed("sandbox", memory_mib=256)}, "guest", "the larger one counts"),
        ({"design": changed("sandbox", max_memory_mib=512)}, "guest", "the larger one counts"),
        ({"rest_vcpus": 2}, "vCPUs", "2 vCPUs before anybody needs them"),
        ({"inside": {"web": replace(WEB, cpus=1), "cook": replace(COOK, cpus=1)}}, "vCPUs", "room to grow"),
        ({"processes": ("runtime", "vmm")}, "processes", "each process has a heap"),
        ({"disk_bytes": 3 * MIB}, "disk", "a copy of its image's files"),
        ({"consoles": ("shell",)}, "console", "the service shell"),
        ({"instructions": 1_240_000_000}, "first answer", "the guest works before it serves"),
        ({"instructions": None}, "first answer", "does not tell how many instructions"),
    ],
)
def test_each_line_that_is_not_met_is_told_with_where_to_look(
    right: Measured, changes: dict[str, Any], names: str, hint: str
) -> None:
    measured = replace(right, **changes)
    unmet = [line for line in judge(measured) if not line.met]
    feedback = check_design(measured.design, measured)

    assert ", ".join(line.name for line in unmet) == names
    assert hint in unmet[0].where
    assert feedback.verdict == "not right"
    assert feedback.text.startswith(f"{unmet[0].name}: ")


@pytest.mark.parametrize(
    ("design", "problem"),
    [
        ({}, "a design is a dictionary with guest, sandbox, web, cook"),
        (RIGHT | {"guest": 5}, "the guest is 5, it must be the name of an image or a description"),
        (RIGHT | {"web": "64m"}, "'web' is '64m', it must be a dictionary"),
        (changed("web", ram="64m"), "'web' has a field 'ram', which is none of cpus, memory"),
        (changed("sandbox", vcpus="two"), "vcpus is 'two', it must be a whole number above 0"),
        (changed("sandbox", hypervisor="xen"), "hypervisor is 'xen', it must be one of fused, rpc, qemu"),
    ],
)
def test_what_is_no_design_is_refused(bench: DesignBench, design: dict[str, Any], problem: str) -> None:
    before = len(bench.history)

    with pytest.raises(LabError, match=problem):
        bench.measure(design)

    assert problem in check_design(design, None).text
    assert len(bench.history) == before


@pytest.mark.parametrize(
    ("guest", "reason"),
    [
        ({"name": "kitchen"}, "a guest of your own begins with 'lab-'"),
        ({"root": {"format": "erofs"}}, "that of a sandbox is an initramfs"),
        ({"services": []}, "the guest has no agent"),
    ],
)
def test_a_guest_that_could_not_serve_is_refused_before_it_is_waited_for(
    bench: DesignBench, guest: dict[str, Any], reason: str
) -> None:
    design = RIGHT | {"guest": RIGHT["guest"] | guest}
    measured = bench.measure(design)

    assert reason in measured.failed
    assert reason in check_design(design, measured).text
    with pytest.raises(LabError, match="was not measured"):
        score_card(measured)
    assert reason in repr(history_table([measured]))


def test_a_pod_that_cannot_come_is_told_and_its_guest_is_removed() -> None:
    bench = DesignBench("off")
    measured = bench.measure(changed("web", memory="1m") | {"guest": RIGHT["guest"] | {"name": "lab-removed"}})
    assert "lab-removed" in Library().names()

    bench.close()
    bench.close()

    assert "the pod did not come up: web: " in measured.failed
    assert check_design(measured.design, measured).verdict == "not right"
    assert "lab-removed" not in Library().names()
    assert "lifsea" in Library().names()


def test_the_seventh_notebook_holds_the_exercise_and_not_its_solution() -> None:
    place = Path(__file__).parents[3] / "notebooks" / "07-capstone.ipynb"
    cells = [cell.source for cell in nbformat.read(place, as_version=4).cells]

    assert any("check_design(design, measured)" in cell for cell in cells)
    assert not any('memory_mib": 160' in cell or '!= "shell"' in cell for cell in cells)
