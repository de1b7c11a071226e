"""The compiled hart in the cache: made once, refused and made again when damaged, never half there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.engine.rv64 import library
from vmm.engine.rv64.build import MAGIC
from vmm.errors import EngineError

RUN_ONE = (
    "from vmm.memory import GuestMemory\n"
    "from vmm.engine.rv64.hart import Rv64Engine\n"
    "with GuestMemory(0x80000000, 4096) as memory, Rv64Engine(memory) as engine:\n"
    "    memory.write(0x80000000, b'\\x13\\0\\0\\0')\n"
    "    engine.harts[0].reset(0x80000000)\n"
    "    print(engine.harts[0].step().reason.name, 'numba' in __import__('sys').modules)\n"
)


def run(home: Path, program: str = RUN_ONE) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, KATA_LAB_HOME=str(home))
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A cache of its own with a copy of the compiled hart."""
    made = library.ensure()
    target = tmp_path / "cache" / "code" / made.name
    target.parent.mkdir(parents=True)
    target.write_bytes(made.read_bytes())
    return tmp_path


def compiled(home: Path) -> Path:
    (found,) = (home / "cache" / "code").glob("hart-*.o")
    return found


def test_a_compiled_hart_runs_without_numba(home: Path) -> None:
    done = run(home)

    assert done.stdout.split() == ["BUDGET", "False"], done.stderr


def test_a_damaged_hart_is_compiled_again(home: Path) -> None:
    good = compiled(home).read_bytes()
    compiled(home).write_bytes(good[: len(good) // 2])

    done = run(home)

    assert done.stdout.split() == ["BUDGET", "False"], done.stderr
    assert len(compiled(home).read_bytes()) == len(good)
    assert not list((home / "cache" / "code").glob("*.part"))


@pytest.mark.parametrize("data", [b"", MAGIC, MAGIC + bytes(32) + b"{}\n", b"something else entirely"])
def test_what_is_no_compiled_hart_is_refused(data: bytes) -> None:
    with pytest.raises(
        EngineError, match=f"compiled hart of {len(data)} bytes is damaged; it has to be compiled again"
    ):
        library.verified(data)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")

    done = run(blocker)

    assert done.returncode == 1
    assert "let KATA_LAB_HOME name a writable directory" in done.stderr.splitlines()[-1]


def test_whoever_waits_for_anothers_compilation_is_told(home: Path) -> None:
    compiled(home).unlink()
    program = (
        "from vmm.engine.rv64.hart import Rv64Engine\n"
        "Rv64Engine.prepare(lambda fraction, what: print(f'{fraction:.2f} {what}', flush=True))\n"
    )
    environment = dict(os.environ, KATA_LAB_HOME=str(home))
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=200)[0] for process in started]

    assert [process.returncode for process in started] == [0, 0]
    assert sorted("waiting for another process" in text for text in told) == [False, True]
    assert sorted("loading numba" in text for text in told) == [False, True]
