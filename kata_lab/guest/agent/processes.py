"""A process of a container, and the agent's ends of its standard streams."""

import asyncio
import os

import linux
from entry import Channel
from rpc import FAILED_PRECONDITION, INTERNAL, NOT_FOUND, PERMISSION_DENIED, RpcError
from streams import Listener, Stream

PIPE_BYTES = 1 << 18
_LONGEST_ERROR = 4096
_END_OF_FILE = b"\x04"  # what a terminal takes for it, VEOF


class Process:
    """One process. ``child`` is None until crun has made it."""

    def __init__(self, exec_id, description):
        self.exec_id = exec_id
        self.terminal = bool(description.get("terminal"))
        self.window = description.get("consoleSize")
        self.child = None
        self.known = asyncio.Event()  # that it runs, or never will
        self.told = False  # somebody was told its exit status
        self.stdin = self.stdout = self.stderr = None
        self.unread = 1 if self.terminal else 2  # streams whose end nobody has seen

    @property
    def ended(self):
        return self.child is not None and self.child.status is not None

    def drained(self, stream):
        """The end of an output was read."""
        if not stream.closed:
            stream.close()
            self.unread -= 1

    async def write(self, data):
        if self.stdin is None or self.stdin.closed:
            raise RpcError(FAILED_PRECONDITION, f"the input of process {self.exec_id!r} is closed")
        try:
            await self.stdin.write(data)
        except OSError as error:
            if error.args[0] in (linux.EPIPE, linux.EIO):
                raise RpcError(FAILED_PRECONDITION, f"process {self.exec_id!r} reads no more")
            raise

    def close_input(self):
        if self.stdin is None or self.stdin.closed:
            return
        if self.terminal:
            # A terminal has one descriptor for both ways.
            linux.write(self.stdin.descriptor, _END_OF_FILE, 1)
        else:
            self.stdin.close()

    def resize(self, rows, columns):
        if not self.terminal:
            raise RpcError(FAILED_PRECONDITION, f"process {self.exec_id!r} has no terminal")
        if self.stdout is not None and not self.stdout.closed:
            linux.set_window(self.stdout.descriptor, rows & 0xFFFF, columns & 0xFFFF)

    def close(self):
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    async def enter(self, make, children, on_end):
        """Have ``make(standard, channel)`` fork it and return its number, or raise; it is as it runs its program."""
        child = ours = None
        standard, socket = (), -1
        errors, inner = linux.pipe()
        errors = Stream(errors)
        linux.set_nonblocking(errors.descriptor)
        try:
            try:
                if self.terminal:
                    ours, socket = linux.socket_pair()
                else:
                    standard = self._make_pipes()
                child = children.made(make(standard, Channel(inner, socket)), on_end)
            finally:
                for descriptor in [inner] + list(standard) + ([socket] if socket >= 0 else []):
                    linux.close(descriptor)
            await _raise_error(errors)
            if self.terminal:
                self._take_terminal(linux.receive_descriptor(ours))
            self.child = child
        except BaseException:
            self.close()
            if child is not None:
                child.kill(linux.SIGKILL)
                await child.wait()
            raise
        finally:
            self.known.set()
            errors.close()
            if ours is not None:
                linux.close(ours)

    async def launch(self, crun, children, arguments, on_end):
        """Have crun make it, with its streams; then it waits or runs, and is our child."""
        numbers = crun.path("pid")
        since = children.reaped
        try:
            if self.terminal:
                await self._launch_on_terminal(crun, arguments[:1] + ["--pid-file", numbers] + arguments[1:])
            else:
                await self._launch_on_pipes(crun, arguments[:1] + ["--pid-file", numbers] + arguments[1:])
            with open(numbers) as file:
                self.child = children.take_over(int(file.read()), since, on_end)
        except BaseException:
            self.close()
            _kill_unknown(numbers)
            raise
        finally:
            self.known.set()
            try:
                os.remove(numbers)
            except OSError:
                pass

    def _make_pipes(self):
        """Pipes for the standard streams; the ends of the process."""
        theirs = []
        try:
            for way in range(3):
                ends = linux.pipe()
                inner, ours = ends if way == 0 else (ends[1], ends[0])
                theirs.append(inner)
                linux.set_nonblocking(ours)
                stream = Stream(ours)
                if way == 0:
                    self.stdin = stream
                elif way == 1:
                    linux.set_pipe_size(ours, PIPE_BYTES)
                    self.stdout = stream
                else:
                    self.stderr = stream
        except BaseException:
            for descriptor in theirs:
                linux.close(descriptor)
            raise
        return theirs

    def _take_terminal(self, descriptor):
        linux.set_nonblocking(descriptor)
        self.stdin = self.stdout = Stream(descriptor)
        if self.window is not None:
            self.resize(self.window.get("height", 0), self.window.get("width", 0))

    async def _launch_on_pipes(self, crun, arguments):
        theirs = self._make_pipes()
        try:
            await crun.run(arguments, theirs)
        finally:
            for descriptor in theirs:
                linux.close(descriptor)

    async def _launch_on_terminal(self, crun, arguments):
        path = crun.path("tty")
        listener = Listener(linux.listen_unix(path))
        try:
            await crun.run(arguments[:1] + ["--console-socket", path] + arguments[1:])
            # crun has connected and sent before it ended.
            connection = await listener.accept()
            try:
                while (descriptor := linux.receive_descriptor(connection.descriptor)) < 0:
                    await connection.readable()
            finally:
                connection.close()
        finally:
            listener.close()
            os.remove(path)
        self._take_terminal(descriptor)


async def _raise_error(errors):
    """Until the process runs its program. RpcError if it comes to no program, with why."""
    said, buffer = b"", bytearray(1024)
    while count := await errors.read(buffer, len(buffer)):
        said = (said + bytes(memoryview(buffer)[:count]))[:_LONGEST_ERROR]
    if said:
        number, _, text = said.decode().partition(" ")
        number = int(number)
        code = NOT_FOUND if number == linux.ENOENT else INTERNAL
        if number in (linux.EACCES, linux.ENOEXEC, linux.EISDIR):
            code = PERMISSION_DENIED
        raise RpcError(code, f"{text}: {linux.strerror(number)}")


def _kill_unknown(numbers):
    """A process that was made although its making failed ends."""
    try:
        with open(numbers) as file:
            linux.kill(int(file.read()), linux.SIGKILL)
    except (OSError, ValueError):
        pass  # there is none
