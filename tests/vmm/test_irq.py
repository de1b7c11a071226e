"""Interrupt lines."""

from __future__ import annotations

import threading

from vmm.irq import IrqLine


def test_sink_hears_changes_only() -> None:
    heard: list[bool] = []
    line = IrqLine(heard.append, 5)

    for level in (False, True, True, False, False, True):
        line.set(level)

    assert heard == [True, False, True]
    assert line.level
    assert line.number == 5


def test_levels_alternate_when_threads_race() -> None:
    heard: list[bool] = []
    line = IrqLine(heard.append)

    def toggle() -> None:
        for number in range(2000):
            line.set(number % 2 == 0)

    threads = [threading.Thread(target=toggle, name=f"toggle {n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert heard == [number % 2 == 0 for number in range(len(heard))]
    assert line.level == heard[-1]
