"""Runs shell commands in a guest over its serial console, with their exact output and exit status.

::

    with boot_image("toolbox", devices=[EntropyConfig()]) as (vm, shell):
        assert shell.run("head -c 8 /dev/hwrng | wc -c").output == "8\\n"

At the guest's prompt a loop is typed, which turns echo and output processing off and then carries out commands: each in
a shell of its own, without standard input, between two marks that no output can hold by chance::

    host → guest   +<line of the command>\\n … !<token>\\n
    guest → host   RS <token> { RS   output   RS <token> } <status> RS       RS: ASCII 30, record separator

The kernel's own messages share the line, may come between any two bytes, and end with CR LF, which nothing else does
while output processing is off: they are taken out of the output, and do no harm within a mark. Other processes that
write to the console are part of the output. The shell language is POSIX's (IEEE 1003.1-2017, 2), as busybox has it.
Leaves out standard input of commands, and terminals.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from vmm.actions import VmState
from vmm.config import DeviceConfig, VmConfig
from vmm.console import ConsoleClosed
from vmm.errors import ConsoleTimeout
from vmm.microvm import MicroVm

if TYPE_CHECKING:
    from kata_lab.image.library import Image
    from vmm.devices.virtio.device import VirtioDevice

PROMPT: Final = re.compile(r"kata-lab:\S*# ")
"""The prompt of a guest's shell."""

_RS = b"\x1e"
_INTERRUPT, _QUIT = b"\x03", b"\x1c"
_GRACE = 5.0  # seconds for an interrupted command to end
_POLL = 0.5  # seconds; the end of a VM wakes nobody
_WINDOW = 1 << 16  # bytes of output in which a mark is looked for, at the most
_UNPACKING_FAILED = "Initramfs unpacking failed"
_QUOTED = 80  # characters of a command in an error

_LOOP = (
    'stty raw -echo isig noflsh;trap : INT QUIT;n=$(printf "\\nx");n=${n%x};b=;printf "\\036%s{\\036" @;'
    "while :;do IFS= read -r l||{ [ $? -gt 128 ]&&continue;break;};"
    "case $l in +*)b=$b${l#+}$n;;"
    '!*)printf "\\036%s{\\036" ${l#!};sh -c "$b" </dev/null 2>&1;printf "\\036%s}%d\\036" ${l#!} $?;b=;;'
    ".)break;;esac;done"
)
_KEYS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
_MESSAGE = rb"(?:\[ *\d+\.\d{6}\] [^\r\n]*\r\n)"
_MESSAGES = re.compile(_MESSAGE)


class ShellError(KataLabError):
    """A command could not be carried out, or ended with a status that says so when that was to be checked."""


class ShellTimeout(ShellError, TimeoutError):
    """A command took too long and was interrupted; ``output`` is what it had printed.

    Attributes:
        output: as that of a ShellResult.
    """

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True, slots=True)
class ShellResult:
    """What became of a command.

    Attributes:
        status: exit status; 128 + N if signal N ended it.
        output: standard output and standard error together; bytes that are not UTF-8 are lone surrogates, as
            ``errors="surrogateescape"`` has them.
    """

    status: int
    output: str

    @property
    def data(self) -> bytes:
        """The output, byte for byte."""
        return self.output.encode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class _Found:
    """A mark: where in what was received it begins and ends, and the status in it."""

    start: int
    end: int
    status: int


