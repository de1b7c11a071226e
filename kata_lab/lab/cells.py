"""What a cell of a notebook opened goes when the cell is run again, so that running it twice leaves nothing behind.

A front end says with each request which cell it is (Jupyter messaging 5.5, ``execute_request``, metadata ``cellId``:
JupyterLab, Notebook 7 and VS Code do); without that nothing is closed here, and its owner closes it.
"""

from __future__ import annotations

from typing import Any

from kata_lab.lab.machines import Closable

_opened: dict[str, list[Closable]] = {}
_listening: list[Any] = []  # the shells that tell us


def close_with_cell(opened: Closable) -> None:
    """Close ``opened`` when the cell that runs now is run again."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    cell = _cell_of(shell)
    if cell is None:
        return
    if shell not in _listening:
        shell.events.register("pre_run_cell", _run_again)
        _listening.append(shell)
    _opened.setdefault(cell, []).append(opened)


def _cell_of(shell: Any) -> str | None:
    kernel: Any = getattr(shell, "kernel", None)
    if not hasattr(kernel, "get_parent"):
        return None
    found = (kernel.get_parent("shell") or {}).get("metadata", {}).get("cellId")
    return str(found) if found else None


def _run_again(info: Any) -> None:
    for opened in reversed(_opened.pop(str(info.cell_id), [])):
        opened.close()
