"""Notebooks run without anybody who looks at them: top to bottom in a fresh kernel, to hear what their checks say.

A cell that fails does not end the run: the cells behind it are run as well, so that one wrong answer does not hide the
others, and the last one closes what was opened. The notebook's file is read only. Needs nbclient, which comes with
JupyterLab; the kernel is this Python, whatever kernels are installed besides.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.lab.course import CourseError, exercise, exercises_of
from kata_lab.lab.exercise import MIME_TYPE, VERDICTS, Feedback

if TYPE_CHECKING:
    from nbclient import NotebookClient
    from nbformat import NotebookNode

CELL_SECONDS: Final = 600  #: that one cell may take before it is interrupted; a guest may have to be built in it
START_SECONDS: Final = 120  #: that the kernel may take to come up


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that failed: its number from 1, the error's class and what it said."""

    cell: int
    error: str
    said: str

    def __str__(self) -> str:
        first = self.said.strip().partition("\n")[0]
        return f"cell {self.cell} ended with {self.error}" + (f": {first}" if first else "")


@dataclass(frozen=True, slots=True)
class Transcript:
    """What became of one notebook.

    Attributes:
        notebook: the file.
        feedback: of each exercise whose check answered, its last answer.
        unchecked: ids of exercises whose check did not answer.
        failures: cells that failed.
    """

    notebook: Path
    feedback: tuple[Feedback, ...]
    unchecked: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def wrong(self) -> bool:
        """Whether an answer is not right."""
        return any(each.verdict == "not right" for each in self.feedback)

    @property
    def broken(self) -> bool:
        """Whether a cell failed or a check did not answer."""
        return bool(self.failures or self.unchecked)


def run_notebook(notebook: Path, advance: Callable[[float, str], object] = lambda done, what: None) -> Transcript:
    """Run all cells of a notebook and collect what its checks say.

    Args:
        notebook: the file; its directory is the kernel's working directory.
        advance: called with the share that is done, and what is going on.

    Raises:
        CourseError: it is no notebook, nbclient is not installed, or the kernel does not come up or dies.
    """
    content = _opened(notebook)
    with tempfile.TemporaryDirectory(prefix="kata-lab-") as connection:
        _run(_client(content, notebook, Path(connection)), notebook, advance)
    advance(1.0, "done")
    return _transcript(notebook, content)


def _run(client: NotebookClient, notebook: Path, advance: Callable[[float, str], object]) -> None:
    from nbclient.exceptions import DeadKernelError

    content = client.nb
    try:
        with client.setup_kernel(cleanup_kc=True):
            for number, cell in enumerate(content.cells):
                advance(number / len(content.cells), f"cell {number + 1} of {len(content.cells)}")
                client.execute_cell(cell, number)
    except DeadKernelError as error:
        raise CourseError(
            f"the kernel that ran {notebook.name} died: run the notebook in Jupyter to see where"
        ) from error
    except RuntimeError as error:
        raise CourseError(
            f"no kernel came up for {notebook.name} ({error}): try again, or run kata-lab doctor"
        ) from error


def _opened(notebook: Path) -> NotebookNode:
    try:
        import nbformat
    except ImportError as error:
        raise _without_jupyter() from error
    try:
        read: Any = nbformat.read  # without types
        content: NotebookNode = read(notebook, as_version=4)
        nbformat.validate(content)
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        nbformat.ValidationError,
    ) as error:
        first = str(error).partition("\n")[0]
        raise CourseError(f"{notebook} cannot be read as a notebook: {first}") from error
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return content


def _without_jupyter() -> CourseError:
    return CourseError("notebooks are run by nbclient, which is not installed: pip install 'kata-lab[lab]'")


def _client(content: NotebookNode, notebook: Path, connection: Path) -> NotebookClient:
    """A client of a kernel that is reached by unix sockets in a directory."""
    try:
        from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
    except ImportError as error:
        raise _without_jupyter() from error

    class ThisPython(KernelSpecManager):
        """Knows one kernel: the interpreter that runs this."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name=kernel_name, language="python")

    return NotebookClient(
        content,
        km=AsyncKernelManager(
            kernel_spec_manager=ThisPython(), transport="ipc", connection_file=str(connection / "kernel.json")
        ),
        timeout=CELL_SECONDS,
        startup_timeout=START_SECONDS,
        interrupt_on_timeout=True,
        allow_errors=True,
        resources={"metadata": {"path": str(notebook.parent)}},
    )


def _transcript(notebook: Path, content: NotebookNode) -> Transcript:
    feedback: dict[str, Feedback] = {}
    failures: list[Failure] = []
    for number, cell in enumerate(content.cells, 1):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                failures.append(Failure(number, str(output.ename), str(output.evalue)))
            elif (told := _feedback(output.get("data", {}).get(MIME_TYPE))) is not None:
                feedback[told.exercise] = told
    unchecked = tuple(each.id for each in exercises_of(notebook.stem) if each.id not in feedback)
    return Transcript(notebook, tuple(feedback.values()), unchecked, tuple(failures))


def _feedback(data: Any) -> Feedback | None:
    """What a check of the course said, out of a cell's output; None for everything else."""
    if not isinstance(data, dict) or data.get("verdict") not in VERDICTS:
        return None
    try:
        return Feedback(data["verdict"], str(data["text"]), exercise(str(data["exercise"])).id)
    except (KeyError, CourseError):
        return None
