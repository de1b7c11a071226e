"""The course: its notebooks, which travel inside the package, and their exercises with points and hints.

A learner works on copies of the notebooks, in a directory of their own; what is there already is never overwritten. An
exercise is known by an id that begins with the number of its notebook; the check at the end of its notebook's cells
says that id with :func:`kata_lab.lab.exercise.checks`. A hint says first where to look, then what to do, and never the
answer.
"""

from __future__ import annotations

import difflib
import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError

ENDING: Final = ".ipynb"
_HERE: Final = Path(__file__).parent / "notebooks"


class CourseError(KataLabError):
    """A notebook or an exercise that the course does not have, or a notebook that cannot be copied or run."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise.

    Attributes:
        id: the number of its notebook, and what it is about.
        notebook: the name of the file, without its ending.
        title: in a few words.
        points: for solving it without a hint; each hint takes one of them.
        hints: in the order in which they are given.
    """

    id: str
    notebook: str
    title: str
    points: int
    hints: tuple[str, ...]


EXERCISES: Final = (
    Exercise(
        "00-which-kernel",
        "00-welcome",
        "Which kernel a container runs on",
        3,
        (
            "Look at what the container printed in part 3: the words of `uname -a` are the system, the name of the "
            "machine, the release, and more (uname(1) has them all).",
            "The release is the word behind the machine's name: three numbers with dots between them, and what follows "
            "up to the next space. It goes into quotes.",
        ),
    ),
    Exercise(
        "01-read-a-loop",
        "01-boot-a-machine",
        "How many instructions a loop retires",
        5,
        (
            "Look at what the assembler makes of each line: `disassemble(assemble(COUNTED))` or `lab.draw_instruction` "
            "show it. One line, `li` of a large number, becomes more than one instruction.",
            "Count in three parts: what comes before the outer loop; one round of the outer loop with all of its inner "
            "rounds, as often as it runs; what comes after. A branch that is not taken retires as well.",
        ),
    ),
    Exercise(
        "01-upper-case",
        "01-boot-a-machine",
        "An echo in upper case",
        10,
        (
            "Look at the greeting of part 4 once more: it waits on one bit of the line status register before it "
            "sends. Another bit of the same register, bit 0, says that a byte has come.",
            "Two loops that wait, around one byte: wait until it came, load it, change it only if it lies between 'a' "
            "and 'z' (the two cases of a letter differ by one constant), wait until you may send, store it. Compare "
            "with '\\n' after sending.",
        ),
    ),
    Exercise(
        "02-own-guest",
        "02-build-a-guest",
        "A guest with a service of its own",
        8,
        (
            "Look at the entries of `lifsea_data['packages']` and `lifsea_data['services']`: the service `shell` is "
            "started after another one, the service `log` is restarted whenever it ends.",
            "Take the name out of the list of packages, and add one object to the list of services, with name, "
            "command, after and restart. The command is /bin/sh, -c, and a loop that appends $$ and waits.",
        ),
    ),
    Exercise(
        "02-explain",
        "02-build-a-guest",
        "Why packages leave together",
        5,
        (
            "Look at the table of differences of the two images: it names everything that left.",
            "Take each package that is still asked for, and ask what it needs: `kata-lab image show` lists what an "
            "image has. An image gets what was asked for, and what that depends on.",
        ),
    ),
    Exercise(
        "03-read-a-request",
        "03-inside-a-device",
        "A request read by hand",
        8,
        (
            "Begin at the available ring: its bytes 2 and 3 count the entries, and the last entry is the number of the "
            "first descriptor. A descriptor has 16 bytes: address, length, flags, next; all little-endian.",
            "If the flag INDIRECT is set, the descriptor's address is that of another table: read it with "
            "`captured.memory(address, length)`. The first part of the chain is the header (type, reserved, sector), "
            "the last one the status; add up what lies between.",
        ),
    ),
    Exercise(
        "03-counting",
        "03-inside-a-device",
        "A device of your own",
        10,
        (
            "Look at `notify` of the clock of part 1: which lines take a chain, fill it, give it back, and interrupt? "
            "Yours needs besides a number that the device remembers, which `__init__` sets to 0.",
            "For each chain, make as many bytes as it has room for, beginning with the number that you remember, each "
            "modulo 256; write them over all parts of the chain; remember where the next buffer begins.",
        ),
    ),
    Exercise(
        "04-configuration",
        "04-run-a-container",
        "A container's configuration",
        8,
        (
            "Four places: process.user, root, mounts, and memory in linux.resources. Print each of them as it is now.",
            "A tmpfs is one more entry in mounts, like that of /dev/shm, whose options say who may write to it; a "
            "limit counts bytes; the root has a field that says whether it may be written to.",
        ),
    ),
    Exercise(
        "04-pod",
        "04-run-a-container",
        "Two containers, one directory",
        8,
        (
            "Look at `container_named` of part 5, and at `docker run -v`: a volume is source:where, with a third part "
            "that says what may be done there. Both containers have the same source.",
            "The writer's program is a shell loop that appends and waits less than half a second; the reader's is one "
            "that does not end, such as a long sleep.",
        ),
    ),
    Exercise(
        "05-half-way",
        "05-hotplug",
        "A hotplug that fails half-way",
        10,
        (
            "Look at /sys/devices/system/cpu in the guest: each CPU but the first has a file `online`, which the "
            "device manager writes to. `mount --bind` covers one file with another.",
            "Ask for several CPUs, leave the first new one alone, and cover the file of a later one with a device that "
            "refuses every write; its manual page, full(4), says with which error. Then read attempt.kernel and the "
            "reply in attempt.frames.",
        ),
    ),
    Exercise(
        "06-predict",
        "06-fused-or-rpc",
        "Predict, then measure",
        8,
        (
            "For each action ask two things: how many borders does the call cross (a thread, a process, a second one), "
            "and what is there to do once it has arrived? The borders cost much the same for all of them.",
            "A factor is (way + work) / work of the quick one: next to no work gives a large one, work of many "
            "milliseconds in the guest gives one near 1. Part 3 has numbers for the way.",
        ),
    ),
    Exercise(
        "07-design",
        "07-capstone",
        "A sandbox to a stated goal",
        15,
        (
            "Take one line of the goal at a time, and change one thing for it: the score card marks the lines that are "
            "not met, and the check says where each was in the course.",
            "Begin with the memory. Add up what cook holds at once with some room, and what a shell needs; these are "
            "the limits. Then make the guest as large as the goal allows, with no more room to grow than it asks for.",
            "A guest of your own is lifsea's description under another name, with one service less: which of them is "
            "for somebody at the console? The one called `devices` has to do with growing.",
            "Three fields of the sandbox decide the rest: how many vCPUs it begins with and may have, how the files of "
            "an image get into the guest, and how many processes it is made of.",
        ),
    ),
)


