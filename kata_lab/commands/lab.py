"""``kata-lab lab``: the course on this machine: its notebooks, its exercises, and how far its learner came.

Exit status of ``check``: 0 when no answer is wrong (solved, or nothing tried yet), 3 when an answer is not right, 1
when something else kept a notebook from being checked, such as a cell that failed. Of the others: 2 for a command line
that cannot work, 1 for everything else that fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kata_lab.commands import UsageError
from kata_lab.errors import KataLabError

if TYPE_CHECKING:
    from kata_lab.lab.headless import Transcript

NOT_RIGHT = 3
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser]) -> None:
    """What the command line accepts after ``kata-lab lab``."""
    actions = parser.add_subparsers(title="actions", dest="action", required=True, parser_class=parser_class)

    listing = actions.add_parser("list", help="the notebooks, the exercises and your score", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="print plain data")

    copy = actions.add_parser("copy", help="copy the notebooks to a directory of yours", allow_abbrev=False)
    copy.add_argument("directory", help="where to; what is there stays as it is")

    check = actions.add_parser(
        "check",
        help="run your notebooks and say what is solved",
        description="Run your notebooks top to bottom, each in a fresh kernel, and say what its checks say.",
        epilog="Exit status: 0 no answer is wrong, 3 an answer is not right, 1 something could not be checked.",
        allow_abbrev=False,
    )
    check.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="a file, a name, a number or an exercise (default all)"
    )
    check.add_argument("--json", action="store_true", help="print plain data")

    hint = actions.add_parser("hint", help="the next hint to an exercise; each takes a point", allow_abbrev=False)
    hint.add_argument("exercise", help="its id, as list says it")

    export = actions.add_parser("export", help="write your results for an instructor", allow_abbrev=False)
    export.add_argument("file", nargs="?", default="-", metavar="FILE", help="ends with .json or .csv (default: print)")
    export.add_argument("--name", default="", metavar="NAME", help="yours, if you want to give it")

    prepare = actions.add_parser(
        "prepare",
        help="build now what the notebooks need, so that none waits for it",
        description="Build the guests and compile the CPU that the notebooks need; afterwards they need no network.",
        allow_abbrev=False,
    )
    prepare.add_argument("--all", action="store_true", help="the large guest of 02-build-a-guest too (240 MB)")

    bundle = actions.add_parser(
        "bundle",
        help="make one file that sets up a machine like this one without a network",
        description=(
            "Make one file with Kata Lab, JupyterLab, the Python packages that they need, the guests and the "
            "notebooks. On a machine of the same kind, python3 FILE [DIRECTORY] installs it, with nothing else there."
        ),
        allow_abbrev=False,
    )
    bundle.add_argument("file", metavar="FILE", help="where to, such as kata-lab-course.pyz")
    install = actions.add_parser("install", help="set up a directory from a bundle", allow_abbrev=False)
    install.add_argument("bundle", metavar="BUNDLE")
    install.add_argument("directory", nargs="?", default=None, metavar="DIRECTORY", help="default: kata-lab-course")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out one action; its exit status.

    Raises:
        KataLabError: it cannot be done.
    """
    match options.action:
        case "list":
            return _list(options.json)
        case "copy":
            return _copy(Path(options.directory))
        case "check":
            return _check(options.notebooks, options.json)
        case "hint":
            return _hint(options.exercise)
        case "prepare":
            return _prepare(options.all)
        case "bundle":
            return _bundle(Path(options.file))
        case "install":
            return _install(Path(options.bundle), options.directory)
        case _:
            return _export(options.file, options.name)


def _list(plain: bool) -> int:
    from kata_lab.lab import course, score

    now = score.Score()
    if plain:
        print(score.exported(), end="")
        return 0
    for notebook in course.notebooks():
        print(f"{notebook.name}  {course.title(notebook)}")
        for each in course.exercises_of(notebook.stem):
            standing = now.standings[each.id]
            earned = f"{standing.earned:2} of {each.points:2} points"
            tried = f"{standing.best}, {_count(standing.attempts, 'attempt')}, {_count(standing.hints, 'hint')}"
            print(f"    {each.id:20} {earned}  {each.title} ({tried})")
    print(now.summary)
    return 0


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _copy(directory: Path) -> int:
    from kata_lab.lab.course import copy_notebooks

    copied = copy_notebooks(directory)
    for each in copied:
        what = "kept as you left it" if each.outcome == "kept" else each.outcome
        print(f"{each.path}: {what}")
    return 0


