"""Checks of the exercises of notebook 1, "Boot a machine".

Programs are run on a bare machine (:mod:`kata_lab.lab.bare`), with somebody who types slowly, so that a program that
does not wait for data shows it.
"""

from __future__ import annotations

import random
import string
from typing import Final

from kata_lab.lab.bare import Outcome, run_bare
from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved

_BUDGET: Final = 400_000
_BORDERS: Final = "@[`{ azAZ"


@checks("01-read-a-loop")
def check_count(answer: int | None, program: bytes, budget: int = 1_000_000) -> Feedback:
    """Whether ``answer`` is the number of instructions that ``program`` retires before it makes its SBI call."""
    if answer is None:
        return not_yet("put your number into `answer` in the cell above, run that cell, then this one again.")
    if isinstance(answer, bool) or not isinstance(answer, int):
        return not_right(f"`answer` is {answer!r}; a whole number is wanted.")
    outcome = run_bare(program, budget=budget)
    if answer == outcome.instructions:
        return solved(f"the hart retired {answer:,} instructions: you can read a loop.")
    direction = "more" if answer < outcome.instructions else "fewer"
    hint = "which instructions run once, which in every round, and how many rounds are there?"
    if abs(answer - outcome.instructions) <= 3:
        hint = "you are close: look at the last round, and at how many instructions `li` really is (see the listing)."
    return not_right(f"the hart retired {direction} than {answer:,} instructions: {hint}")


@checks("01-upper-case")
def check_upper_case(source: str, seed: int | None = None) -> Feedback:
    """Whether an assembly program echoes a typed line in upper case through the UART, and then shuts down.

    Args:
        source: the learner's program.
        seed: makes the typed text the same every time.
    """
    from vmm.engine.rv64.assembler import AssemblyError, assemble
    from vmm.errors import VmmError

    try:
        program = assemble(source)
    except AssemblyError as error:
        return not_right(f"the program cannot be assembled. {error}")
    if not program:
        return not_yet("the program is empty: write instructions between the quotes, then run both cells again.")
    chosen = random.Random(seed)
    long = "".join(chosen.choices(string.ascii_letters + string.digits + string.punctuation + " ", k=40))
    for line in ("hello, world", _BORDERS, long, ""):
        typed = f"{line}\n".encode("ascii")
        try:
            outcome = run_bare(program, typed, _BUDGET)
        except VmmError as error:
            return not_right(f"the program cannot be run. {error}")
        if (problem := _problem(outcome, program, typed)) is not None:
            return problem
    return solved("every line came back in upper case, and the machine shut down.")


def _problem(outcome: Outcome, program: bytes, typed: bytes) -> Feedback | None:
    wanted, printed = typed.upper(), outcome.printed
    shown = f"For the typed line {typed.decode()!r} "
    if printed == wanted and outcome.ended == "shut down":
        return None
    if outcome.ended == "trapped":
        return not_right(
            f"{shown}the hart trapped at {outcome.trapped_at:#x}: {outcome.trap}. "
            f"The instruction there is `{_instruction(program, outcome.trapped_at)}`."
        )
    if outcome.status_reads == 0:
        if outcome.ended == "shut down" and not printed:
            return not_yet("the program shuts down at once: put your code where the comment says so.")
        return not_right(
            f"{shown}the program printed {_quoted(printed)} and never looked at the line status register (UART + 5): "
            "how does it know that a byte has arrived?"
        )
    if b"\0" in printed and len(printed) != len(wanted):
        return not_right(
            f"{shown}zero bytes were printed: the receive register was read while it was empty. "
            "Which bit of the line status register says that there is data?"
        )
    if printed == wanted:
        return not_right(
            f"{shown}the text is right, but the program does not shut down after the end of the line "
            f"(it ended as: {outcome.ended}). What does your program compare with '\\n', and where does it go then?"
        )
    return _wrong_text(outcome, typed, shown)


def _wrong_text(outcome: Outcome, typed: bytes, shown: str) -> Feedback:
    wanted, printed = typed.upper(), outcome.printed
    if len(printed) == len(wanted):
        at = next(number for number, pair in enumerate(zip(wanted, printed, strict=True)) if pair[0] != pair[1])
        was, became = chr(typed[at]), chr(printed[at])
        if became == was:
            return not_right(f"{shown}{was!r} stayed as it was: how far apart are 'a' and 'A' in ASCII?")
        if not was.islower():
            return not_right(
                f"{shown}{was!r} became {became!r}, but it is no lower-case letter: check both ends of the range."
            )
        return not_right(f"{shown}{was!r} became {became!r}: how far apart are 'a' and 'A' in ASCII?")
    if wanted == printed + b"\n":
        return not_right(f"{shown}everything came but the end of the line: it is to be printed too, before the end.")
    if wanted.startswith(printed) and outcome.ended == "shut down":
        return not_right(
            f"{shown}the program shut down after {len(printed)} of {len(wanted)} bytes: "
            "what sends it back to wait for more?"
        )
    if outcome.unread and outcome.ended == "budget":
        return not_right(
            f"{shown}{outcome.unread} bytes were never read and the program did not end: it goes in circles. "
            "Which branch should leave the loop once data is there?"
        )
    return not_right(f"{shown}the program printed {_quoted(printed)}; {_quoted(wanted)} was expected.")


def _instruction(program: bytes, address: int) -> str:
    from vmm.engine.rv64.disassembler import disassemble

    offset = address - 0x8000_0000
    word = int.from_bytes(program[offset : offset + 4], "little") if 0 <= offset < len(program) else 0
    return disassemble(word, address) if word else "nothing: the hart ran out of the program"


def _quoted(data: bytes) -> str:
    text = data.decode("ascii", "replace")
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "…"
