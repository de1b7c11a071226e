"""``kata-lab image`` as a person uses it: build, look, compare, hand on, remove."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kata_lab.cli import main
from kata_lab.image.library import Library


def add(name: str, packages: dict[str, int]) -> None:
    manifest = {
        "name": name,
        "summary": f"the {name} one",
        "architecture": "riscv64",
        "release": "6.99-riscv64",
        "format_of_root": "initramfs",
        "command_line": "quiet",
        "kernel_package": {"name": "linux-image-6.99-riscv64", "version": "1", "sha256": ""},
        "packages": [{"name": each, "version": "1", "bytes": size} for each, size in packages.items()],
        "other_bytes": {"(modules)": 5},
        "modules": ["overlay"],
        "services": ["log", "shell"],
        "bytes": sum(packages.values()) + 5,
    }
    Library().add(manifest, {"kernel": b"kernel", "root.cpio": name.encode() * 100})


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "home"))
    add("small", {"libc6": 1000, "busybox": 20})
    add("large", {"libc6": 1000, "perl": 50_000})


def test_list_has_every_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "list", "--json"]) == 0

    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["large", "small"]


def damage(name: str) -> None:
    Library().find(name).root.write_bytes(b"short")


def test_list_tells_of_a_damaged_image_in_its_row_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    damage("large")

    assert main(["image", "list"]) == 1

    told = capsys.readouterr()
    _, large, small = told.out.splitlines()
    assert large.startswith("large            damaged: the image 'large' cannot be read (root.cpio has another size")
    assert large.endswith("build it again")
    assert small.split()[:2] == ["small", "2"]
    assert told.err.startswith("kata-lab: the image 'large' is damaged: build again what you need")


def test_list_as_data_tells_of_a_damaged_image(capsys: pytest.CaptureFixture[str]) -> None:
    damage("small")

    assert main(["image", "list", "--json"]) == 1

    large, small = json.loads(capsys.readouterr().out)
    assert large["packages"] == 2
    assert small.keys() == {"name", "damaged"}


def test_damaged_image_can_be_removed() -> None:
    damage("small")

    assert main(["image", "rm", "small"]) == 0
    assert main(["image", "list"]) == 0


def test_show_tells_packages_by_size_services_and_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "show", "small"]) == 0

    shown = capsys.readouterr().out
    assert "6.99-riscv64 (linux-image-6.99-riscv64 1)" in shown
    assert "log → shell" in shown
    assert shown.index("libc6") < shown.index("busybox") < shown.index("(modules)")


def test_diff_tells_what_only_one_image_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "diff", "small", "large", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["packages"] == [
        {"name": "perl", "first": None, "second": {"version": "1", "bytes": 50_000}},
        {"name": "busybox", "first": {"version": "1", "bytes": 20}, "second": None},
    ]


def test_image_goes_out_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "small.img")

    assert [main(["image", *words]) for words in (["export", "small", file], ["rm", "small"], ["import", file])] == [
        0,
        0,
        0,
    ]

    assert capsys.readouterr().out.startswith("small: 2 packages")
    assert Library().names() == ["large", "small"]


def test_unknown_image_fails_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "show", "smal"]) == 1

    assert capsys.readouterr().err.startswith("kata-lab: there is no image 'smal' on this machine (large, small)")


def test_mistake_in_a_description_fails_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text('{"name": "mine", "pakages": []}')

    assert main(["image", "build", str(tmp_path / "mine.json")]) == 2

    assert "mine.json: $: the field 'pakages' is unknown: did you mean 'packages'?" in capsys.readouterr().err
