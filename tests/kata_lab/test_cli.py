"""The command line: what it refuses, and what it does without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kata_lab.cli import main
from tests.kata_lab.cli_process import environment, kata_lab

HEAVY = ("numba", "llvmlite", "numpy", "tqdm", "asyncio", "IPython", "matplotlib")


@pytest.mark.parametrize("arguments", ["--help", "boot --help", "bench boot --help", "doctor --json"])
def test_what_needs_no_machine_imports_nothing_heavy(arguments: str) -> None:
    program = (
        "import sys\n"
        "from kata_lab.cli import main\n"
        "try:\n"
        f"    main({arguments.split()!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print(sorted({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())

    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["boot", "--vcpus", "0"], "vcpus is 0, it must be from 1 to 32"),
        (["boot", "--vcpus", "33"], "vcpus is 33"),
        (["boot", "--vcpus", "two"], "'two' is not a whole number"),
        (["boot", "--memory", "0"], "memory_mib is 0"),
        (["boot", "--memory", "much"], "'much' is no amount of memory"),
        (["bench", "compute", "--size", "0"], "loops 0 times as long cannot be run"),
        (["boot", "--memory", "1K"], "'1K' is no amount of memory"),
        (["boot", "--clock", "fast"], "it must be 'real' or 'deterministic'"),
        (["boot", "--clock", "deterministic", "--vcpus", "2"], "the deterministic clock needs vcpus = 1"),
        (["boot", "--timeout", "0"], "it must be more than 0"),
        (["boot", "--timeout", "nan"], "it must be more than 0"),
        (["boot", "--kernel", ""], "--kernel names no file"),
        (["boot", "--kernel", "does-not-exist"], "kernel does-not-exist cannot be read"),
        (["boot", "--run", " "], "--run was given an empty command"),
        (["boot", "--run", "x" * 1000], "the kernel command line would have"),
        (["boot", "--append", "x" * 1000], "cmdline has"),
        (["boot", "--runn", "x"], "unrecognized arguments"),
        (["bench", "boot", "--runs", "0"], "the number must be from 1 to 1000"),
        (["bench"], "the following arguments are required: kind"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_in_one_sentence(arguments: list[str], told: str) -> None:
    done = kata_lab(*arguments)

    message = done.stderr.decode()
    assert done.returncode == 2
    assert told in message
    assert len(message.splitlines()) == 1
    assert done.stdout == b""


def test_a_kernel_of_another_kind_is_refused() -> None:
    done = kata_lab("boot", "--kernel", __file__)

    assert done.returncode == 2
    assert "is neither a RISC-V Image nor an ELF file" in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["boot", "compute"])
def test_a_benchmark_without_its_peer_says_what_to_install(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")

    status = main(["bench", kind])

    assert status == 1
    told = capsys.readouterr().err
    assert "qemu-system-riscv64" in told
    assert "install the package qemu-system-misc" in told
    assert len(told.splitlines()) == 1


def test_a_reader_of_the_doctor_may_leave_early() -> None:
    line = f"{sys.executable} -m kata_lab doctor | true; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), check=False)

    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_a_mirror_that_is_no_uri_is_refused_in_one_sentence(tmp_path: object) -> None:
    done = kata_lab("boot", "--mirror", "nowhere", changes={"KATA_LAB_HOME": str(tmp_path)})

    assert done.returncode == 1
    assert "the mirror 'nowhere' is no URI" in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
