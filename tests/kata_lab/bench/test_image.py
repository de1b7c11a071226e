"""``kata-lab bench image`` measures both images in one run, in turns; no timing is judged."""

from __future__ import annotations

import json

import pytest

from kata_lab.bench.command import image_table
from kata_lab.bench.image import ImageFigures, OneImage
from kata_lab.cli import main
from kata_lab.image.build import build_named
from kata_lab.image.library import Image

FIELDS = {
    *("lifsea", "debian", "fewer_packages", "fewer_bytes", "times_sooner"),
    *("runs", "memory_mib", "versions"),
}
IMAGE_FIELDS = {"packages", "bytes", "boot_s", "boot_spread", "pss_bytes", "kernel"}


@pytest.fixture(scope="module")
def lifsea() -> Image:
    return build_named("lifsea", progress="off")


def test_it_prints_what_it_measured_of_two_images(
    lifsea: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def build(name: str) -> Image:
        asked.append(name)
        return lifsea  # which is up sooner than debian

    monkeypatch.setattr("kata_lab.bench.image.build_named", build)
    assert main(["bench", "image", "--json", "--runs", "1"]) == 0

    told = json.loads(capsys.readouterr().out)
    first, second = told["lifsea"], told["debian"]
    assert asked == ["lifsea", "debian"]
    assert set(told) == FIELDS
    assert set(first) == set(second) == IMAGE_FIELDS
    assert (first["packages"], first["bytes"]) == (len(lifsea.manifest["packages"]), lifsea.bytes)
    assert first["pss_bytes"] > lifsea.bytes
    assert told["times_sooner"] == pytest.approx(second["boot_s"] / first["boot_s"], rel=0.01)
    assert (told["fewer_packages"], told["fewer_bytes"]) == (0, 0)


def test_lifsea_has_a_fraction_of_the_packages_and_bytes_of_debian(lifsea: Image) -> None:
    debian = build_named("debian", progress="off")

    assert len(lifsea.manifest["packages"]) <= 0.4 * len(debian.manifest["packages"])
    assert lifsea.bytes <= 0.3 * debian.bytes
    assert lifsea.manifest["release"] == debian.manifest["release"]


def test_a_person_gets_a_table() -> None:
    lifsea = OneImage(packages=10, bytes=20 << 20, boot_s=2.0, boot_spread=0.1, pss_bytes=1 << 20, kernel="6.99")
    debian = OneImage(packages=100, bytes=100 << 20, boot_s=9.0, boot_spread=0.2, pss_bytes=2 << 20, kernel="6.99")
    figures = ImageFigures(
        lifsea=lifsea, debian=debian, fewer_packages=0.9, fewer_bytes=0.8, times_sooner=4.5, runs=3, versions={"a": "1"}
    )

    lines = [line.split() for line in image_table(figures).splitlines()]

    assert ["packages", "10", "100"] in lines
    assert ["fewer", "than", "debian", "90%"] in lines
    assert ["times", "sooner", "than", "debian", "4.5"] in lines
    assert lines[-1] == ["medians", "of", "3", "runs", "in", "turns;", "a", "1"]
