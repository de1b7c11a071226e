"""Names of modules are kept in files that are read back whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata_lab.image.description import descriptions, load_description
from kata_lab.image.module_names import ModuleNames, familiar_names

NAMES = ModuleNames("6.99", "00ff", frozenset({"erofs", *(f"module_{number}" for number in range(99))}), frozenset())


@pytest.mark.parametrize("path", descriptions().values(), ids=list(descriptions()))
def test_modules_of_our_own_images_are_familiar(path: Path) -> None:
    description = load_description(path)
    names = familiar_names(description.architecture)

    assert names is not None
    assert {*description.modules, *description.modules_on_demand} <= names.loadable | names.built_in


def test_names_are_read_back() -> None:
    assert ModuleNames.decode(NAMES.encode()) == NAMES
    assert max(len(line) for line in NAMES.encode().splitlines()) <= 120


@pytest.mark.parametrize("change", [(b"erofs", b"erosf"), (b"Loadable", b"Loadible"), (b"Release: 6", b"Release: 7")])
def test_changed_names_are_none(change: tuple[bytes, bytes]) -> None:
    assert ModuleNames.decode(NAMES.encode().replace(*change)) is None
    assert ModuleNames.decode(NAMES.encode()[:-200]) is None
    assert ModuleNames.decode(b"\xff\0") is None
