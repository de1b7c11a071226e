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
    assert {"boot guest", "APT", "Debian mirror", "Debian keys", "guests", "network", "user", "QEMU"} < set(names)
    assert told["summary"].startswith("this machine can run the lab")
    for check in told["checks"]:
        assert set(check) == {"name", "verdict", "found", "advice", "lack"}
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
    assert lines[-1] == "this machine cannot run the lab yet: see what is said of APT"


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
            "sys/fs/cgroup/user/memory.current": f"{350 * MIB}\n",
            "sys/fs/cgroup/user/memory.stat": f"anon {90 * MIB}\ninactive_file {250 * MIB}\nactive_file 4096\n",
        },
        {
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{400 * MIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{350 * MIB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 0\ntotal_inactive_file {250 * MIB}\n",
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


IPV4_TABLE = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
ZEROS = "0" * 32


def ipv6_route(destination: str, prefix: str, flags: str) -> str:
    return f"{destination} {prefix} {ZEROS} 00 {ZEROS} 00000400 00000001 00000000 {flags} eth0\n"


@pytest.mark.parametrize(
    ("files", "verdict"),
    [
        ({}, "note"),
        ({"proc/net/route": IPV4_TABLE}, "note"),
        ({"proc/net/route": f"{IPV4_TABLE}eth0 0000A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n"}, "note"),
        ({"proc/net/route": f"{IPV4_TABLE}eth0 00000000 0100A8C0 0003 0 0 0 00000000 0 0 0\n"}, "ok"),
        ({"proc/net/ipv6_route": ipv6_route("fd" + "0" * 30, "40", "00000001")}, "note"),
        ({"proc/net/ipv6_route": ipv6_route(ZEROS, "00", "00200200")}, "note"),
        ({"proc/net/ipv6_route": ipv6_route(ZEROS, "00", "00000003")}, "ok"),
    ],
)
def test_a_route_that_leads_out_is_a_network(tmp_path: Path, files: dict[str, str], verdict: str) -> None:
    found = doctor.check_network(machine(tmp_path, files))

    assert (found.verdict, found.lack) == (verdict, "" if verdict == "ok" else "no network")


def test_nothing_but_the_user_changes_without_root() -> None:
    assert (doctor.check_user(0).verdict, doctor.check_user(0).lack) == ("ok", "")
    assert (doctor.check_user(1000).verdict, doctor.check_user(1000).lack) == ("ok", "no root")


def test_memory_for_one_notebook_is_enough(tmp_path: Path) -> None:
    found = doctor.check_memory(machine(tmp_path, {"proc/meminfo": meminfo(1000)}))

    assert (found.verdict, found.lack) == ("note", "1,000 MiB of memory")
    assert "one notebook at a time" in found.advice


def test_guests_that_are_not_built_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path))

    found = doctor.check_course()

    assert (found.verdict, found.found) == ("note", "not built yet: lifsea, toolbox")
    assert "kata-lab lab prepare" in found.advice


def test_one_sentence_says_what_is_missing_and_what_works(tmp_path: Path) -> None:
    little = [
        doctor.check_kvm(tmp_path / "kvm"),
        doctor.check_user(1000),
        doctor.check_network(tmp_path),
        doctor.check_memory(machine(tmp_path, {"proc/meminfo": meminfo(1400)})),
    ]
    unbuilt = doctor.Check("guests", "note", "not built yet: lifsea", "build it")

    assert doctor.sentence([]) == doctor.sentence([unbuilt]) == "this machine can run the lab"
    assert doctor.sentence(little[:1]) == (
        "this machine can run the lab, with no KVM: guests run on a CPU that is compiled into this process"
    )
    assert doctor.sentence(little) == (
        "this machine can run the lab, with no KVM, no root, no network and 1,400 MiB of memory: guests run on a CPU "
        "that is compiled into this process; the guests that are built run, and others, such as those of "
        "02-build-a-guest, cannot be built; notebooks run one at a time, so shut a kernel down before you open the "
        "next one"
    )
    assert "have to come from a bundle" in doctor.sentence([*little, unbuilt])


def test_what_is_missing_is_named_in_the_sentence(tmp_path: Path) -> None:
    missing = [
        doctor.check_python((3, 10, 1)),
        doctor.check_memory(machine(tmp_path, {"proc/meminfo": meminfo(100)})),
        doctor.check_user(1000),
    ]

    assert doctor.sentence(missing) == "this machine cannot run the lab yet: see what is said of Python and memory"
