"""What a cell says when it cannot do its work: one sentence, and which cell to run before it.

In a notebook the order of the cells is the reader's business, and a kernel that was restarted knows nothing of them. A
name that is not there yet is looked up in the course's own copy of the notebook, so that the sentence says in which
part it is made. Errors that Kata Lab raises on purpose are shown as the sentence that they are; a traceback is for
everything else. Outside of a notebook nothing changes.
"""

from __future__ import annotations

import ast
import dis
import json
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.course import ENDING, CourseError, notebooks
from vmm.errors import VmmError

_ABOVE: Final = "choose Run → Run All Above Selected Cell, and then run this cell again"
_AGAIN: Final = (
    "What this cell checks is not so. If a cell above was changed or left out, choose Kernel → Restart Kernel and Run"
    " up to Selected Cell; else look at the line that is marked."
)


def explain_errors(notebook: str) -> None:
    """From now on, have errors of this kernel's cells explained.

    Args:
        notebook: its name in the course, without the ending.

    Raises:
        CourseError: the course has no such notebook.
    """
    homes = name_homes(notebook)
    shell = _shell()
    if shell is None:
        return

    def explain(shell: Any, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: Any = None) -> None:
        told = sentence(error, homes) if _raised_by_a_cell(trace, shell.user_ns) or _on_purpose(error) else ""
        if told:
            shell._showtraceback(kind, told, [f"{kind.__name__}: {told}"])
            return
        lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
        if isinstance(error, AssertionError) and _raised_by_a_cell(trace, shell.user_ns):
            lines.append(_AGAIN)
        shell._showtraceback(kind, error, lines)

    shell.set_custom_exc((NameError, AssertionError, KataLabError, VmmError), explain)


def sentence(error: BaseException, homes: dict[str, str]) -> str:
    """What to say of an error in a cell, "" for nothing better than a traceback.

    Args:
        error: that was raised.
        homes: name → the part of the notebook that makes it, see :func:`name_homes`.
    """
    if _on_purpose(error):
        return str(error)
    name = getattr(error, "name", None) if isinstance(error, NameError) else None
    if name not in homes:
        return ""
    return f"{name!r} is not there yet: {homes[name]} makes it, and was not run since this kernel started; {_ABOVE}"


def name_homes(notebook: str) -> dict[str, str]:
    """Each name that a cell of a notebook makes, and where the first such cell is.

    Raises:
        CourseError: the course has no such notebook.
    """
    place = next((each for each in notebooks() if each.name == notebook + ENDING), None)
    if place is None:
        raise CourseError(f"the course has no notebook {notebook!r}: give its name without {ENDING}")
    homes: dict[str, str] = {}
    heading = ""
    for number, cell in enumerate(json.loads(place.read_bytes())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            headings = [line.lstrip("# ") for line in source.splitlines() if line.startswith("##")]
            heading = headings[-1] if headings else heading
            continue
        where = f"the part “{heading}”" if heading else f"cell {number + 1} of the notebook"
        for name in _made(source):
            homes.setdefault(name, where)
    return homes


def _made(source: str) -> Iterator[str]:
    """The names that a cell binds."""
    code = compile(source, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_NAME", "STORE_GLOBAL"):
            yield step.argval


def _on_purpose(error: BaseException) -> bool:
    return isinstance(error, (KataLabError, VmmError))


def _raised_by_a_cell(trace: TracebackType | None, names: dict[str, Any]) -> bool:
    """Whether it was raised in a cell, and not in what the cell called."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals is names


def _shell() -> Any:
    """The shell of this notebook's kernel; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None
