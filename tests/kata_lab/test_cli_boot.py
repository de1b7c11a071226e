"""``kata-lab boot`` as a process: exit status, typing, the terminal, and being stopped."""

from __future__ import annotations

import base64
import hashlib
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.image.boot import USERLAND_MARKER, BootGuest
from tests.kata_lab.cli_process import COMMAND, SECONDS, Started, environment, kata_lab

pytestmark = pytest.mark.usefixtures("boot_guest")

PROMPT = "kata-lab:~# "


def test_the_exit_status_is_that_of_the_guests_command() -> None:
    done = kata_lab("boot", "--run", "uname -m; exit 7")

    assert done.returncode == 7
    assert b"riscv64\r\n" in done.stdout
    assert done.stderr == b""


def test_what_is_piped_in_is_typed_and_its_end_ends_the_shell() -> None:
    done = kata_lab("boot", typed=b"echo $((6 * 7))\necho end of inp''ut")

    assert done.returncode == 0
    assert b"\n42\r\n" in done.stdout
    assert b"\nend of input\r\n" in done.stdout


def test_end_of_input_reaches_a_program_and_then_the_shell() -> None:
    done = kata_lab("boot", typed=b"cat | wc -c\n12345\n")

    assert done.returncode == 0
    assert b"\n6\r\n" in done.stdout


def test_nothing_of_a_large_paste_is_lost() -> None:
    data = random.Random(1).randbytes(75_000)
    paste = base64.encodebytes(data)
    assert len(paste) > 100_000

    done = kata_lab("boot", "--run", "stty -echo; base64 -d | sha256sum", typed=paste)

    assert hashlib.sha256(data).hexdigest().encode() in done.stdout


def test_a_panic_has_a_status_of_its_own_and_a_report() -> None:
    done = kata_lab("boot", "--append", "rdinit=/nothing root=/dev/nothing")

    report = done.stderr.decode()
    assert done.returncode == 123
    assert "kernel panic: VFS: Unable to mount root fs" in report
    assert re.search(r"hart 0: started, S-mode, pc 0x", report)
    assert "Traceback" not in report


def test_a_guest_that_takes_too_long_is_reported_and_ended() -> None:
    # However slow the machine is, the guest is up in one of these times, and goes on for ever.
    for seconds in (3, 12, 60):
        done = kata_lab("boot", "--timeout", str(seconds), "--run", "while :; do :; done")
        report = done.stderr.decode()
        assert done.returncode == 124
        assert f"the guest had not ended after {seconds} s" in report
        if USERLAND_MARKER in report:
            break
    assert USERLAND_MARKER in report
    assert "=> " in report


def test_the_trace_is_a_timeline_a_table_of_exits_and_the_last_of_them() -> None:
    done = kata_lab("boot", "--trace", "--clock", "deterministic", "--run", "true")

    told = done.stderr.decode()
    timeline, exits, last = told.split("\n\n")
    assert [line.split("  ")[0] for line in timeline.splitlines()] == [
        "timeline",
        "first instruction",
        "first console byte",
        "userland",
        "power off",
    ]
    assert re.search(r"^mmio write uart +[\d,]+ +[\d.]+ +[\d.]+$", exits, re.MULTILINE)
    assert re.search(r"^[0-9a-f]{16} +[\d.]+  ecall +sbi call srst.system_reset$", last.splitlines()[-1])


def test_several_harts_come_online() -> None:
    done = kata_lab("boot", "--vcpus", "2", "--memory", "128M", "--run", "nproc; grep MemTotal /proc/meminfo")

    assert b"\n2\r\n" in done.stdout
    memory = re.search(rb"MemTotal: +(\d+) kB", done.stdout)
    assert memory is not None
    assert 32 * 1024 < int(memory[1]) < 128 * 1024


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_leaves_nothing(number: int, status: int, tmp_path: Path, boot_guest: BootGuest) -> None:
    changes = {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    with Started(["boot"], changes) as running:
        running.wait_for(PROMPT)
        running.signal(number)

        assert running.status() == status
        assert running.errors() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_cpu_is_compiled_ends_it_and_leaves_nothing_half_done(
    tmp_path: Path, boot_guest: BootGuest
) -> None:
    built = boot_guest.kernel.parent
    shutil.copytree(built, tmp_path / "cache/boot" / built.name)
    code = tmp_path / "cache/code"
    with Started(["boot"], {"KATA_LAB_HOME": str(tmp_path)}) as running:
        deadline = time.monotonic() + SECONDS
        while not code.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1.0)
        running.signal(signal.SIGTERM)

        assert running.status() == 143
        assert running.errors() == ""
    assert [file.name for file in code.iterdir()] == ["build.lock"]


def test_a_reader_that_goes_away_ends_it() -> None:
    with Started(["boot"]) as running:
        running.wait_for(PROMPT)
        running.stop_reading()
        running.type(b"seq 100000\n")

        assert running.status() == 128 + signal.SIGPIPE
        assert running.errors() == ""


class Window:
    """A terminal with ``kata-lab boot`` in it."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (33, 77))
        self.mode = termios.tcgetattr(self.theirs)
        self._seen = b""
        self._process = subprocess.Popen(
            [*COMMAND, "boot"], stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, env=environment()
        )

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + SECONDS
        while text.encode() not in self._seen:
            ready, _, _ = select.select([self.ours], [], [], max(deadline - time.monotonic(), 0))
            assert ready, self._seen.decode(errors="replace")
            self._seen += os.read(self.ours, 4096)
        before, _, self._seen = self._seen.partition(text.encode())
        return before.decode(errors="replace")

    def type(self, data: bytes) -> None:
        os.write(self.ours, data)

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.theirs)[3] & (termios.ICANON | termios.ISIG)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def status(self) -> int:
        return self._process.wait(SECONDS)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def window() -> Iterator[Window]:
    opened = Window()
    yield opened
    opened.close()


def test_every_key_goes_to_the_guest_but_the_escape_key(window: Window) -> None:
    notice = window.wait_for(PROMPT)
    assert "Ctrl-] then q quits" in notice
    assert "33 rows and 77 columns" in notice
    assert window.is_raw

    window.type(b"echo as''leep; sleep 600\n")
    window.wait_for("asleep")
    window.type(b"\x03")  # Ctrl-C is the guest's
    window.wait_for(PROMPT)
    window.type(b"\x1dw")
    window.wait_for(PROMPT)
    window.type(b"stty size\n")
    assert "33 77" in window.wait_for(PROMPT)
    window.type(b"\x1d?")
    window.wait_for("Ctrl-] sends Ctrl-] to the guest")
    window.type(b"stty raw -echo; head -c 1 | od -t x1; stty sane\n")
    time.sleep(0.5)
    window.type(b"\x1d\x1d")
    window.wait_for("1d")

    window.type(b"\x1dq")
    assert window.status() == 0
    assert termios.tcgetattr(window.theirs) == window.mode


def test_the_terminal_gets_its_mode_back_from_a_killed_process(window: Window) -> None:
    window.wait_for(PROMPT)
    assert window.is_raw

    window.signal(signal.SIGTERM)

    assert window.status() == 143
    assert termios.tcgetattr(window.theirs) == window.mode


def test_the_terminal_gets_its_mode_back_when_the_guest_ends(window: Window) -> None:
    window.wait_for(PROMPT)

    window.type(b"exit 5\n")

    assert window.status() == 5
    assert termios.tcgetattr(window.theirs) == window.mode
