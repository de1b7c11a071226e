"""One call followed from the runtime through VMM and guest and back, as each of them noted when it was where.

All processes of a machine have the clock ``time.monotonic`` in common, so that what they noted can be laid side by
side. The notes are :meth:`kata_lab.bench.fused_probe.Probe.follow`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kata_lab.bench.fused_runtime import RuntimeProcess
from kata_lab.bench.measure import BenchError

WAY: Final = ("there", "work", "back")
HANDED_OVER: Final = "has handed over"  #: the step after which the runtime's thread goes on beside the call
_ENDS: Final = ("begins", "has answered", "goes on")


@dataclass(frozen=True, slots=True)
class Step:
    """Where a call was, and when.

    Attributes:
        place: ``runtime``, ``answers`` (the thread on which its answer comes), ``vmm`` or ``guest``.
        what: what happened there.
        microseconds: since the call was made.
    """

    place: str
    what: str
    microseconds: float


def follow_resize(runtime: RuntimeProcess, vcpus: int) -> list[Step]:
    """Have a runtime resize its sandbox to so many vCPUs; the steps in the order of their times."""
    told = sorted(runtime.ask("follow", vcpus=vcpus)["steps"], key=lambda step: float(step[2]))
    return [Step(place, what, (at - told[0][2]) * 1e6) for place, what, at in told]


def spans(steps: Sequence[Step]) -> dict[str, float]:
    """How a call divides, in microseconds: ``there``, until the VMM begins; ``work``, of VMM and guest; ``back``.

    Raises:
        BenchError: these are not the steps of a call.
    """
    at = {step.what: step.microseconds for step in steps}
    missing = [name for name in _ENDS if name not in at]
    if missing:
        raise BenchError(f"the steps of a call have no {missing[0]!r}; they are {', '.join(at)}")
    begins, answered, back = (at[name] for name in _ENDS)
    return dict(zip(WAY, (begins, answered - begins, back - answered), strict=True))
