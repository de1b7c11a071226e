"""``kata-lab image``: build guest images and look at what is in them.

Exit status: 2 for a description that cannot be built as it is written, 1 for everything else that fails, of which
``list`` tells only after it has listed the images that are well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kata_lab.commands import UsageError
from kata_lab.errors import ImageError

if TYPE_CHECKING:
    from kata_lab.image.library import Image, Library

WIDEST_BAR = 30


def add_arguments(parser: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser]) -> None:
    """What the command line accepts after ``kata-lab image``."""
    actions = parser.add_subparsers(title="actions", dest="action", required=True, parser_class=parser_class)

    build = actions.add_parser("build", help="build an image from its description in JSON", allow_abbrev=False)
    build.add_argument("description", metavar="NAME|FILE", help="lifsea, debian, toolbox, or a JSON file of your own")
    build.add_argument("--locked", action="store_true", help="take exactly the packages of the lock")
    build.add_argument("--offline", action="store_true", help="the same, from the cache, without a network")
    build.add_argument("--refresh", action="store_true", help="take the newest packages and write the lock anew")
    build.add_argument("--mirror", metavar="URI", help="Debian archive to take packages from")

    listing = actions.add_parser("list", help="list the images on this machine", allow_abbrev=False)
    show = actions.add_parser("show", help="packages, sizes, services and kernel of an image", allow_abbrev=False)
    show.add_argument("name")
    diff = actions.add_parser("diff", help="two images side by side", allow_abbrev=False)
    diff.add_argument("first")
    diff.add_argument("second")
    for each in (listing, show, diff):
        each.add_argument("--json", action="store_true", help="print plain data")

    export = actions.add_parser("export", help="write an image to one file", allow_abbrev=False)
    export.add_argument("name")
    export.add_argument("file")
    actions.add_parser("import", help="take in an exported image", allow_abbrev=False).add_argument("file")
    actions.add_parser("rm", help="remove images", allow_abbrev=False).add_argument("names", nargs="+", metavar="name")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out one action; its exit status.

    Raises:
        UsageError: a description that is refused.
        ImageError: everything else that cannot be done.
    """
    from kata_lab.image.library import Library

    library = Library()
    match options.action:
        case "build":
            _build(options)
        case "list":
            _list(library, options.json)
        case "show":
            _show(library.find(options.name), options.json)
        case "diff":
            _diff(library.find(options.first), library.find(options.second), options.json)
        case "export":
            library.export(options.name, Path(options.file))
        case "import":
            print(_line(library.import_file(Path(options.file))))
        case "rm":
            for name in options.names:
                library.remove(name)
    return 0


def mebibytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / (1 << 20):.1f} MiB"


def differences(first: Image, second: Image) -> list[dict[str, Any]]:
    """Packages that only one of two images has, or that differ in version or size; the largest difference first."""
    one, two = ({each["name"]: each for each in image.manifest["packages"]} for image in (first, second))
    rows = []
    for name in sorted(one.keys() | two.keys()):
        left, right = one.get(name), two.get(name)
        if left != right:
            rows.append({"name": name, "first": _brief(left), "second": _brief(right)})
    return sorted(rows, key=lambda row: -abs(_bytes(row["first"]) - _bytes(row["second"])))


def _build(options: argparse.Namespace) -> None:
    from kata_lab.image.build import build_named
    from kata_lab.image.description import DescriptionError

    try:
        image = build_named(
            options.description,
            locked=options.locked,
            offline=options.offline,
            refresh=options.refresh,
            mirror=options.mirror,
        )
    except DescriptionError as error:
        raise UsageError(str(error)) from error
    print(_line(image))


def _line(image: Image) -> str:
    packages = len(image.manifest["packages"])
    size = mebibytes(image.bytes)
    return f"{image.name}: {packages} packages, {size} {image.root.suffix[1:]}, {image.identity[:12]}"


