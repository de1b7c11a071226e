"""Files of what containers wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_lab.shim.output_log import LogFollower, OutputLog, Piece, previous, read_log


def written(path: Path, *pieces: bytes, stream: str = "stdout") -> None:
    with OutputLog(path) as log:
        for number, data in enumerate(pieces):
            log.write(Piece(float(number), stream, data))


@given(st.binary(), st.sampled_from(["stdout", "stderr"]))
def test_any_bytes_come_back_as_they_were(data: bytes, stream: str) -> None:
    piece = Piece(1.5, stream, data)

    line = piece.line()

    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert Piece.parse(line) == piece


def test_what_was_written_is_read_in_order(tmp_path: Path) -> None:
    written(tmp_path / "log", b"one\n", b"\xff\xfe", b"two")

    assert [piece.data for piece in read_log(tmp_path / "log")] == [b"one\n", b"\xff\xfe", b"two"]


def test_log_stays_small_and_keeps_the_newest(tmp_path: Path) -> None:
    with OutputLog(tmp_path / "log", largest=4096) as log:
        for number in range(1000):
            log.write(Piece(0.0, "stdout", b"line %d\n" % number))

    sizes = [(tmp_path / "log").stat().st_size, previous(tmp_path / "log").stat().st_size]
    kept = [piece.data for piece in read_log(tmp_path / "log")]
    assert max(sizes) <= 4096
    assert kept == [b"line %d\n" % number for number in range(1000 - len(kept), 1000)]
    assert len(kept) > 50


def test_unfinished_last_line_is_ignored(tmp_path: Path) -> None:
    written(tmp_path / "log", b"one\n")
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"time": 1.0, "stream": "std')

    assert [piece.data for piece in read_log(tmp_path / "log")] == [b"one\n"]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (0, b""),
        (1, b"five"),
        (2, b"four\nfive"),
        (3, b"three\nfour\nfive"),
        (4, b"two\nthree\nfour\nfive"),
        (5, b"one\ntwo\nthree\nfour\nfive"),
        (99, b"one\ntwo\nthree\nfour\nfive"),
    ],
)
def test_tail_counts_lines_whatever_the_pieces_are(tmp_path: Path, tail: int, expected: bytes) -> None:
    written(tmp_path / "log", b"one\ntwo\nth", b"ree\n", b"four", b"\n", b"five")

    assert b"".join(piece.data for piece in read_log(tmp_path / "log", tail)) == expected


@given(st.lists(st.text("ab\n", max_size=6).map(str.encode), max_size=12), st.integers(0, 8))
def test_tail_is_what_splitting_all_lines_gives(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], tail: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    written(path, *(each for each in pieces if each))

    lines = b"".join(pieces).splitlines(keepends=True)

    assert b"".join(piece.data for piece in read_log(path, tail)) == b"".join(lines[max(len(lines) - tail, 0) :])


def test_follower_sees_what_is_added_across_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with OutputLog(path, largest=200) as log, LogFollower(path) as follower:
        seen = []
        for number in range(30):
            log.write(Piece(0.0, "stdout", b"%d\n" % number))
            seen += [piece.data for piece in follower.read()]

    assert seen == [b"%d\n" % number for number in range(30)]
    assert previous(path).exists()


def test_log_whose_directory_was_removed_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "container").mkdir()
    with OutputLog(tmp_path / "container" / "log", largest=100) as log:
        log.write(Piece(0.0, "stdout", b"x" * 90))
        (tmp_path / "container" / "log").unlink()
        log.write(Piece(0.0, "stdout", b"x" * 90))
        log.write(Piece(0.0, "stdout", b"x" * 90))
