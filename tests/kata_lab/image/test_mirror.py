"""The mirror is the one that the host's APT sources name, whatever their form and whoever else is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.mirror import find_mirror

DEB822 = """\
# the machine's own
Types: deb deb-src
URIs: http://one.invalid/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.invalid/debian
Suites: bookworm
Components: main

Types: deb
# a comment within a paragraph
URIs: http://two.invalid/debian/
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""

UBUNTU = "deb http://ubuntu.invalid/ubuntu jammy main universe\n"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KATA_LAB_MIRROR", raising=False)
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822_sources_are_read(sources: Path) -> None:
    (sources / "sources.list.d" / "debian.sources").write_text(DEB822)

    assert find_mirror(sources=sources) == "http://two.invalid/debian"


def test_one_line_sources_are_read(sources: Path) -> None:
    (sources / "sources.list").write_text(
        "# deb http://comment.invalid/debian bookworm main\n"
        "deb cdrom:[Debian]/ bookworm main\n"
        "deb-src http://source.invalid/debian bookworm main\n"
        "deb http://security.invalid/debian-security bookworm-security main\n"
        "deb [ arch=amd64 signed-by=/k/debian-archive-keyring.gpg ] http://x.invalid/debian bookworm main\n"
    )

    assert find_mirror(sources=sources) == "http://x.invalid/debian"


def test_other_projects_are_passed_over(sources: Path) -> None:
    (sources / "sources.list.d" / "browser.list").write_text("deb http://browser.invalid/deb stable main\n")
    (sources / "sources.list.d" / "debian.sources").write_text(DEB822)
    (sources / "sources.list.d" / "old.sources.disabled").write_text(DEB822.replace("two", "three"))

    assert find_mirror(sources=sources) == "http://two.invalid/debian"


def test_ubuntu_host_is_told_to_name_a_mirror(sources: Path) -> None:
    (sources / "sources.list").write_text(UBUNTU)

    with pytest.raises(
        ImageError, match=r"\(only the suites jammy\): name a Debian mirror with --mirror or KATA_LAB_M"
    ):
        find_mirror(sources=sources)


def test_host_without_sources_is_told_to_name_a_mirror(sources: Path) -> None:
    with pytest.raises(ImageError, match="name no archive at all: name a Debian mirror with --mirror"):
        find_mirror(sources=sources)


def test_explicit_mirror_goes_before_environment_before_sources(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "sources.list.d" / "debian.sources").write_text(DEB822)
    monkeypatch.setenv("KATA_LAB_MIRROR", "http://environment.invalid/debian")

    assert find_mirror(sources=sources) == "http://environment.invalid/debian"
    assert find_mirror("http://explicit.invalid/debian/", sources) == "http://explicit.invalid/debian"


def test_mirror_that_is_no_uri_is_refused(sources: Path) -> None:
    with pytest.raises(ImageError, match="the mirror 'example' is no URI"):
        find_mirror("example", sources)
    with pytest.raises(ImageError, match="is no URI"):
        find_mirror("http://x.invalid/debian\nTrusted: yes", sources)
