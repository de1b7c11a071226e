"""The trace: counts add up over vCPUs, milestones are reached once and in order."""

from __future__ import annotations

import time

import pytest

from vmm import ConfigError, Trace
from vmm.trace import FIRST_CONSOLE_BYTE, FIRST_INSTRUCTION


def test_exits_of_all_vcpus_add_up_by_kind_and_name() -> None:
    trace = Trace(enabled=True)
    first, second = trace.recorder(), trace.recorder()

    for recorder in (first, second, second):
        recorder.record("sbi call", "time.set_timer", time.monotonic_ns())
    first.record("mmio write", "uart", time.monotonic_ns())

    assert {(each.kind, each.name): each.count for each in trace.exits} == {
        ("sbi call", "time.set_timer"): 3,
        ("mmio write", "uart"): 1,
    }
    assert all(each.seconds >= 0 for each in trace.exits)


def test_activity_holds_every_exit_in_order_of_time() -> None:
    trace = Trace(enabled=True)
    recorder = trace.recorder()

    for _ in range(5):
        recorder.record("halted", "", time.monotonic_ns())

    assert sum(each.count for each in trace.activity) == 5
    assert list(trace.activity) == sorted(trace.activity, key=lambda each: each.seconds)


def test_console_output_reaches_milestones_once() -> None:
    trace = Trace(milestones={"shell": r"^/ # "})
    trace.start(lambda: 1000)

    for byte in b"Linux version 6.12\n/ # \n/ # \nLinux version again\n":
        trace.console_output(bytes([byte]))

    assert [each.name for each in trace.milestones] == [
        FIRST_INSTRUCTION,
        FIRST_CONSOLE_BYTE,
        "kernel banner",
        "shell",
    ]
    assert {each.instructions for each in trace.milestones} == {1000}
    seconds = [each.seconds for each in trace.milestones]
    assert seconds == sorted(seconds)


def test_a_line_that_is_not_complete_reaches_nothing() -> None:
    trace = Trace()
    trace.console_output(b"Linux version 6")

    assert [each.name for each in trace.milestones] == [FIRST_CONSOLE_BYTE]


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="milestone 'bad' has pattern '\\('"):
        Trace(milestones={"bad": "("})
