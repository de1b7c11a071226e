"""What containers wrote, kept in files: one line of JSON for each piece as it came.

::

    {"time": 1700000000.123456, "stream": "stdout", "text": "hello\\n"}
    {"time": 1700000000.200000, "stream": "stderr", "base64": "/wAB"}

A piece that is no UTF-8 text is in base64. When the file is full it is renamed to ``output.log.1``, in place of the one
before; so the newest output is kept, between one and two times the size of a file, and a container that writes for ever
does not fill the disk. Only whole lines are written; a reader ignores an unfinished last one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LARGEST: Final = 8 << 20  #: bytes of one file


@dataclass(frozen=True, slots=True)
class Piece:
    """Some output: when (seconds since the epoch), of which stream, and the bytes."""

    time: float
    stream: str
    data: bytes

    def line(self) -> str:
        """As the file has it."""
        try:
            content = {"text": self.data.decode()}
        except UnicodeDecodeError:
            from base64 import b64encode

            content = {"base64": b64encode(self.data).decode()}
        return json.dumps({"time": round(self.time, 6), "stream": self.stream, **content}, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, line: str) -> Piece | None:
        """Of a line; None for what is none."""
        try:
            found = json.loads(line)
            if "base64" in found:
                from base64 import b64decode

                return cls(float(found["time"]), found["stream"], b64decode(found["base64"]))
            return cls(float(found["time"]), found["stream"], found["text"].encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class OutputLog:
    """Writes a log; a context manager. Without a disk to write to output is not logged, and that is all.

    Args:
        path: the file.
        largest: bytes after which a new file is begun.
    """

    def __init__(self, path: Path, largest: int = LARGEST) -> None:
        self._path = path
        self._largest = largest
        self._file = path.open("ab", buffering=0)

    def write(self, piece: Piece) -> None:
        """Append a piece."""
        data = piece.line().encode()
        try:
            if self._file.tell() and self._file.tell() + len(data) > self._largest:
                # The file may have been removed with its container.
                self._path.rename(previous(self._path))
                self._file.close()
                self._file = self._path.open("ab", buffering=0)
            self._file.write(data)
        except OSError:
            return

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def __enter__(self) -> OutputLog:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()


def previous(path: Path) -> Path:
    """The file before ``path``."""
    return path.with_name(f"{path.name}.1")


def read_log(path: Path, tail: int | None = None) -> list[Piece]:
    """What is kept, the oldest first.

    Args:
        path: the file.
        tail: only so many lines of output at the end, as a person counts them; None for all.
    """
    try:
        with LogFollower(path) as follower:
            return follower.begin(tail)
    except FileNotFoundError:
        return []


def _last_lines(pieces: Sequence[Piece], tail: int) -> list[Piece]:
    found: list[Piece] = []
    left = tail
    if left == 0:
        return []
    # The end of the last line is no beginning of another one.
    first = True
    for piece in reversed(pieces):
        end = len(piece.data)
        if first and piece.data.endswith(b"\n"):
            end -= 1
        first = False
        at = end
        while (at := piece.data.rfind(b"\n", 0, at)) >= 0:
            left -= 1
            if not left:
                if piece.data[at + 1 :]:
                    found.append(Piece(piece.time, piece.stream, piece.data[at + 1 :]))
                return found[::-1]
        found.append(piece)
    return found[::-1]


def _pieces(path: Path) -> Iterator[Piece]:
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            if line.endswith(b"\n") and (piece := Piece.parse(line.decode(errors="replace"))) is not None:
                yield piece


class LogFollower:
    """Reads what is added to a log, across its renamings; a context manager.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._rest = b""

    def begin(self, tail: int | None = None) -> list[Piece]:
        """What is there already, the oldest first: all of it, or so many lines at the end."""
        pieces = []
        before = previous(self._path)
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._file.fileno()), before.stat()):
                pieces = list(_pieces(before))
        pieces += self.read()
        return pieces if tail is None else _last_lines(pieces, tail)

    def read(self) -> list[Piece]:
        """What has been added since the last time."""
        found = self._new()
        try:
            renamed = not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return found
        if renamed:
            found += self._new()
            self._file.close()
            self._file = self._path.open("rb")
            self._rest = b""
            found += self._new()
        return found

    def _new(self) -> list[Piece]:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        pieces = (Piece.parse(line.decode(errors="replace")) for line in lines)
        return [piece for piece in pieces if piece is not None]

    def __enter__(self) -> LogFollower:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()
