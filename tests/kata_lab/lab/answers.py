"""The instructor's answers as the tests use them: ``docs/instructor/answers.md``, one block of Python per exercise.

A block stands behind a heading with the exercise's id, and is what a learner would have written into the notebook's
cell. So whoever changes an exercise without its answer, or an answer without its exercise, is told by a test.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[3] / "docs" / "instructor" / "answers.md"
_BLOCK = re.compile(r"^## (\S+).*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def answers() -> dict[str, str]:
    """Exercise → Python."""
    return dict(_BLOCK.findall(PLACE.read_text("utf-8")))


def answered(exercise: str, runner: asyncio.Runner | None = None, **names: Any) -> dict[str, Any]:
    """What an answer's block makes, given the names that it uses; ``runner`` waits for what it awaits."""
    code = compile(answers()[exercise], f"{PLACE.name}, {exercise}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waiting: Any = eval(code, names)
    if code.co_flags & inspect.CO_COROUTINE:
        assert runner is not None, f"the answer to {exercise} awaits something"
        runner.run(waiting)
    return names
