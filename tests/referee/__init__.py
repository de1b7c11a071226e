"""Independent referees for the rv64 engine: the same programs run on it, on QEMU and on unicorn, register by register.

A :class:`~tests.referee.case.Case` is a state and a block of instructions. :func:`~tests.referee.image.build_image`
lays hundreds of cases and a driver into one bare-metal supervisor-mode image; :mod:`~tests.referee.machines` runs
that image unchanged on `qemu-system-riscv64` and on our engine; :mod:`~tests.referee.verdict` compares what came out,
and reduces a disagreement to the shortest block that still shows it. :mod:`~tests.referee.sequences` invents cases
from a seed.
"""
