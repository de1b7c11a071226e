"""The size of a sandbox, by the limits of its containers."""

from __future__ import annotations

from typing import Any

import pytest

from kata_lab.resource.sizing import SandboxSize, size_for

MIB = 1 << 20


def spec(cpus: float = 0, memory: int = 0) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if cpus:
        resources["cpu"] = {"quota": round(cpus * 100_000), "period": 100_000}
    if memory:
        resources["memory"] = {"limit": memory}
    return {"linux": {"resources": resources}}


@pytest.mark.parametrize(
    ("specs", "size"),
    [
        ([{}], SandboxSize(1, 256)),
        ([spec()], SandboxSize(1, 256)),
        ([spec(0.5)], SandboxSize(1, 256)),
        ([spec(1.5)], SandboxSize(2, 256)),
        ([spec(2, 64 * MIB)], SandboxSize(2, 192)),
        ([spec(memory=64 * MIB + 1)], SandboxSize(1, 193)),
        ([spec(0.1), spec(0.2), spec(0.7)], SandboxSize(1, 512)),
        ([spec(1, 64 * MIB), spec(1.5, 32 * MIB)], SandboxSize(3, 224)),
        ([spec(4096)], SandboxSize(32, 256)),
        ([{"linux": {"resources": {"cpu": {"quota": -1}, "memory": {"limit": -1}}}}], SandboxSize(1, 256)),
    ],
)
def test_size_is_the_sum_of_the_limits_and_what_the_guest_needs(specs: list[dict[str, Any]], size: SandboxSize) -> None:
    assert size_for(specs) == size
