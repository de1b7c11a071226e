"""Views of images say in words what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata_lab import lab
from kata_lab.errors import KataLabError
from kata_lab.image.library import Image

MIB = 1 << 20


def image(name: str, packages: dict[str, int], asked: int = 1) -> Image:
    manifest = {
        "name": name,
        "format_of_root": "initramfs",
        "description": {"packages": list(packages)[:asked]},
        "packages": [
            {"name": each, "version": "1", "bytes": size, "download": size // 2} for each, size in packages.items()
        ],
        "other_bytes": {"(modules)": 3 * MIB},
        "services": ["log", "shell"],
        "files": {"root.cpio": {"size": sum(packages.values()) + 3 * MIB}},
    }
    return Image("0" * 32, Path("nowhere"), manifest)


SMALL = image("small", {"busybox": MIB, "libc6": 2 * MIB})
LARGE = image("large", {f"package-{number:02}": number * MIB for number in range(1, 31)} | {"libc6": 9 * MIB}, 5)


def test_the_largest_packages_have_bars_and_the_rest_one_together() -> None:
    picture = lab.size_chart(LARGE)

    assert "largest first: package-30 30.0 MiB; package-29 29.0 MiB" in picture.alternative
    assert "18 more" in picture.alternative
    assert "package-01" not in picture.alternative


def test_what_no_package_brought_has_a_bar_too() -> None:
    assert "largest first: (modules) 3.0 MiB; libc6 2.0 MiB; busybox 1.0 MiB." in lab.size_chart(SMALL).alternative


def test_steps_say_packages_size_and_seconds() -> None:
    told = lab.steps_chart([LARGE, SMALL], {"small": 1.25}).alternative

    assert "large: packages 31, root, MiB 477.0, seconds to services up not measured" in told
    assert "small: packages 2, root, MiB 6.0, seconds to services up 1.2" in told


def test_steps_without_an_image_are_refused() -> None:
    with pytest.raises(KataLabError, match="no image to draw"):
        lab.steps_chart([], {})


def test_a_table_tells_what_was_asked_for_and_what_came() -> None:
    table = lab.image_table([LARGE, SMALL])

    assert table.rows[0][:3] == ("large", "5", "31")
    assert table.rows[1] == ("small", "1", "2", "1.5 MiB", "6.0 MiB", "log → shell")


def test_differences_have_the_largest_first() -> None:
    table = lab.difference_table(SMALL, LARGE)

    assert table.header == ("package", "small", "large")
    assert table.rows[0] == ("package-30", "–", "30.0 MiB")
    assert len(table.rows) == 20
    assert table.caption == "32 packages differ; the 20 that differ most"


def test_a_package_of_both_images_has_both_sizes() -> None:
    table = lab.difference_table(SMALL, image("other", {"libc6": 9 * MIB, "busybox": MIB}))

    assert list(table.rows) == [("libc6", "2.0 MiB", "9.0 MiB")]
    assert table.caption == "1 package differs"