def _check(wanted: list[str], plain: bool) -> int:
    from kata_lab.lab.course import CourseError, find_notebooks
    from kata_lab.lab.headless import run_notebook
    from kata_lab.progress import Progress

    try:
        notebooks = find_notebooks(wanted, Path.cwd())
    except CourseError as error:
        raise UsageError(str(error)) from error
    transcripts: list[Transcript] = []
    for notebook in notebooks:
        with Progress(f"Running {notebook.name}", total=1) as bar:
            transcripts.append(run_notebook(notebook, bar.advance_to))
        if not plain:
            _tell(transcripts[-1])
    if plain:
        print(json.dumps([_plain(each) for each in transcripts], indent=1, ensure_ascii=False))
    else:
        _sum_up(transcripts)
    if any(each.wrong for each in transcripts):
        return NOT_RIGHT
    return FAILED if any(each.broken for each in transcripts) else 0


def _tell(transcript: Transcript) -> None:
    print(transcript.notebook.name)
    for each in transcript.feedback:
        sign, _, said = repr(each).partition(" ")
        print(f"  {sign} {each.exercise:20} {said}")
    for id in transcript.unchecked:
        print(f"  ! {id:20} could not be checked")
    for failure in transcript.failures:
        print(f"  ! {failure}")
    sys.stdout.flush()


def _sum_up(transcripts: list[Transcript]) -> None:
    verdicts = [each.verdict for transcript in transcripts for each in transcript.feedback]
    told = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("solved", "not yet", "not right")]
    unchecked = sum(len(each.unchecked) for each in transcripts)
    if unchecked:
        told.append(f"{unchecked} not checked")
    print(", ".join(told))


def _plain(transcript: Transcript) -> dict[str, object]:
    return {
        "notebook": transcript.notebook.name,
        "checks": [
            {"exercise": each.exercise, "verdict": each.verdict, "text": each.text} for each in transcript.feedback
        ],
        "unchecked": list(transcript.unchecked),
        "failures": [str(each) for each in transcript.failures],
    }


def _hint(id: str) -> int:
    from kata_lab.lab.course import CourseError, exercise
    from kata_lab.lab.score import hint

    try:
        exercise(id)
    except CourseError as error:
        raise UsageError(str(error)) from error
    print(hint(id))
    return 0


def _export(file: str, name: str) -> int:
    from kata_lab.lab.score import exported

    if file == "-":
        print(exported(name), end="")
        return 0
    place = Path(file)
    form = place.suffix[1:].lower()
    if form not in ("json", "csv"):
        raise UsageError(f"{file!r} is neither .json nor .csv: the name says how the results are written")
    partial = place.with_name(f".{place.name}.partial")
    try:
        partial.write_text(exported(name, form), encoding="utf-8", newline="")
        partial.replace(place)
    except OSError as error:
        raise KataLabError(f"{place} cannot be written ({error.strerror}): name another file") from error
    finally:
        partial.unlink(missing_ok=True)
    return 0


def _prepare(everything: bool) -> int:
    from kata_lab.lab.bundle_content import IF_BUILT, IMAGES, prepare

    prepare((*IMAGES, *IF_BUILT) if everything else IMAGES)
    return 0


def _bundle(place: Path) -> int:
    from kata_lab.lab.bundle import make_bundle

    make_bundle(place)
    print(f"{place}: {place.stat().st_size / 1e6:.0f} MB; elsewhere, python3 {place.name} installs it")
    return 0


def _install(bundle: Path, directory: str | None) -> int:
    from kata_lab.lab.bundle import install_bundle
    from kata_lab.lab.installer import DIRECTORY, what_next

    place = Path(directory or DIRECTORY)
    install_bundle(bundle, place)
    print(what_next(place))
    return 0
