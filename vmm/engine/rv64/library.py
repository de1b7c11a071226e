"""The compiled hart, as this process has it: found in the cache or built, loaded, its entry points callable.

Compilation happens once for each version of the sources, of the compiler and of the CPU; ``KATA_LAB_CPU`` names another
CPU to compile for (``generic`` makes code that runs on every CPU of the architecture).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from vmm.cache import cache_directory
from vmm.engine.rv64.build import MAGIC
from vmm.errors import EngineError

ProgressCallback = Callable[[float, str], None]

_KEPT_OBJECTS = 4  # older compilations are removed
_LOCK = threading.Lock()
_loaded: Library | None = None


def _cpu() -> tuple[str, str]:
    """Name and features of the CPU to compile for."""
    import llvmlite.binding as llvm

    name = os.environ.get("KATA_LAB_CPU")
    if name:
        return name, ""
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know this CPU's features
        features = ""
    return llvm.get_host_cpu_name(), features


def target_machine() -> Any:
    """LLVM's code generator for the CPU to compile for."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _cpu()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="pic", codemodel="small")


def _numba_version() -> str:
    """What distinguishes one installed numba from another, without importing it."""
    found = importlib.util.find_spec("numba")
    if found is None or found.origin is None:
        raise EngineError("numba is not installed, which compiles the hart: install the package kata-lab with pip")
    return (Path(found.origin).parent / "_version.py").read_text()


def _fingerprint() -> str:
    """What decides whether a compiled object fits: sources, compiler, CPU."""
    import llvmlite

    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in [*sorted(here.glob("*.py")), here.parent / "base.py"]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name, features = _cpu()
    for part in (llvmlite.__version__, _numba_version(), platform.machine(), name, features):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _exclusive(directory: Path, progress: ProgressCallback | None) -> Iterator[None]:
    """One compilation at a time: whoever comes second finds the first one's result."""
    with (directory / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress(0.0, "waiting for another process that compiles it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(target: Path, progress: ProgressCallback | None) -> None:
    command = [sys.executable, "-m", "vmm.engine.rv64.build", str(target)]
    root = str(Path(__file__).resolve().parents[3])
    environment = dict(os.environ, NUMBA_OPT="0", PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    ) as process:
        output, messages = cast(IO[str], process.stdout), cast(IO[str], process.stderr)
        try:
            errors: list[str] = []
            reader = threading.Thread(target=lambda: errors.append(messages.read()), name="compiler-messages")
            reader.start()
            for line in output:
                fraction, _, what = line.strip().partition(" ")
                if progress:
                    progress(float(fraction), what)
            reader.join()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise EngineError(
            f"compiling the hart failed (status {process.returncode}); the compiler said: {errors[0].strip()[-2000:]}"
        )
    kept = sorted(target.parent.glob("hart-*.o"), key=lambda path: path.stat().st_mtime, reverse=True)
    # Under the lock nobody else writes: a part that is here was left by a build that was killed.
    for old in [*kept[_KEPT_OBJECTS:], *target.parent.glob("hart-*.part")]:
        old.unlink(missing_ok=True)


def verified(data: bytes) -> bytes:
    """The content of a file of compiled code.

    Raises:
        EngineError: it is not one, or damaged. LLVM would end the process over a damaged object.
    """
    digest = data[len(MAGIC) : len(MAGIC) + 32]
    content = data[len(MAGIC) + 32 :]
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(content).digest() != digest:
        raise EngineError(f"the compiled hart of {len(data)} bytes is damaged; it has to be compiled again")
    return content


class Library:
    """The loaded code. ``functions[name](*int) -> int``; those in ``unlocked`` release the GIL while they run."""

    def __init__(self, data: bytes) -> None:
        import json

        import llvmlite.binding as llvm

        header, _, code = verified(data).partition(b"\n")
        symbols: dict[str, str] = json.loads(header)
        machine = target_machine()
        module = llvm.parse_assembly("")
        module.triple = machine.triple
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._addresses = {name: self._engine.get_function_address(symbol) for name, symbol in symbols.items()}
        self._result = threading.local()

    def bind(self, name: str, arguments: int, releases_gil: bool = False) -> Callable[..., int]:
        """A Python callable for an entry point of so many int64 arguments.

        numba's calling convention: status ``f(result *, exception **, arguments …)``; our functions raise nothing.
        """
        make = ctypes.CFUNCTYPE if releases_gil else ctypes.PYFUNCTYPE
        kind = make(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * arguments)
        function = kind(self._addresses[name])
        local = threading.local()

        def call(*values: int) -> int:
            try:
                result, place = local.result
            except AttributeError:
                result = ctypes.c_int64()
                place = ctypes.addressof(result)
                local.result = result, place
            function(place, None, *values)
            return int(result.value)

        return call

    def bind_to(self, name: str, argument: int) -> Callable[[], int]:
        """A Python callable for an entry point of one int64 argument, which is always this one; it releases the GIL.
        Not for two threads at once."""
        result = ctypes.c_int64()
        kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        # Arguments that are converted already.
        arguments = ctypes.c_void_p(ctypes.addressof(result)), ctypes.c_void_p(), ctypes.c_int64(argument)
        call = functools.partial(kind(self._addresses[name]), *arguments)

        def enter() -> int:
            call()
            return result.value

        return enter


def ensure(progress: ProgressCallback | None = None) -> Path:
    """The file of the compiled hart, which is compiled if the cache has none; it is not loaded.

    Raises:
        EngineError: the compiler failed, or the cache cannot be written.
    """
    directory = cache_directory() / "code"
    target = directory / f"hart-{_fingerprint()}.o"
    try:
        if not target.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with _exclusive(directory, progress):
                if not target.exists():
                    _build(target, progress)
    except OSError as error:
        raise _unkept(directory, error) from error
    return target


def _unkept(directory: Path, error: OSError) -> EngineError:
    return EngineError(
        f"the compiled hart cannot be kept in {directory}: {error}; let KATA_LAB_HOME name a writable directory"
    )


def load(progress: ProgressCallback | None = None) -> Library:
    """The compiled hart: from this process, the cache, or the compiler.

    ``progress(fraction, what)`` is called while it compiles (10 s, once).

    Raises:
        EngineError: the compiler failed, or the cache cannot be written.
    """
    global _loaded
    with _LOCK:
        if _loaded is not None:
            return _loaded
        target = ensure(progress)
        try:
            try:
                _loaded = Library(target.read_bytes())
            except EngineError:
                with _exclusive(target.parent, progress):
                    _build(target, progress)
                _loaded = Library(target.read_bytes())
        except OSError as error:
            raise _unkept(target.parent, error) from error
        return _loaded