def _list(library: Library, plain: bool) -> None:
    """Print every image, and then fail if some are damaged."""
    found: dict[str, Image | ImageError] = {}
    for name in library.names():
        try:
            found[name] = library.find(name)
        except ImageError as error:
            found[name] = error
    if plain:
        print(json.dumps([_row(name, each) for name, each in found.items()], indent=1))
    else:
        print(f"{'name':16} {'packages':>8} {'root':>12} {'architecture':13} {'kernel':24} what it is")
        for name, each in found.items():
            print(f"{name:16} damaged: {each}" if isinstance(each, ImageError) else _columns(each))
    damaged = [repr(name) for name, each in found.items() if isinstance(each, ImageError)]
    if damaged:
        what = f"the image {damaged[0]} is" if len(damaged) == 1 else f"the images {', '.join(damaged)} are"
        raise ImageError(f"{what} damaged: build again what you need, and remove the rest with kata-lab image rm")


def _row(name: str, found: Image | ImageError) -> dict[str, Any]:
    return {"name": name, "damaged": str(found)} if isinstance(found, ImageError) else _summary(found)


def _columns(image: Image) -> str:
    manifest = image.manifest
    figures = f"{len(manifest['packages']):8} {mebibytes(image.bytes):>12}"
    return f"{image.name:16} {figures} {manifest['architecture']:13} {manifest['release']:24} {manifest['summary']}"


def _summary(image: Image) -> dict[str, Any]:
    manifest = image.manifest
    return {
        "name": image.name,
        "id": image.identity,
        "packages": len(manifest["packages"]),
        "bytes": image.bytes,
        "architecture": manifest["architecture"],
        "release": manifest["release"],
        "summary": manifest["summary"],
    }


def _show(image: Image, plain: bool) -> None:
    manifest = image.manifest
    if plain:
        print(json.dumps({"id": image.identity, **manifest}, indent=1))
        return
    kernel = manifest["kernel_package"]
    print(f"{image.name}: {manifest['summary']}")
    print(f"  identity  {image.identity}")
    print(f"  kernel    {manifest['release']} ({kernel['name']} {kernel['version']})")
    print(f"  modules   {' '.join(manifest['modules']) or 'none'}")
    print(f"  services  {' → '.join(manifest['services']) or 'none'}")
    print(f"  root      {mebibytes(image.bytes)} as {image.root.name}, {mebibytes(manifest['bytes'])} of files")
    rows = [(each["bytes"], each["name"], each["version"]) for each in manifest["packages"]]
    rows += [(size, name, "") for name, size in manifest["other_bytes"].items()]
    rows.sort(key=lambda row: (-row[0], row[1]))
    largest = max((row[0] for row in rows), default=0) or 1
    width = max((len(row[1]) for row in rows), default=0)
    print(f"  {len(manifest['packages'])} packages:")
    for size, name, version in rows:
        bar = "█" * round(size / largest * WIDEST_BAR)
        print(f"    {name:{width}} {size:>12,}  {bar:{WIDEST_BAR}} {version}".rstrip())


def _diff(first: Image, second: Image, plain: bool) -> None:
    rows = differences(first, second)
    if plain:
        print(json.dumps({"images": [_summary(first), _summary(second)], "packages": rows}, indent=1))
        return
    width = max((len(row["name"]) for row in rows), default=8)
    print(f"{'':{width}} {first.name:>36} {second.name:>36}")
    for title, one, two in (
        ("packages", str(len(first.manifest["packages"])), str(len(second.manifest["packages"]))),
        ("root", mebibytes(first.bytes), mebibytes(second.bytes)),
        ("files", mebibytes(first.manifest["bytes"]), mebibytes(second.manifest["bytes"])),
        ("kernel", first.manifest["release"], second.manifest["release"]),
        ("services", " ".join(first.manifest["services"]), " ".join(second.manifest["services"])),
    ):
        print(f"{title:{width}} {one:>36} {two:>36}")
    for row in rows:
        print(f"{row['name']:{width}} {_cell(row['first']):>36} {_cell(row['second']):>36}")


def _brief(package: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if package is None else {"version": package["version"], "bytes": package["bytes"]}


def _bytes(package: dict[str, Any] | None) -> int:
    return 0 if package is None else int(package["bytes"])


def _cell(package: dict[str, Any] | None) -> str:
    return "–" if package is None else f"{package['version'][:22]} {package['bytes']:>12,}"
