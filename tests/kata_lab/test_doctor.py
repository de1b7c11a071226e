"""``kata-lab doctor``: verdicts on machines of all kinds, and its own machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kata_lab import doctor
from kata_lab.cli import main

MIB = 1 << 20


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def meminfo(available_mib: int) -> str:
    return f"MemTotal: {16 * MIB} kB\nMemAvailable: {available_mib * 1024} kB\n"


def test_this_machine_can_run_the_lab(capsys: pytest.CaptureFixture[str], boot_guest: object) -> None:
    status = main(["doctor", "--json"])

    told = json.loads(capsys.readouterr().out)
    assert status == 0
    assert told["ready"] is True
    names = [check["name"] for check in told["checks"]]
    assert len(names) == len(set(names))
    assert {"Python", "engine", "compiled CPU", "KVM", "processors", "memory", "cache", "state"} < set(names)
    assert {"boot guest", "APT", "Debian mirror", "Debian keys", "QEMU"} < set(names)
    for check in told["checks"]:
        assert set(check) == {"name", "verdict", "found", "advice"}
        assert check["verdict"] in ("ok", "note", "missing")
        assert check["advice"] or check["verdict"] == "ok"


def test_a_machine_without_apt_cannot_build_a_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")

    status = main(["doctor"])

    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert any(line.startswith("missing") and "no apt-get, no apt-cache, no apt-config" in line for line in lines)
    assert any(line.startswith("note") and "no qemu-system-riscv64" in line for line in lines)
    assert lines[-1] == "this machine cannot run the lab yet"


def test_a_machine_without_apt_that_has_a_built_guest_is_ready_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    machine(tmp_path, {"cache/boot/0123/manifest.json": '{"release": "6.12-riscv64"}'})

    found = {check.name: check for check in doctor.check_guest()}

    assert found["boot guest"].found == "Linux 6.12-riscv64"
    assert found["APT"].verdict == "note"


def test_an_old_python_is_missing() -> None:
    assert doctor.check_python((3, 10, 1)).verdict == "missing"
    assert doctor.check_python((3, 11, 0)).verdict == "ok"


def test_an_environment_without_numba_says_what_to_install() -> None:
    check = doctor.check_engine(lambda name: None if name == "numba" else object())

    assert (check.verdict, check.found) == ("missing", "no numba")
    assert "pip install numba" in check.advice


def test_no_kvm_is_no_obstacle(tmp_path: Path) -> None:
    check = doctor.check_kvm(tmp_path / "kvm")

    assert check.verdict == "note"
    assert "runs its CPU in this process" in check.advice


def test_something_else_in_kvms_place_is_told(tmp_path: Path) -> None:
    place = tmp_path / "kvm"
    place.write_bytes(b"")

    check = doctor.check_kvm(place)

    assert check.verdict == "note"
    assert "does not answer" in check.found


def test_little_memory_is_missing(tmp_path: Path) -> None:
    assert doctor.check_memory(machine(tmp_path, {"proc/meminfo": meminfo(200)})).verdict == "missing"
    assert doctor.check_memory(machine(tmp_path, {"proc/meminfo": meminfo(2000)})).verdict == "ok"


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/user/session\n",
            "sys/fs/cgroup/user/session/memory.max": "max\n",
            "sys/fs/cgroup/user/session/memory.current": f"{50 * MIB}\n",
            "sys/fs/cgroup/user/memory.max": f"{400 * MIB}\n",
            "sys/fs/cgroup/user/memory.current": f"{100 * MIB}\n",
        },
        {
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{400 * MIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{100 * MIB}\n",
        },
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_a_cgroups_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    check = doctor.check_memory(machine(tmp_path, {"proc/meminfo": meminfo(4000), **files}))

    assert check.verdict == "missing"
    assert "a cgroup leaves 300 MiB" in check.found


def test_a_cgroups_share_of_the_processors_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})

    check = doctor.check_processors(root)

    assert check.verdict == "note"
    assert "a cgroup allows 0.5" in check.found


def test_a_home_that_is_no_directory_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(machine(tmp_path, {"home": ""}) / "home"))

    assert {check.verdict for check in doctor.check_places()} == {"missing"}


def test_a_home_that_is_a_relative_path_is_told_in_the_builders_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", "here")

    assert all("it must be an absolute path" in check.advice for check in doctor.check_places())


def test_programs_that_sandboxes_use_are_looked_for_in_system_directories_too() -> None:
    asked: list[str] = []

    def which(name: str, path: str) -> str | None:
        asked.append(path)
        return f"/usr/sbin/{name}" if name == "mke2fs" else None

    found = {each.name: each for each in doctor.check_programs(which)}

    assert found["mke2fs"].verdict == "ok"
    assert (found["passt"].verdict, found["passt"].advice) == (
        "note",
        "networks of guests need it, where there is no tap: install the package passt",
    )
    assert all(each.endswith(":/usr/sbin:/sbin") for each in asked)
