"""Packages come through APT verified or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.apt import ATTEMPTS, Archive
from tests.kata_lab.image.fake_mirror import INDEX, FakeMirror, Signer

DEB = "busybox-static_1-1_riscv64.deb"


def open_archive(mirror: FakeMirror, signer: Signer) -> Archive:
    return Archive(mirror.uri, keyring=signer.keyring, progress="off")


def packages_in(home: Path) -> list[str]:
    return [path.name for path in (home / "cache" / "packages").rglob("*") if path.is_file() and path.name != "lock"]


def test_package_is_fetched_as_the_archive_has_it(mirror: FakeMirror, signer: Signer) -> None:
    archive = open_archive(mirror, signer)

    place = archive.fetch(archive.find("busybox-static"))

    assert place.read_bytes() == mirror.files[f"/pool/{DEB}"]


def test_package_in_the_cache_needs_no_network(mirror: FakeMirror, signer: Signer) -> None:
    archive = open_archive(mirror, signer)
    place = archive.fetch(archive.find("busybox-static"))
    asked = mirror.requests.total()

    again = open_archive(mirror, signer)
    assert again.fetch(again.find("busybox-static")) == place
    assert mirror.requests.total() == asked


@pytest.mark.parametrize("fault", ["wrong hash", "wrong size"])
def test_wrong_package_is_retried_then_refused(mirror: FakeMirror, signer: Signer, home: Path, fault: str) -> None:
    archive = open_archive(mirror, signer)
    package = archive.find("busybox-static")
    mirror.faults[DEB] = fault

    with pytest.raises(ImageError, match="with a wrong hash or size, 3 times, so it is refused"):
        archive.fetch(package)

    assert mirror.requests_for(DEB) >= ATTEMPTS
    assert packages_in(home) == []
    mirror.faults.clear()
    assert archive.fetch(package).read_bytes() == mirror.files[f"/pool/{DEB}"]


def test_truncated_package_is_refused_and_never_used(mirror: FakeMirror, signer: Signer, home: Path) -> None:
    archive = open_archive(mirror, signer)
    package = archive.find("busybox-static")
    mirror.faults[DEB] = "truncated"

    with pytest.raises(ImageError, match="busybox-static"):
        archive.fetch(package)

    assert packages_in(home) == []
    mirror.faults.clear()
    assert archive.fetch(package).read_bytes() == mirror.files[f"/pool/{DEB}"]


@pytest.mark.parametrize("fault", ["wrong hash", "wrong size"])
def test_index_that_the_signature_does_not_cover_is_refused(mirror: FakeMirror, signer: Signer, fault: str) -> None:
    mirror.faults[INDEX] = fault

    with pytest.raises(ImageError, match="package index of Debian trixie with a wrong hash or size"):
        open_archive(mirror, signer).find("busybox-static")

    mirror.faults.clear()
    assert open_archive(mirror, signer).find("busybox-static").version == "1:1-1"


def test_suite_is_fetched_by_its_other_name_where_the_mirror_is_half_way_to_a_new_version(
    mirror: FakeMirror, signer: Signer
) -> None:
    mirror.suite = "stable"
    mirror.publish()
    mirror.faults[f"/dists/trixie/{INDEX}"] = "wrong size"

    archive = open_archive(mirror, signer)

    assert archive.fetch(archive.find("busybox-static")).read_bytes() == mirror.files[f"/pool/{DEB}"]
    assert mirror.requests_for(f"/dists/stable/{INDEX}") == 1
    asked = mirror.requests.total()
    assert open_archive(mirror, signer).find("busybox-static").version == "1:1-1"
    assert mirror.requests.total() == asked
    assert open_archive(mirror, signer).paths_of("busybox-static") == {"usr/bin/busybox"}

    mirror.faults.clear()
    archive.update()
    asked = mirror.requests_for(f"/dists/stable/{INDEX}")
    assert archive.find("busybox-static").version == "1:1-1"
    assert mirror.requests_for(f"/dists/stable/{INDEX}") == asked


def test_another_suite_behind_the_other_name_is_refused(mirror: FakeMirror, signer: Signer) -> None:
    mirror.suite = "stable"
    mirror.publish(codename="forky")
    other = {path: data for path, data in mirror.files.items() if "/stable/" in path}
    mirror.publish()
    mirror.files |= other
    mirror.faults[f"/dists/trixie/{INDEX}"] = "wrong hash"

    with pytest.raises(ImageError, match="package index of Debian trixie with a wrong hash or size"):
        open_archive(mirror, signer).find("busybox-static")

    assert mirror.requests_for(f"/dists/stable/{INDEX}") == 1


def test_archive_signed_by_a_stranger_is_refused(mirror: FakeMirror, signer: Signer, stranger: Signer) -> None:
    mirror.publish(signer=stranger)

    with pytest.raises(ImageError, match=r"signature of .* does not verify with the keys in .*debian-archive-keyring"):
        open_archive(mirror, signer).find("busybox-static")


def test_archive_changed_after_signing_is_refused(mirror: FakeMirror, signer: Signer) -> None:
    signed = mirror.files["/dists/trixie/InRelease"]
    mirror.files["/dists/trixie/InRelease"] = signed.replace(b"Origin: Test", b"Origin: Mine")

    with pytest.raises(ImageError, match="does not verify"):
        open_archive(mirror, signer).find("busybox-static")


def test_unsigned_archive_is_refused(mirror: FakeMirror, signer: Signer) -> None:
    del mirror.files["/dists/trixie/InRelease"]

    with pytest.raises(ImageError, match="does not verify"):
        open_archive(mirror, signer).find("busybox-static")


def test_host_settings_that_waive_signatures_are_not_taken_over(
    mirror: FakeMirror, signer: Signer, stranger: Signer, tmp_path: Path
) -> None:
    with (tmp_path / "apt.conf").open("a") as settings:
        settings.write('Acquire::AllowInsecureRepositories "true";\nAPT::Get::AllowUnauthenticated "true";\n')
    mirror.publish(signer=stranger)

    with pytest.raises(ImageError, match="does not verify"):
        open_archive(mirror, signer).find("busybox-static")


def test_host_proxy_is_taken_over(mirror: FakeMirror, signer: Signer, tmp_path: Path) -> None:
    with (tmp_path / "apt.conf").open("a") as settings:
        settings.write(f'Acquire::http::Proxy "{mirror.uri}";\n')
    archive = Archive("http://mirror.invalid", keyring=signer.keyring, progress="off")
    for path in list(mirror.files):
        mirror.files[f"http://mirror.invalid{path}"] = mirror.files[path]

    assert archive.find("busybox-static").architecture == "riscv64"


def test_unknown_package_is_named(mirror: FakeMirror, signer: Signer) -> None:
    with pytest.raises(ImageError, match="Debian trixie has no package 'busybox-statik' for riscv64"):
        open_archive(mirror, signer).find("busybox-statik")


def test_unreachable_mirror_is_named(home: Path, signer: Signer) -> None:
    archive = Archive("http://127.0.0.1:9", keyring=signer.keyring, progress="off")

    with pytest.raises(ImageError, match=r"could not be fetched from http://127\.0\.0\.1:9: check the network"):
        archive.find("busybox-static")


def test_full_disk_is_told_as_what_it_is(
    mirror: FakeMirror, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "programs" / "apt-get"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'E: Write error - write (28: No space left on device)'\nexit 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    with pytest.raises(ImageError, match=r"the disk with the cache directory .* is full: make room there") as refused:
        open_archive(mirror, signer).find("busybox-static")
    assert "network" not in str(refused.value)


def test_download_that_fails_is_not_shown_as_done(
    mirror: FakeMirror, signer: Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.files.clear()

    with pytest.raises(ImageError):
        Archive(mirror.uri, keyring=signer.keyring, progress="lines").find("busybox-static")

    assert capsys.readouterr().err.startswith("Reading Debian's package index: failed after ")


def test_files_of_a_package_are_known_without_it(mirror: FakeMirror, signer: Signer) -> None:
    archive = open_archive(mirror, signer)

    assert archive.paths_of("busybox-static") == {"usr/bin/busybox"}
    assert archive.paths_of("busybox-stati") is None
    assert mirror.requests_for("Contents-riscv64.gz") == 1
    assert mirror.requests_for(".deb") == 0


def test_mirror_without_the_suite_is_named(mirror: FakeMirror, signer: Signer) -> None:
    mirror.files.clear()

    with pytest.raises(ImageError, match="does not have the package index of Debian trixie for riscv64"):
        open_archive(mirror, signer).find("busybox-static")


def test_corrupted_cache_is_fetched_again(mirror: FakeMirror, signer: Signer) -> None:
    archive = open_archive(mirror, signer)
    package = archive.find("busybox-static")
    place = archive.fetch(package)
    good = place.read_bytes()
    place.write_bytes(good[:100] + b"?" + good[101:])

    assert archive.fetch(package).read_bytes() == good
    assert mirror.requests_for(DEB) == 2


def test_machine_without_apt_is_told(home: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))

    with pytest.raises(ImageError, match="this machine has no apt-get"):
        Archive("http://127.0.0.1:9", keyring=signer.keyring)


def test_missing_keyring_is_told(home: Path) -> None:
    with pytest.raises(
        ImageError, match=r"keyring /nowhere does not exist: install the package debian-archive-keyring"
    ):
        Archive("http://127.0.0.1:9", keyring=Path("/nowhere"))


def test_ordinary_user_needs_no_root(mirror: FakeMirror, signer: Signer) -> None:
    script = (
        "import sys; from pathlib import Path; from kata_lab.image.apt import Archive\n"
        "archive = Archive(sys.argv[1], keyring=Path(sys.argv[2]))\n"
        "print(archive.fetch(archive.find('busybox-static')))"
    )
    with tempfile.TemporaryDirectory() as home:
        keyring = Path(home) / "keyring.gpg"
        shutil.copy(signer.keyring, keyring)
        switch: list[str] = []
        if os.getuid() == 0:
            os.chown(home, 65534, 65534)
            switch = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        environment = {
            "PATH": os.environ["PATH"],
            "KATA_LAB_HOME": home,
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "no_proxy": "127.0.0.1",
        }
        done = subprocess.run(
            [*switch, sys.executable, "-c", script, mirror.uri, str(keyring)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).read_bytes() == mirror.files[f"/pool/{DEB}"]
