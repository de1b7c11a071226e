"""Layers that are no good are refused, with nothing written outside; and what is kept of those that are."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kata_lab.oci import Limits, OciError, open_image, unpack_rootfs
from kata_lab.oci.layered import LayeredTree
from kata_lab.oci.unpack import LayerWriter
from kata_lab.oci.writer import ImageWriter, LayerArchive, WrittenLayer
from tests.kata_lab.oci.layer_cases import base, described, layout, opened, upper


def _raw(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"", **fields: int) -> LayerArchive:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    layer = LayerArchive()
    layer.raw(info, data)
    return layer


def _unpack(archive: bytes, place: Path, limits: Limits | None = None) -> Path:
    writer = LayerWriter(place, LayeredTree([]), os.geteuid() != 0, limits or Limits())
    writer.unpack(io.BytesIO(archive))
    return place


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: _raw("/etc/passwd"), "relative name"),
        (lambda: _raw("../outside"), r"'\.\.'"),
        (lambda: _raw("a/../../outside"), r"'\.\.'"),
        (lambda: _raw("x" * 256), "255 in each name"),
        (lambda: _raw("x/" * 2100 + "y"), "at most 4095 bytes"),
        (lambda: _raw(f"{'x' * 253}/" * 16 + "y"), "File name too long"),
        (lambda: _raw("x/" * 201 + "y"), "at most 200 names"),
        (lambda: _raw("link", tarfile.LNKTYPE, "/etc/passwd"), "relative name"),
        (lambda: _raw("link", tarfile.LNKTYPE, "../../etc/passwd"), r"'\.\.'"),
        (lambda: _raw("link", tarfile.LNKTYPE, "etc/passwd"), "the layer does not have"),
        (lambda: _raw("link", tarfile.SYMTYPE, ""), "must have a target"),
        (lambda: _raw("dev", tarfile.CHRTYPE), "whiteout of overlayfs"),
        (lambda: _raw("dev", tarfile.BLKTYPE, devmajor=1 << 20), "no device"),
        (lambda: _raw("what", b"Z"), "is unknown|cannot be read"),
        (lambda: _raw(".wh."), "names none"),
        (lambda: _raw(".wh..."), "names none"),
        (lambda: _raw("x/.wh..."), "names none"),
        (lambda: _raw(".", tarfile.SYMTYPE, "/etc"), "root must be a directory"),
        (lambda: _raw("owner", uid=1 << 32), "its owner"),
        (lambda: _raw("owner", gid=-1), "its group"),
    ],
)
def test_member_that_leaves_the_layer_is_refused(
    tmp_path: Path, make: Callable[[], LayerArchive], complaint: str
) -> None:
    (tmp_path / "in").mkdir()

    with pytest.raises(OciError, match=complaint):
        _unpack(make().finish(), tmp_path / "in" / "layer")

    assert [each.name for each in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("target", ["/", "..", "../../..", "/etc", "."])
def test_member_through_a_link_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "in").mkdir()
    layer = LayerArchive()
    layer.symlink("escape", target)
    layer.file("escape/written", b"outside")

    with pytest.raises(OciError, match="must be a directory"):
        _unpack(layer.finish(), tmp_path / "in" / "layer")

    assert not list(tmp_path.rglob("written"))


def test_link_does_not_lead_a_later_file_outside(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    layer = LayerArchive()
    layer.symlink("file", str(victim))
    layer.file("file", b"theirs", 0o777)
    layer.symlink("other", str(victim))
    layer.hard_link("hard", "other")
    layer.file("hard", b"theirs")

    place = _unpack(layer.finish(), tmp_path / "layer")

    assert victim.read_bytes() == b"mine"
    assert (place / "file").read_bytes() == b"theirs"
    assert (place / "other").readlink() == victim


def test_set_user_id_of_a_hard_link_to_a_link_does_not_leave_the_layer(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    victim.chmod(0o600)
    layer = LayerArchive()
    layer.symlink("link", str(victim))
    layer.hard_link("again", "link")

    _unpack(layer.finish(), tmp_path / "layer")

    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    layer = LayerArchive()
    for number in range(20):
        layer.file(f"file{number}", b"")

    with pytest.raises(OciError, match="more than 10 members"):
        _unpack(layer.finish(), tmp_path / "layer", Limits(members=10))


def test_too_many_bytes_are_refused_before_they_are_written(tmp_path: Path) -> None:
    layer = LayerArchive()
    layer.file("large", bytes(100_000))

    with pytest.raises(OciError, match="more than 50000 bytes"):
        _unpack(layer.finish(), tmp_path / "layer", Limits(size=50_000))

    assert not (tmp_path / "layer" / "large").exists()


def test_huge_sparse_file_is_refused(tmp_path: Path) -> None:
    layer = _raw("sparse")
    info = tarfile.TarInfo("huge")
    info.pax_headers = {"GNU.sparse.size": str(1 << 60), "GNU.sparse.map": "0,0"}
    layer.raw(info)

    with pytest.raises(OciError, match="more than"):
        _unpack(layer.finish(), tmp_path / "layer")


def test_sparse_file_keeps_its_holes(tmp_path: Path) -> None:
    info = tarfile.TarInfo("sparse")
    info.pax_headers = {"GNU.sparse.size": str(64 << 20), "GNU.sparse.map": f"{32 << 20},4"}
    info.size = 4
    layer = LayerArchive()
    layer.raw(info, b"data")

    place = _unpack(layer.finish(), tmp_path / "layer") / "sparse"

    assert place.stat().st_size == 64 << 20
    assert place.stat().st_blocks * 512 < 4 << 20
    with place.open("rb") as file:
        file.seek(32 << 20)
        assert file.read(5) == b"data\0"


def test_huge_header_is_refused_without_being_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    archive = info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)

    with pytest.raises(OciError, match="header of 1099511627776 bytes"):
        _unpack(archive, tmp_path / "layer")


def test_endless_gzip_is_refused(tmp_path: Path) -> None:
    writer = ImageWriter(tmp_path / "layout")
    bomb = gzip.compress(bytes(200 << 20), 9)
    layer = writer.blob("application/vnd.oci.image.layer.v1.tar+gzip", bomb)
    writer.tag(writer.image([WrittenLayer(layer, "sha256:" + "0" * 64)]), "bomb")

    with (
        open_image(f"oci:{tmp_path}/layout", limits=Limits(size=1 << 20, members=100)) as image,
        pytest.raises(OciError, match="more bytes than it may"),
    ):
        image.layers()


def test_attributes_of_overlayfs_do_not_come_out_of_an_archive(tmp_path: Path) -> None:
    layer = LayerArchive()
    names = ("user.overlay.whiteout", "user.overlay.opaque", "user.containers.override_stat", "trusted.overlay.opaque")
    layer.directory("directory", xattrs={**dict.fromkeys(names, b"y"), "user.kept": b"1"})

    with open_layer(tmp_path, layer) as found:
        assert [name for name in os.listxattr(found / "directory") if "containers" not in name] == ["user.kept"]
        assert not [
            name for name in os.listxattr(found / "directory") if os.getxattr(found / "directory", name) == b"y"
        ]


class open_layer:
    """The unpacked layer of an image with one."""

    def __init__(self, directory: Path, layer: LayerArchive) -> None:
        writer = ImageWriter(directory / "layout")
        writer.tag(writer.image([writer.layer(layer.finish())]), "one")
        self._image = open_image(f"oci:{directory}/layout")

    def __enter__(self) -> Path:
        try:
            return self._image.layers()[0]
        except BaseException:
            self._image.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._image.close()


def test_whiteouts_and_opaque_directories_take_the_form_of_overlayfs(tmp_path: Path) -> None:
    with opened(tmp_path / "layout", base, upper) as image:
        lower, higher = image.layers()

        assert (higher / "etc/hosts").lstat().st_rdev == 0
        assert stat.S_ISCHR((higher / "etc/hosts").lstat().st_mode)
        assert os.getxattr(higher / "home/user", "user.overlay.opaque") == b"y"
        assert (lower / "etc/hosts").read_bytes() == b"127.0.0.1 localhost\n"
        assert image.read("etc/hosts") is None
        assert image.read("home/user/file") is None
        assert image.read("home/user/new") == b"new"
        assert image.overlay_options == ("userxattr",)


def test_whiteout_of_a_file_in_the_same_layer_concerns_lower_layers_only(tmp_path: Path) -> None:
    def again(layer: LayerArchive) -> None:
        layer.file("etc/hosts", b"new\n")
        layer.whiteout("etc/hosts")
        layer.whiteout("home/user")
        layer.directory("home/user", 0o755)

    with opened(tmp_path / "layout", base, again) as image:
        unpack_rootfs(image, tmp_path / "flat")

    assert (tmp_path / "flat/etc/hosts").read_bytes() == b"new\n"
    assert list((tmp_path / "flat/home/user").iterdir()) == []


def test_whiteout_within_a_directory_that_is_removed_does_not_bring_it_back(tmp_path: Path) -> None:
    def twice(layer: LayerArchive) -> None:
        layer.whiteout("home/user/file")
        layer.opaque("home/user/deeper")
        layer.whiteout("home/user")

    with opened(tmp_path / "layout", base, twice) as image:
        unpack_rootfs(image, tmp_path / "flat")

    assert not (tmp_path / "flat/home/user").exists()


def test_whiteout_of_nothing_leaves_no_trace(tmp_path: Path) -> None:
    def needless(layer: LayerArchive) -> None:
        layer.whiteout("etc/nothing")
        layer.whiteout("new/nothing")
        layer.file("new/something", b"")
        layer.directory("bin")
        layer.opaque("bin")
        layer.whiteout("bin/tool")

    with opened(tmp_path / "layout", base, needless) as image:
        higher = image.layers()[1]

        assert not [each for each in higher.rglob("*") if stat.S_ISCHR(each.lstat().st_mode)]
        assert list((higher / "bin").iterdir()) == []


def test_unsaid_directories_are_as_in_the_layers_beneath(tmp_path: Path) -> None:
    def deeper(layer: LayerArchive) -> None:
        layer.file("home/user/more", b"")
        layer.file("tmp/file", b"")

    with opened(tmp_path / "layout", base, deeper) as image:
        unpack_rootfs(image, tmp_path / "flat")
        flat = described(tmp_path / "flat", image.override_stat)

    assert flat["home/user"][:3] == ("0o40700", 1000, 1000)
    assert flat["tmp"][:3] == ("0o41777", 0, 0)


def test_member_that_comes_again_replaces_the_first(tmp_path: Path) -> None:
    layer = LayerArchive()
    layer.file("one", b"file")
    layer.directory("one")
    layer.file("one/inside", b"")
    layer.file("two/inside", b"")
    layer.symlink("two", "one")
    layer.directory("three", 0o700)
    layer.directory("three", 0o711)

    place = _unpack(layer.finish(), tmp_path / "layer")

    assert (place / "one/inside").exists()
    assert (place / "two").is_symlink()
    assert stat.S_IMODE((place / "three").stat().st_mode) == 0o711


def test_attribute_that_is_too_large_is_refused(tmp_path: Path) -> None:
    layer = LayerArchive()
    layer.file("file", b"", xattrs={"user.large": bytes(70_000)})

    with pytest.raises(OciError, match=r"'user\.large' of 'file' has 70000 bytes"):
        _unpack(layer.finish(), tmp_path / "layer")


def test_root_goes_into_a_new_directory_only(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()

    with opened(tmp_path / "layout", base) as image, pytest.raises(OciError, match="is not empty"):
        unpack_rootfs(image, tmp_path / "full")


_NAMES = st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh.", "/", "a/b", "a/../..", "x" * 300])
_MEMBERS = st.tuples(
    st.lists(_NAMES, min_size=1, max_size=4).map("/".join),
    st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7"]),
    st.sampled_from(["", "a", "a/b", "../..", "/", "/etc/passwd"]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(_MEMBERS, max_size=8), cut=st.integers(0, 4000))
def test_no_archive_writes_outside(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, str]], cut: int
) -> None:
    place = tmp_path_factory.mktemp("hostile")
    layer = LayerArchive()
    for name, kind, link in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.devminor = kind, link, 3
        info.size = 5 if kind in (b"0", b"7") else 0
        layer.raw(info, b"hello"[: info.size])
    archive = layer.finish()

    refusal = ""
    try:
        _unpack(archive[: max(0, len(archive) - cut)], place / "layer")
    except OciError as error:
        refusal = str(error)

    assert "\n" not in refusal
    assert [each.name for each in place.iterdir()] == ["layer"]


def test_damaged_gzip_is_refused_in_one_sentence(tmp_path: Path) -> None:
    reference = layout(tmp_path / "layout", base)
    with open_image(reference) as image:
        blob = image.manifest.layers[0]
    path = tmp_path / "layout/blobs/sha256" / blob.digest.partition(":")[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)

    with open_image(reference) as image, pytest.raises(OciError) as caught:
        image.layers()

    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home/cache/layers/v1").glob("[0-9a-f]*")) == []
