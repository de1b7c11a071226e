"""The checks of notebook 1: what is unsolved is "not yet", what is wrong is named, what is right passes.

The solutions are the instructor's answers, and nowhere in the notebook.
"""

from __future__ import annotations

import pytest

from kata_lab.lab.first_machine import check_count, check_upper_case
from tests.kata_lab.lab.answers import answered
from vmm.engine.rv64.assembler import assemble

ECHO_TEMPLATE = """
        .equ  UART, 0x10000000
        li    s0, UART
        # your code here

done:   li    a7, 0x53525354
        li    a6, 0
        li    a0, 0
        li    a1, 0
        ecall
"""

ECHO_SOLUTION: str = answered("01-upper-case")["ECHO"]

COUNTED = assemble("""
        li    t0, 100
outer:  li    t1, 3
inner:  addi  t1, t1, -1
        bnez  t1, inner
        addi  t0, t0, -1
        bnez  t0, outer
        li    a7, 0x53525354
        li    a6, 0
        ecall
""")
COUNT: int = answered("01-read-a-loop")["answer"]


def change(old: str, new: str) -> str:
    assert old in ECHO_SOLUTION
    return ECHO_SOLUTION.replace(old, new)


def test_the_unsolved_echo_is_not_yet() -> None:
    assert check_upper_case(ECHO_TEMPLATE).verdict == "not yet"
    assert check_upper_case("# nothing").verdict == "not yet"


def test_the_right_echo_passes_for_any_line() -> None:
    for seed in range(3):
        assert check_upper_case(ECHO_SOLUTION, seed).passed


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (change("addi  a2, a2, -32", "nop"), "'h' stayed as it was"),
        (change("addi  a2, a2, -32", "addi a2, a2, -31"), "'h' became 'I'"),
        (change("bltu  a2, t1, send", "nop"), "',' became '\\x0c', but it is no lower-case letter"),
        (change("li    t1, 'z'", "li t1, '{'"), "'{' became '[', but it is no lower-case letter"),
        (change("beqz  t0, wait", "nop"), "zero bytes were printed"),
        (change("lbu   t0, 5(s0)", "li t0, 1"), "never looked at the line status register"),
        (change("bne   a2, t1, wait", "nop"), "shut down after 1 of 13 bytes"),
        (change("bne   a2, t1, wait", "j wait"), "does not shut down after the end of the line"),
        (change("beqz  t0, wait", "bnez t0, wait"), "zero bytes were printed"),
        (change("beqz  t0, wait", "j wait"), "bytes were never read and the program did not end"),
        (change("0x10000000", "0x20000000"), "load access fault. The instruction there is `lbu t0, 5(s0)`"),
        (change("ecall", "nop"), "the hart ran out of the program"),
        (change("lbu   a2, 0(s0)", "lbu a9, 0(s0)"), "'a9' is no register here"),
        (
            change(
                "send:   sb    a2, 0(s0)\n        li    t1, '\\n'\n        bne   a2, t1, wait",
                "send: li t1, '\\n'\n beq a2, t1, done\n sb a2, 0(s0)\n j wait",
            ),
            "everything came but the end of the line",
        ),
    ],
)
def test_a_wrong_echo_is_told_where_to_look(source: str, hint: str) -> None:
    feedback = check_upper_case(source, seed=1)

    assert feedback.verdict == "not right"
    assert hint in feedback.text


def test_the_unsolved_count_is_not_yet() -> None:
    assert check_count(None, COUNTED).verdict == "not yet"


def test_the_right_count_passes() -> None:
    assert check_count(COUNT, COUNTED).passed


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (COUNT + 1, "fewer than 905"),
        (COUNT - 2, "you are close"),
        (7, "more than 7"),
        ("904", "a whole number is wanted"),
    ],
)
def test_a_wrong_count_is_told_the_direction_and_not_the_number(answer: int, hint: str) -> None:
    feedback = check_count(answer, COUNTED)

    assert feedback.verdict == "not right"
    assert hint in feedback.text
    assert str(answer) == str(COUNT) or str(COUNT) not in feedback.text
