"""The checks of notebook 2: what is unsolved is "not yet", what is wrong is named, what is right passes.

The solutions are the instructor's answers, and nowhere in the notebook.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kata_lab.errors import ImageError, KataLabError
from kata_lab.image.build import build_named
from kata_lab.image.library import Image, Library
from kata_lab.lab.image_exercise import check_edit, check_explanation
from kata_lab.lab.image_workshop import Workshop, seconds_to_services
from tests.kata_lab.lab.answers import answered

NAME = "lab-exercise-test"
LINE = "while sleep 0.2; do echo $$ >>/run/beacon; done"
EXPLAINED = answered("02-explain")
LEFT = set(EXPLAINED["gone"]) - {"crun"}


@pytest.fixture(scope="module")
def lifsea() -> Image:
    return build_named("lifsea", progress="off")


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    try:
        yield made
    finally:
        made.close()


def solution(original: Image, line: str = LINE, **changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(dict(original.manifest["description"]))
    data["name"] = NAME
    answered("02-own-guest", mine=data)
    beacon = data["services"][-1]
    beacon["command"][-1] = line
    beacon |= changes
    return data


def test_the_unsolved_exercise_is_not_yet(lifsea: Image) -> None:
    assert check_edit(lifsea, lifsea).verdict == "not yet"
    assert check_explanation([], None, lifsea, lifsea).verdict == "not yet"
    assert check_explanation(["libc6"], "a", lifsea, lifsea).verdict == "not yet"


def test_the_right_guest_passes_and_so_does_its_explanation(lifsea: Image, workshop: Workshop) -> None:
    image = workshop.build(solution(lifsea))

    assert check_edit(image, lifsea).passed
    assert check_explanation(EXPLAINED["gone"], EXPLAINED["reason"], image, lifsea).passed
    for gone, reason, hint in (
        (LEFT | {"libc6"}, "b", "'libc6' did not leave"),
        (LEFT - {"libcap2"}, "b", "1 more left"),
        (LEFT, "a", "the reason is not"),
        (LEFT, "because", "one of 'a', 'b' and 'c'"),
    ):
        feedback = check_explanation(gone, reason, image, lifsea)
        assert feedback.verdict == "not right"
        assert hint in feedback.text


@pytest.mark.parametrize(
    ("line", "changes", "hint"),
    [(LINE, {"restart": "no"}, "when it is restarted"), ("sleep 999", {}, "not there or empty")],
)
def test_a_wrong_guest_is_told_what_it_lacks(
    lifsea: Image, workshop: Workshop, line: str, changes: dict[str, Any], hint: str
) -> None:
    feedback = check_edit(workshop.build(solution(lifsea, line, **changes)), lifsea)

    assert feedback.verdict == "not right"
    assert hint in feedback.text


def described(original: Image, data: dict[str, Any], packages: bool = False) -> Image:
    """An image as it would be described; it is not built, and cannot be booted."""
    kept = [each for each in original.manifest["packages"] if packages or each["name"] not in LEFT | {"crun"}]
    services = [each["name"] for each in data["services"]]
    manifest = {**original.manifest, "description": data, "packages": kept, "services": services}
    return dataclasses.replace(original, manifest=manifest)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [({"after": []}, "started after 'log'"), ({"name": "lamp"}, "none is called 'beacon'")],
)
def test_a_wrong_description_is_told_before_anything_boots(lifsea: Image, changes: dict[str, Any], hint: str) -> None:
    assert hint in check_edit(described(lifsea, solution(lifsea, **changes)), lifsea).text


def test_a_package_that_is_still_there_is_named(lifsea: Image) -> None:
    feedback = check_edit(described(lifsea, solution(lifsea), packages=True), lifsea)

    assert "'crun' is still in the image" in feedback.text


def test_a_service_that_was_lost_is_named(lifsea: Image) -> None:
    data = solution(lifsea)
    data["services"] = [each for each in data["services"] if each["name"] != "shell"]

    assert "the service 'shell' is gone" in check_edit(described(lifsea, data), lifsea).text


def test_a_workshop_removes_what_it_built_and_nothing_else(lifsea: Image) -> None:
    workshop = Workshop()
    workshop.build(solution(lifsea))
    assert NAME in Library().names()

    workshop.close()
    workshop.close()

    assert NAME not in Library().names()
    assert "lifsea" in Library().names()


def test_a_workshop_replaces_no_image_of_the_learner(lifsea: Image, workshop: Workshop) -> None:
    with pytest.raises(KataLabError, match="names begin with 'lab-'"):
        workshop.build(solution(lifsea) | {"name": "lifsea"})


def test_a_mistake_is_told_with_its_place(lifsea: Image, workshop: Workshop) -> None:
    place = f"$.services[{len(lifsea.manifest['description']['services'])}]"

    with pytest.raises(ImageError, match=re.escape(f"this description: {place}")):
        workshop.build(solution(lifsea, restart="sometimes"))


def test_lifsea_is_timed_until_its_services_are_up(lifsea: Image) -> None:
    assert seconds_to_services(lifsea, memory_mib=192) > 0


def test_the_second_notebook_holds_the_exercise_and_not_its_solution() -> None:
    place = Path(__file__).parents[3] / "notebooks" / "02-build-a-guest.ipynb"
    cells = [cell.source for cell in nbformat.read(place, as_version=4).cells]

    assert any("workshop.build(mine)" in cell for cell in cells)
    assert not any("while sleep" in cell or any(name in cell for name in LEFT) for cell in cells)