class GuestShell:
    """The shell at a running guest's console; a context manager that leaves the guest at its prompt.

    A command begins in the directory and environment of the guest's shell, whatever commands before it did. One thread
    at a time may run a command.

    Args:
        vm: a VM that has been started.
        timeout: seconds until the guest must show its prompt.

    Raises:
        ShellError: the guest ended, or shows no prompt.
    """

    def __init__(self, vm: MicroVm, timeout: float = 120.0) -> None:
        self._vm = vm
        self._received = bytearray()
        self._marked = threading.Event()
        self._running = threading.Lock()
        self._listening = True
        self._broken = ""
        try:
            if PROMPT.search(vm.console.text) is None:
                vm.console.expect(PROMPT, timeout)
            vm.console.subscribe(self._collect)
            try:
                self._begin(timeout)
            except BaseException:
                vm.console.unsubscribe(self._collect)
                raise
        except (ConsoleTimeout, ShellTimeout) as error:
            raise ShellError(f"the guest's shell does not answer, so no command can be run: {error}") from error

    def run(self, command: str, timeout: float = 60.0, *, check: bool = False) -> ShellResult:
        """Run a command, which may have several lines, and wait until it has ended.

        Args:
            command: in the language of a POSIX shell.
            timeout: seconds; then it is interrupted as by Ctrl-C.
            check: refuse any exit status but 0.

        Raises:
            ShellTimeout: it took too long; the shell can be used again.
            ShellError: the VM ended, the status is to be checked and is not 0, or an earlier command could not be
                interrupted.
        """
        if "\0" in command:
            raise ShellError(f"the command {_quoted(command)} has a zero byte: a shell takes none")
        with self._running:
            if self._broken:
                raise ShellError(self._broken)
            token = secrets.token_hex(8).encode()
            self._listening = True
            try:
                self._type(_lines(command) + b"!" + token + b"\n", command)
                end = self._await_mark(_end_mark(token), timeout, command)
                if end is None:
                    raise self._interrupt(command, timeout, token)
                result = ShellResult(end.status, self._output(token, end.start))
            finally:
                self._listening = False
                self._received.clear()
        if check and result.status != 0:
            tail = _tail(result.output)
            said = f" and said {tail!r}" if tail else ""
            raise ShellError(f"the command {_quoted(command)} ended with status {result.status}{said}")
        return result

    def close(self) -> None:
        """Leave the guest at its prompt, if it still runs. A second call does nothing."""
        if not self._broken:
            self._broken = "the shell was closed: make a new GuestShell"
            if self._vm.state is VmState.RUNNING:
                with contextlib.suppress(ConsoleTimeout):
                    self._vm.console.write(b".\n", timeout=_GRACE)
        self._vm.console.unsubscribe(self._collect)

    def __enter__(self) -> GuestShell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, timeout: float) -> None:
        token = secrets.token_hex(8)
        loop = _LOOP.replace("@", token)
        start = f"sh -c '{loop}' 2>/dev/null;stty sane\n"
        self._type(start.encode(), "the loop that runs commands")
        if self._await_mark(_mark(_RS + token.encode() + b"{" + _RS), timeout, "the loop that runs commands") is None:
            raise ShellTimeout(f"it took the loop that runs commands, and did not start it in {timeout:g} s", "")

    def _collect(self, data: bytes) -> None:
        """On a vCPU's thread."""
        if not self._listening:
            return
        self._received += data
        if _RS in data:
            self._marked.set()

    def _type(self, text: bytes, command: str) -> None:
        try:
            self._vm.console.write(text)
        except ConsoleClosed as error:
            raise ShellError(f"the command {_quoted(command)} cannot be run: {error}") from error
        except ConsoleTimeout as error:
            self._broken = f"the guest stopped reading its console: {error}"
            raise ShellError(self._broken) from error

    def _await_mark(self, mark: re.Pattern[bytes], timeout: float, command: str) -> _Found | None:
        """The mark in what was received, or None if it did not come in time."""
        deadline = time.monotonic() + timeout
        searched = 0
        while True:
            ended = self._vm.state is VmState.STOPPED
            self._marked.clear()
            # A copy, since what is received grows; a mark may have begun before what is new.
            start = max(searched - _WINDOW, 0)
            fresh = bytes(self._received[start:])
            searched = start + len(fresh)
            if (match := mark.search(fresh)) is not None:
                status = match.groupdict().get("status") or b"0"
                return _Found(start + match.start(), start + match.end(), int(_without_messages(status)))
            left = deadline - time.monotonic()
            if ended:
                detail = self._vm.end.detail if self._vm.end is not None else "it was shut down"
                raise ShellError(f"the VM ended while {_quoted(command)} ran: {detail}")
            if left <= 0:
                return None
            self._marked.wait(min(left, _POLL))

    def _interrupt(self, command: str, timeout: float, token: bytes) -> ShellError:
        """Make a command end that took too long; what to raise."""
        for key in (_INTERRUPT, _QUIT):
            self._type(key, command)
            end = self._await_mark(_end_mark(token), _GRACE, command)
            if end is not None:
                output = self._output(token, end.start)
                tail = _tail(output)
                said = f"its last output was {tail!r}" if tail else "it printed nothing"
                took = f"the command {_quoted(command)} took more than {timeout:g} s and was interrupted"
                return ShellTimeout(f"{took}; {said}", output)
        self._broken = (
            f"the command {_quoted(command)} took more than {timeout:g} s and minds neither Ctrl-C nor Ctrl-\\, so "
            "that this shell is of no use any more: boot another VM"
        )
        return ShellTimeout(self._broken, self._output(token, None))

    def _output(self, token: bytes, end: int | None) -> str:
        received = bytes(self._received[:end])
        begin = _mark(_RS + token + b"{" + _RS).search(received)
        start = len(received) if begin is None else begin.end()
        return _without_messages(received[start:]).decode("utf-8", "surrogateescape")


