"""How long the referees search: the same examples on every run, unless the environment asks for more or others.

`KATA_LAB_REFEREE_EXAMPLES=20` runs 20 times as many, `KATA_LAB_REFEREE_SEED=7` runs other ones.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

SCALE = int(os.environ.get("KATA_LAB_REFEREE_EXAMPLES", "1"))
SEED = int(os.environ.get("KATA_LAB_REFEREE_SEED", "0"))
#: The most cases in one run of a machine.
BATCH = 4000


def examples(count: int) -> settings:
    """Fixed examples, no time limit; a disagreement is reduced by `tests.referee.verdict`, not by hypothesis."""
    return settings(
        max_examples=count * SCALE,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
