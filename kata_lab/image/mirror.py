"""Which Debian mirror this machine uses: its APT sources say so, and the project names none.

Reads both forms of sources.list(5): one line per source (``*.list``) and deb822 paragraphs (``*.sources``). Of several
archives the first that is Debian's main one is taken: not the security archive, not another project's packages. Leaves
out the validity of what it finds: APT verifies the archive's signature against Debian's keys, whoever serves it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kata_lab.errors import ImageError
from kata_lab.image.deb import parse_fields

MIRROR_VARIABLE = "KATA_LAB_MIRROR"

_RELEASES = ("buster", "bullseye", "bookworm", "trixie", "forky", "duke")
SUITES = frozenset(("stable", "oldstable", "oldoldstable", "testing", "unstable", "sid", *_RELEASES))
"""Names of Debian's suites."""

_SUITE_EXTENSION = re.compile(r"-(updates|backports|proposed-updates)$")
_URI = re.compile(r"[a-z][a-z0-9+.-]*:\S+", re.IGNORECASE)
_ASK = f"name a Debian mirror with --mirror or {MIRROR_VARIABLE}"


@dataclass(frozen=True)
class Source:
    """One archive of APT's sources. `signed_by` is the keyring or key that its option Signed-By names, or empty."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


def find_mirror(mirror: str | None = None, sources: Path = Path("/etc/apt")) -> str:
    """The URI of the Debian archive to use.

    Args:
        mirror: an explicit choice; else the environment's ``KATA_LAB_MIRROR``; else what APT's sources name.
        sources: APT's configuration directory, with ``sources.list`` and ``sources.list.d``.

    Raises:
        ImageError: the choice is no URI, or APT's sources name no Debian archive.
    """
    chosen = mirror or os.environ.get(MIRROR_VARIABLE)
    if chosen:
        if not _URI.fullmatch(chosen):
            raise ImageError(f"the mirror {chosen!r} is no URI: it looks like http://<host>/debian")
        return chosen.rstrip("/")
    found = list(read_sources(sources))
    main = [source for source in found if _is_main_debian(source)]
    if main:
        return min(main, key=_strangeness).uri.rstrip("/")
    if found:
        names = ", ".join(sorted({source.suite for source in found}))
        raise ImageError(f"APT's sources in {sources} name no Debian archive (only the suites {names}): {_ASK}")
    raise ImageError(f"APT's sources in {sources} name no archive at all: {_ASK}")


def read_sources(directory: Path) -> Iterator[Source]:
    """The binary package archives that APT's sources name, in APT's order: one for each URI and suite."""
    parts = directory / "sources.list.d"
    files = [directory / "sources.list", *(sorted(parts.iterdir()) if parts.is_dir() else [])]
    for file in files:
        try:
            text = file.read_text("utf-8", "replace")
        except OSError:
            continue
        if file.suffix == ".list":
            yield from _one_line_sources(text)
        elif file.suffix == ".sources":
            yield from _deb822_sources(text)


def _one_line_sources(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)]\s+)?([^#]+)", line)
        if match is None:
            continue
        options = dict(word.partition("=")[::2] for word in (match[1] or "").split())
        try:
            uri, suite, *components = shlex.split(match[2])
        except ValueError:
            continue
        yield Source(uri, suite, tuple(components), options.get("signed-by", ""))


def _deb822_sources(text: str) -> Iterator[Source]:
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields = {name.lower(): value for name, value in parse_fields(paragraph).items()}
        if fields.get("enabled", "yes").lower() in ("no", "false", "off", "0", "without", "disable"):
            continue
        if "deb" not in fields.get("types", "").split():
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, tuple(fields.get("components", "").split()), fields.get("signed-by", ""))


def _is_main_debian(source: Source) -> bool:
    return (
        _SUITE_EXTENSION.sub("", source.suite) in SUITES
        and "main" in source.components
        and not source.uri.startswith("cdrom:")
        and "security" not in source.uri
    )


def _strangeness(source: Source) -> int:
    """How little a source looks like Debian's own archive; other projects name their suites after Debian's."""
    if "debian-archive" in source.signed_by:
        return 0
    return 1 if source.uri.rstrip("/").endswith("/debian") else 2
