"""Names for containers that were given none: an adjective and a thing of the laboratory."""

from __future__ import annotations

import secrets
from collections.abc import Container
from typing import Final

QUALITIES: Final = (
    *("amber", "brisk", "calm", "clever", "copper", "crisp", "curious", "eager", "fair", "gentle", "golden", "happy"),
    *("jolly", "keen", "kind", "lively", "lucid", "mellow", "merry", "nimble", "patient", "plucky", "polite", "quick"),
    *("quiet", "rapid", "sharp", "silver", "sleek", "smart", "snug", "steady", "sunny", "swift", "tidy", "witty"),
)
THINGS: Final = (
    *("anvil", "balance", "beaker", "bellows", "bobbin", "burner", "caliper", "coil", "compass", "crucible", "dial"),
    *("flask", "funnel", "furnace", "gauge", "kettle", "lantern", "lens", "lever", "magnet", "mortar", "pendulum"),
    *("pestle", "pipette", "prism", "pulley", "quill", "retort", "scale", "sextant", "siphon", "spindle", "tripod"),
)


def made_up_name(taken: Container[str]) -> str:
    """A name that is not in ``taken``; with a number once the names run short."""
    for number in range(1, 1000):
        name = f"{secrets.choice(QUALITIES)}_{secrets.choice(THINGS)}"
        if number > 10:
            name += str(number)
        if name not in taken:
            return name
    return f"container_{secrets.token_hex(6)}"
