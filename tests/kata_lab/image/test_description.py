"""Editing a description is safe: whatever cannot work is refused with its JSON path and a suggestion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.description import descriptions, find_description, load_description, parse_description

SMALL: dict[str, Any] = {
    "name": "small",
    "base": {"suite": "trixie", "architecture": "riscv64"},
    "kernel": {"package": "linux-image-riscv64"},
    "packages": ["micropython"],
    "services": [
        {"name": "last", "command": ["/bin/last"], "after": ["first"]},
        {"name": "first", "command": ["/bin/first"]},
    ],
}


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = copy.deepcopy(SMALL)
    change(data)
    return data


@pytest.mark.parametrize("name", sorted(descriptions()))
def test_description_that_comes_with_the_project_is_valid(name: str) -> None:
    assert load_description(find_description(name)).name == name


def test_services_are_put_in_the_order_of_their_start() -> None:
    assert [service.name for service in parse_description(SMALL).services] == ["first", "last"]


@pytest.mark.parametrize(
    ("change", "path", "hint"),
    [
        (lambda data: data.update(packges=[]), "$:", "'packages'"),
        (lambda data: data["base"].update(architecture="riscv46"), "$.base.architecture:", "'riscv64'"),
        (lambda data: data["kernel"].pop("package"), "$.kernel:", "'package' is missing"),
        (lambda data: data.update(packages="micropython"), "$.packages:", "a list"),
        (lambda data: data["packages"].append("micropython"), "$.packages:", "given twice"),
        (lambda data: data["services"][0].update(restart="alway"), "$.services[0].restart:", "'always'"),
        (lambda data: data["services"][0].update(once="yes"), "$.services[0].once:", "true or false"),
        (lambda data: data["services"][0].update(after=["frist"]), "$.services[0].after[0]:", "'first'"),
        (lambda data: data["services"][1].update(after=["last"]), "$.services[1].after:", "in a circle"),
        (lambda data: data["services"][1].update(name="last"), "$.services[1].name:", "given twice"),
        (lambda data: data.update(files={"/etc/../../x": {"text": ""}}), "$.files", "no empty, '.' or '..' parts"),
        (lambda data: data.update(files={"etc/x": {"text": ""}}), "$.files:", '"etc/x"'),
        (lambda data: data.update(files={"/x": {"text": "", "link": "y"}}), "$.files", "exactly one of"),
        (lambda data: data.update(users=[{"name": "a", "uid": 1, "home": "/a:b"}]), "$.users[0].home:", "the form"),
        (lambda data: data.update(exclude={"packages": ["micropython"]}), "$.exclude.packages[0]:", "$.packages"),
        (lambda data: data.update(users=[{"name": "a", "uid": 1}, {"name": "b", "uid": 1}]), "$.users[1].uid:", "'1'"),
    ],
)
def test_mistake_is_refused_with_its_path_and_a_suggestion(
    change: Callable[[dict[str, Any]], object], path: str, hint: str
) -> None:
    with pytest.raises(ImageError) as refusal:
        parse_description(changed(change), "mine.json")

    assert str(refusal.value).startswith(f"mine.json: {path}")
    assert hint in str(refusal.value)


def test_field_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"name": "a", "name": "b"}')

    with pytest.raises(ImageError, match="'name' is given twice"):
        load_description(tmp_path / "twice.json")


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"name": ')

    with pytest.raises(ImageError, match=r"broken\.json is not valid JSON: .*line 1"):
        load_description(tmp_path / "broken.json")


def test_unknown_description_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ImageError, match="did you mean 'lifsea'"):
        find_description("lifesea")
