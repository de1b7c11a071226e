"""Images in pictures: what a root is made of, and several images side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kata_lab.commands.image import differences, mebibytes
from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLUE, GREEN, ORANGE, SKY, Picture, Table, figure_picture

if TYPE_CHECKING:
    from kata_lab.image.library import Image

_MIB: Final = 1 << 20
_MOST_BARS: Final = 14
_MOST_ROWS: Final = 20


def image_table(images: Sequence[Image]) -> Table:
    """Images, one to a row: what was asked for, what came, and how large it is."""
    rows = [
        (
            image.name,
            str(len(image.manifest["description"]["packages"])),
            str(len(image.manifest["packages"])),
            mebibytes(sum(each["download"] for each in image.manifest["packages"])),
            mebibytes(image.bytes),
            " → ".join(image.manifest["services"]) or "those of the packages",
        )
        for image in images
    ]
    header = ("image", "packages asked for", "packages in it", "to download", "root", "services described")
    return Table(header, rows, "The images")


def size_chart(image: Image) -> Picture:
    """The packages of an image by size, the largest first; the small ones together in the last bar."""
    from matplotlib.figure import Figure

    sizes = {each["name"]: int(each["bytes"]) for each in image.manifest["packages"]}
    sizes |= image.manifest["other_bytes"]
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    shown, rest = order[:_MOST_BARS], order[_MOST_BARS:]
    bars = [(name, sizes[name], (GREEN, "...") if name.startswith("(") else (BLUE, "")) for name in shown]
    if rest:
        bars.append((f"{len(rest)} more", sum(sizes[name] for name in rest), (ORANGE, "///")))
    figure = Figure(figsize=(9, 1.0 + 0.28 * len(bars)))
    axes = figure.subplots()
    largest = max(size for _, size, _ in bars) or 1
    for row, (_, size, (colour, hatch)) in enumerate(bars):
        axes.barh(row, size / _MIB, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
        axes.text((size + 0.01 * largest) / _MIB, row, f"{size / _MIB:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    axes.invert_yaxis()
    _finish(axes, largest / _MIB, "MiB in the root, uncompressed")
    axes.set_title(f"{image.name}: {mebibytes(sum(sizes.values()))} of files by package", loc="left", fontsize=10)
    said = "; ".join(f"{name} {mebibytes(size)}" for name, size, _ in bars)
    return figure_picture(figure, f"Sizes by package of the image {image.name}, largest first: {said}.")


def steps_chart(images: Sequence[Image], seconds: Mapping[str, float]) -> Picture:
    """Images side by side: number of packages, size of the root, and seconds to services up where it was measured.

    Args:
        images: from top to bottom.
        seconds: name of an image → seconds.

    Raises:
        LabError: there is no image to draw.
    """
    from matplotlib.figure import Figure

    if not images:
        raise LabError("there is no image to draw: build one first")
    columns: list[tuple[str, list[float | None], tuple[str, str], str]] = [
        ("packages", [len(image.manifest["packages"]) for image in images], (ORANGE, "///"), ".0f"),
        ("root, MiB", [image.bytes / _MIB for image in images], (BLUE, ""), ".1f"),
        ("seconds to services up", [seconds.get(image.name) for image in images], (SKY, "..."), ".1f"),
    ]
    figure = Figure(figsize=(10, 1.2 + 0.45 * len(images)))
    for axes, (title, values, (colour, hatch), form) in zip(figure.subplots(1, 3, sharey=True), columns, strict=True):
        largest = max((value for value in values if value is not None), default=1.0)
        for row, value in enumerate(values):
            if value is not None:
                axes.barh(row, value, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            axes.text((value or 0) + 0.02 * largest, row, _told(value, form), va="center", fontsize=9)
        axes.set_yticks(range(len(images)), [image.name for image in images], fontsize=9)
        _finish(axes, largest, title)
    axes.invert_yaxis()
    said = "; ".join(
        f"{image.name}: " + ", ".join(f"{title} {_told(values[row], form)}" for title, values, _, form in columns)
        for row, image in enumerate(images)
    )
    return figure_picture(figure, f"Images side by side. {said}.")


def difference_table(first: Image, second: Image) -> Table:
    """Packages that only one of two images has, or that differ in version or size; the largest difference first."""
    found = differences(first, second)
    rows = [(row["name"], _cell(row["first"]), _cell(row["second"])) for row in found[:_MOST_ROWS]]
    caption = f"{len(found)} packages differ" if len(found) != 1 else "1 package differs"
    if len(found) > _MOST_ROWS:
        caption += f"; the {_MOST_ROWS} that differ most"
    return Table(("package", first.name, second.name), rows, caption)


def _cell(package: Mapping[str, Any] | None) -> str:
    return "–" if package is None else mebibytes(package["bytes"])


def _told(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _finish(axes: Any, largest: float, title: str) -> None:
    axes.set_xlim(0, largest * 1.25)
    axes.set_xlabel(title)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