def _lines(command: str) -> bytes:
    """A command as the loop takes it: by lines; encoded if it has what the terminal takes for a key."""
    data = command.encode("utf-8", "surrogateescape")
    if _KEYS.search(data):
        data = b'eval "$(printf %b "' + b"".join(b"\\0%03o" % byte for byte in data) + b'")"'
    return b"".join(b"+" + line + b"\n" for line in data.split(b"\n"))


def _mark(text: bytes) -> re.Pattern[bytes]:
    """What finds a mark, also with messages of the kernel between its bytes."""
    return re.compile((_MESSAGE + rb"*").join(re.escape(text[place : place + 1]) for place in range(len(text))))


def _end_mark(token: bytes) -> re.Pattern[bytes]:
    start = _mark(_RS + token + b"}").pattern
    return re.compile(start + rb"(?P<status>(?:\d|" + _MESSAGE + rb")+)" + _RS)


def _without_messages(data: bytes) -> bytes:
    return _MESSAGES.sub(b"", data)


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-5:])


def _quoted(command: str) -> str:
    shown = command if len(command) <= _QUOTED else command[: _QUOTED - 1] + "…"
    return repr(shown)


@contextlib.contextmanager
def boot_image(
    image: str | Image = "toolbox",
    *,
    devices: Sequence[DeviceConfig] = (),
    custom: Sequence[VirtioDevice] = (),
    files: Mapping[str, bytes] | None = None,
    append: str = "",
    timeout: float = 120.0,
    **settings: Any,
) -> Iterator[tuple[MicroVm, GuestShell]]:
    """Boot an image to the shell at its console, and shut it down at the end.

    Args:
        image: the name of a description (built if need be), or an image.
        devices: in the order in which the guest finds them.
        custom: virtio devices of the caller's own making, behind those; they belong to the VM once it starts.
        files: path in the guest → content of an executable file that the image does not have.
        append: words to add to the kernel's command line.
        timeout: seconds until the guest must show its prompt.
        settings: of the VM, as :class:`~vmm.config.VmConfig` has them; 512 MiB of memory if not said otherwise.

    Raises:
        ShellError: the guest did not get to its prompt.
        ImageError: the image cannot be built.
        VmmError: the VM cannot be started.
    """
    from kata_lab.image.boot import boot_source
    from kata_lab.image.build import build_named

    built = build_named(image) if isinstance(image, str) else image
    source = boot_source(built)
    if files and source.disks:
        raise ShellError(
            f"files cannot be added to the image {built.name!r}, whose root is on a disk: share a directory"
        )
    with initrd_with(source.initrd, files or {}) as initrd:
        config = VmConfig.from_dict(
            {
                "memory_mib": 512,
                "kernel": source.kernel,
                "initrd": initrd,
                "cmdline": f"{source.append} {append}".strip(),
                "devices": (*source.disks, *devices),
                **settings,
            }
        )
        with MicroVm(config, custom) as vm:
            vm.start()
            with GuestShell(vm, timeout) as shell:
                if _UNPACKING_FAILED in vm.console.text:
                    few = f"{config.memory_mib} MiB of memory are too few for the root of the image {built.name!r}"
                    raise ShellError(f"{few}, of which the kernel unpacked only a part: give the guest more")
                yield vm, shell


@contextlib.contextmanager
def initrd_with(root: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """The initramfs with more files: the kernel unpacks archives that follow one another."""
    if not files:
        yield root
        return
    from kata_lab.image.cpio import Initramfs

    added = Initramfs()
    for path, content in files.items():
        added.file(path.lstrip("/"), content, 0o755)
    with tempfile.NamedTemporaryFile(prefix="kata-lab-initrd-") as whole:
        with root.open("rb") as source:
            shutil.copyfileobj(source, whole)
        for chunk in added.chunks():
            whole.write(chunk)
        whole.flush()
        yield Path(whole.name)
