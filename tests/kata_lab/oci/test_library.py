"""The local store: import, names, removal, giving space back, and several processes at once."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kata_lab.oci import OciError, import_image, list_images, open_image, prune, remove_image
from kata_lab.oci.image import store_directory
from kata_lab.oci.writer import LayerArchive
from tests.kata_lab.oci.conftest import need
from tests.kata_lab.oci.layer_cases import base, layout, random_layers, upper


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_imported_image_is_found_by_its_names(tmp_path: Path) -> None:
    reference = layout(tmp_path / "layout", base, upper)

    stored = import_image(reference, "lab/tools")

    with open_image(reference) as original, open_image("lab/tools") as named, open_image(stored.digest) as digested:
        assert stored.digest == original.digest == named.digest == digested.digest
        assert named.layers() == original.layers()
    assert [(each.name, each.architecture) for each in list_images()] == [("lab/tools:latest", "riscv64")]
    assert stored.size > 0


@pytest.mark.parametrize(
    ("tag", "name", "expected"),
    [("test", None, "test:latest"), ("2.0", "box", "box:latest"), ("lab/a:1", None, "lab/a:1")],
)
def test_name_comes_from_the_tag_unless_it_is_given(tmp_path: Path, tag: str, name: str | None, expected: str) -> None:
    assert import_image(layout(tmp_path / "layout", base, tag=tag), name).name == expected


def test_name_moves_to_the_newer_image(tmp_path: Path) -> None:
    import_image(layout(tmp_path / "one", base), "box")
    second = import_image(layout(tmp_path / "two", upper), "box")

    assert [each.digest for each in list_images()] == [second.digest]


def test_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    import_image(layout(tmp_path / "layout", base), "busybox")

    with pytest.raises(OciError, match="no image 'busibox' in the local store: did you mean 'busybox'"):
        open_image("busibox")
    with pytest.raises(OciError, match="no image 'busibox'"):
        remove_image("busibox")


@pytest.mark.parametrize("name", ["", "a b", "-x", "x:", "../up", "x" * 300, "a//b:1:2"])
def test_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    reference = layout(tmp_path / "layout", base, tag="fine")

    with pytest.raises(OciError, match="is no name of an image"):
        import_image(reference, name or " ")


def test_image_that_cannot_be_unpacked_does_not_come_in(tmp_path: Path) -> None:
    reference = layout(tmp_path / "layout", lambda layer: layer.hard_link("a", "nowhere"))

    with pytest.raises(OciError, match="does not have"):
        import_image(reference, "bad")

    assert list_images() == []


def test_pruning_takes_what_no_image_needs_and_leaves_the_rest(tmp_path: Path) -> None:
    import_image(layout(tmp_path / "one", base, upper), "kept")
    import_image(layout(tmp_path / "two", base, *random_layers(1)), "gone")
    remove_image("gone")

    pruned = prune()

    assert (pruned.blobs, pruned.layers) == (6, 4)
    assert pruned.size > 0
    with open_image("kept") as image:
        assert image.read("home/user/new") == b"new"
    assert prune() == type(pruned)(0, 0, 0)
    with pytest.raises(OciError, match="no image 'gone'"):
        open_image("gone")


def test_layers_in_use_are_not_pruned(tmp_path: Path) -> None:
    reference = layout(tmp_path / "layout", base)
    code = (
        "import sys; from kata_lab.oci import open_image\n"
        "with open_image(sys.argv[1]) as image:\n    print(image.layers()[0], flush=True); sys.stdin.read()"
    )
    with _start(code, reference) as user:
        assert user.stdout is not None
        place = Path(user.stdout.readline().strip())

        while_used = prune().layers
        user.kill()
        user.wait()
        afterwards = prune().layers

    assert (while_used, afterwards) == (0, 1)
    assert not place.exists()


def test_open_image_keeps_its_layers_until_it_is_closed(tmp_path: Path) -> None:
    with open_image(layout(tmp_path / "layout", base)) as image:
        place = image.layers()[0]
        assert prune().layers == 0
        assert place.is_dir()

    assert prune().layers == 1


def test_removed_layers_are_unpacked_again(tmp_path: Path) -> None:
    reference = layout(tmp_path / "layout", base)
    with open_image(reference) as image:
        image.layers()
    prune()

    with open_image(reference) as image:
        assert image.read("etc/hosts") is not None


def test_processes_at_once_import_and_prune_without_harm(tmp_path: Path) -> None:
    references = [layout(tmp_path / f"layout{number}", base, *random_layers(number)) for number in range(3)]
    code = (
        "import sys; from kata_lab.oci import import_image, open_image, prune\n"
        "for _ in range(3):\n"
        "    import_image(sys.argv[1], sys.argv[2]); prune()\n"
        "    with open_image(sys.argv[2]) as image: assert image.read('bin/tool') == b'tool'\n"
    )

    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_start(code, reference, f"box{number}")) for number, reference in enumerate(references)
        ]
        told = [each.communicate()[1].splitlines() for each in running]

    assert [each.returncode for each in running] == [0, 0, 0]
    # Whoever has to wait for another one says so.
    waiting = re.compile(r"Waiting for .*, which writes to the cache.*")
    assert [line for lines in told for line in lines if not waiting.fullmatch(line)] == []
    assert [each.name for each in list_images()] == ["box0:latest", "box1:latest", "box2:latest"]


def test_killed_import_leaves_nothing_half_done(tmp_path: Path) -> None:
    def large(archive: LayerArchive) -> None:
        archive.file("large", os.urandom(8 << 20))

    reference = layout(tmp_path / "layout", base, large)
    code = "import sys; from kata_lab.oci import import_image; print(flush=True); import_image(sys.argv[1], 'box')"
    for delay in (0.0, 0.05, 0.1, 0.2):
        with _start(code, reference) as victim:
            assert victim.stdout is not None
            victim.stdout.readline()
            try:
                victim.wait(delay)
            except subprocess.TimeoutExpired:
                victim.kill()

        prune()
        for image in list_images():
            with open_image(image.name) as handle:
                handle.layers()

    stored = import_image(reference, "box")
    assert [each.digest for each in list_images()] == [stored.digest]
    prune()
    assert not list(store_directory().rglob("new-*"))


def test_store_written_by_somebody_else_is_refused_in_one_sentence(tmp_path: Path) -> None:
    import_image(layout(tmp_path / "layout", base), "box")
    (store_directory() / "index.json").write_text("{")

    with pytest.raises(OciError, match="is not valid JSON"):
        list_images()


def test_image_that_skopeo_copied_into_the_store_is_found(tmp_path: Path) -> None:
    import_image(layout(tmp_path / "first", base), "first")
    reference = layout(tmp_path / "layout", base, upper)

    subprocess.run(
        [
            need("skopeo"),
            "--override-arch",
            "riscv64",
            "--insecure-policy",
            "copy",
            reference,
            f"oci:{store_directory()}:box",
        ],
        check=True,
        capture_output=True,
    )

    assert [(each.name, each.architecture) for each in list_images()] == [
        ("box:latest", "riscv64"),
        ("first:latest", "riscv64"),
    ]
    with open_image("box") as image:
        assert image.read("home/user/new") == b"new"
    remove_image("box")
    assert [each.name for each in list_images()] == ["first:latest"]
