"""Check of the exercise of notebook 0: which kernel a container runs on. It shows how checks answer."""

from __future__ import annotations

import platform

from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved


@checks("00-which-kernel")
def check_kernel(answer: str | None, told: str) -> Feedback:
    """Whether somebody read the release of the guest's kernel.

    Args:
        answer: the learner's.
        told: what ``uname -a`` said in the container.
    """
    if answer is None:
        return not_yet("write the release into `answer`, as a text in quotes, run that cell, then this one again.")
    words = told.split()
    wanted = next((word for word in words if word[:1].isdigit() and word.count(".") >= 2), "")
    given = str(answer).strip()
    if given == wanted:
        return solved("the container runs on a kernel of its own, and not on this host's.")
    if given == platform.release():
        return not_right("that is the kernel of this host: look at what the container said, in part 3.")
    if given in words:
        return not_right(f"{given!r} is in that line, but a release begins with a version, three numbers with dots.")
    return not_right(f"{given!r} is no word of what the container said in part 3: take it letter by letter.")
