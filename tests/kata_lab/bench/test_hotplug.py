"""``kata-lab bench hotplug``: the shape of what it prints, and that it leaves nothing. No timing is judged."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kata_lab.bench.command import hotplug_table
from kata_lab.bench.hotplug import NAMES, figures
from kata_lab.cli import main


@pytest.fixture
def own_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; the path is short, since sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="kl-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def run(milliseconds: float) -> dict[str, float]:
    return dict.fromkeys(NAMES, milliseconds)


def test_it_prints_both_sides_and_leaves_nothing(own_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "hotplug", "--json", "--runs", "1"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"ours", "qemu", "ratio", "limits", "runs", "versions"}
    assert tuple(told["ours"]) == tuple(told["qemu"]) == tuple(told["ratio"]) == NAMES
    for side in ("ours", "qemu"):
        assert all(0 < times["median"] <= times["worst"] for times in told[side].values())
    assert {"qemu", "guest kernel", "qemu guest kernel", "host"} <= set(told["versions"])
    started = [each.name() for each in psutil.Process().children(recursive=True)]
    assert [name for name in started if name.startswith(("qemu", "virtiofsd"))] == []
    assert list(own_place.iterdir()) == []


def test_median_worst_and_ratio_are_those_of_all_runs() -> None:
    told = figures([run(10), run(30), run(20)], [run(100), run(200), run(600)], ["", "", ""], {})

    assert (told.ours["disk_ms"].median, told.ours["disk_ms"].worst) == (20, 30)
    assert (told.qemu["disk_ms"].median, told.qemu["disk_ms"].worst) == (200, 600)
    assert told.ratio["disk_ms"] == 10
    assert told.runs == 3


def test_a_vcpu_that_comes_too_late_is_explained_by_the_slowest_run() -> None:
    late = figures([run(60), run(90)], [run(900), run(900)], ["the one", "the other"], {})
    no_sooner = figures([run(40)], [run(80)], ["the only one"], {})
    well = figures([run(40)], [run(400)], [""], {})

    assert late.limits["vcpu_plus_1_ms"] == "the slowest went to: the other"
    assert "the only one" in no_sooner.limits["vcpu_plus_1_ms"]
    assert "vcpu_plus_1_ms" not in well.limits


def test_a_table_tells_medians_worst_and_what_is_not_alike() -> None:
    told = hotplug_table(figures([run(10), run(30)], [run(100), run(300)], ["", ""], {"qemu": "7.2"}))

    assert re.search(r"^one vCPU more, ms +20 +30 +200 +300 +10\.0$", told, re.MULTILINE)
    assert "memory, 64 MiB more, ms: QEMU's guest takes memory in blocks of 128 MiB" in told
    assert told.endswith("medians of 2 runs in turns; qemu 7.2")