def exercise(id: str) -> Exercise:
    """The exercise of an id.

    Raises:
        CourseError: there is none.
    """
    for each in EXERCISES:
        if each.id == id:
            return each
    known = [each.id for each in EXERCISES]
    near = difflib.get_close_matches(id, known, 1)
    meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    raise CourseError(f"there is no exercise {id!r}: {meant}")


def exercises_of(notebook: str) -> list[Exercise]:
    """The exercises of a notebook, by its name without the ending."""
    return [each for each in EXERCISES if each.notebook == notebook]


def notebooks() -> list[Path]:
    """The notebooks of the course as they come with the package, in their order.

    Raises:
        CourseError: the package was installed without them.
    """
    found = sorted(_HERE.glob(f"[0-9][0-9]-*{ENDING}"))
    if not found:
        raise CourseError(f"the notebooks are not in {_HERE}: install the package kata-lab again")
    return found


def title(notebook: Path) -> str:
    """What the first line of a notebook says.

    Raises:
        CourseError: it is no notebook.
    """
    return "".join(_cells(notebook)[0]["source"]).partition("\n")[0].lstrip("# ")


def _cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        cells = json.loads(notebook.read_bytes())["cells"]
        if not isinstance(cells, list) or not all(isinstance(each.get("source"), (str, list)) for each in cells):
            raise ValueError("its cells have no text")
        if not cells:
            raise ValueError("it has no cells")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CourseError(f"{notebook} cannot be read as a notebook: {error}") from error
    return cells


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of a notebook to be copied: ``new``, ``there already``, or ``kept`` as the learner left it."""

    path: Path
    outcome: str


def copy_notebooks(directory: Path) -> list[Copied]:
    """Put the notebooks into a directory, which is made if need be; a file that is there stays as it is.

    Raises:
        CourseError: the directory cannot be written to.
    """
    originals = notebooks()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_copy(original, directory / original.name) for original in originals]
    except OSError as error:
        raise CourseError(
            f"the notebooks cannot be copied to {directory} ({error.strerror}): name a directory that is yours to "
            "write, on a disk that has room"
        ) from error


def _copy(original: Path, place: Path) -> Copied:
    """A link to a finished copy: it fails if the name is taken, and there is never a half-written notebook."""
    if not os.path.lexists(place):
        with tempfile.TemporaryDirectory(prefix=".kata-lab-", dir=place.parent) as scratch:
            partial = Path(scratch) / place.name
            shutil.copyfile(original, partial)
            partial.chmod(0o644)
            try:
                os.link(partial, place)
            except FileExistsError:
                pass
            else:
                return Copied(place, "new")
    same = place.is_file() and filecmp.cmp(original, place, shallow=False)
    return Copied(place, "there already" if same else "kept")


def find_notebooks(wanted: Sequence[str], directory: Path) -> list[Path]:
    """The learner's notebooks.

    Args:
        wanted: files, names or numbers of notebooks (``05-hotplug``, ``5``), or ids of exercises; none for all.
        directory: where the learner is; the notebooks are there or in ``notebooks`` beneath it.

    Raises:
        CourseError: one is not there.
    """
    names = [each.name for each in notebooks()]
    places = [place for place in (directory, directory / "notebooks") if any((place / name).exists() for name in names)]
    if wanted:
        return [_find(each, places[:1], directory, names) for each in wanted]
    if not places:
        raise CourseError(
            f"there are no notebooks of the course in {directory}: go to where yours are, or have them copied with "
            "kata-lab lab copy DIRECTORY"
        )
    return [places[0] / name for name in names if (places[0] / name).exists()]


def _find(wanted: str, places: Sequence[Path], directory: Path, names: Sequence[str]) -> Path:
    if wanted.endswith(ENDING) and (directory / wanted).is_file():
        return directory / wanted
    wanted = next((each.notebook for each in EXERCISES if each.id == wanted), wanted)
    for name in names:
        number = name.partition("-")[0]
        if wanted in (name, name.removesuffix(ENDING), number, str(int(number))):
            for place in places:
                if (place / name).is_file():
                    return place / name
    known = ", ".join(name.removesuffix(ENDING) for name in names)
    raise CourseError(f"there is no notebook {wanted!r} here: name a file, or one of {known} where yours are")
