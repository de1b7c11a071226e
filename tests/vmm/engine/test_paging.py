"""Sv39 and Sv48 on our hart against QEMU: permissions, superpages, A and D bits, faults, changes while in use."""

from __future__ import annotations

import pytest

from tests.referee.effort import SCALE, SEED
from tests.referee.machines import run_on_engine, run_on_qemu
from tests.referee.page_cases import page_cases
from tests.referee.verdict import disagreements


@pytest.mark.parametrize("batch", range(8))
def test_address_spaces_behave_and_look_afterwards_as_on_qemu(batch: int) -> None:
    for seed in range(batch * SCALE, (batch + 1) * SCALE):
        reports = disagreements(page_cases(SEED + seed, 800), run_on_engine, run_on_qemu)

        assert not reports, "\n\n".join(reports)
