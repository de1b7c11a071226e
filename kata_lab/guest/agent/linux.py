"""The system calls that the agent needs and MicroPython has not, through ``ffi`` on the C library; and waiting for
descriptors and processes in asyncio. Constants are those of Linux's generic (asm-generic) numbering, as on riscv64."""

import array
import asyncio
import os
from asyncio import core

import ffi
import uctypes

EINTR, EAGAIN, EEXIST, EIO, ENOENT, EPIPE, ESRCH = 4, 11, 17, 5, 2, 32, 3
O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_NONBLOCK, O_CLOEXEC = 0, 1, 2, 0o100, 0o1000, 0o4000, 0o2000000
SIGHUP, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD = 1, 9, 13, 15, 17
MS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "remount": 32,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
    "bind": 4096,
    "rbind": 4096 | 16384,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
}
NO_FLAG = ("rw", "suid", "dev", "exec", "async", "atime", "defaults")
MNT_DETACH = 2
TIOCSWINSZ = 0x5414
_SIG_BLOCK, _SIG_SETMASK = 0, 2
_PR_SET_CHILD_SUBREAPER = 36
_SFD = O_NONBLOCK | O_CLOEXEC
_WNOHANG = 1

_libc = ffi.open("libc.so.6")
_open = _libc.func("i", "open", "sii")
_close = _libc.func("i", "close", "i")
_read = _libc.func("l", "read", "ipL")
_write = _libc.func("l", "write", "ipL")
_pipe2 = _libc.func("i", "pipe2", "pi")
_dup2 = _libc.func("i", "dup2", "ii")
_fcntl = _libc.func("i", "fcntl", "iil")
_fork = _libc.func("i", "fork", "")
_setsid = _libc.func("i", "setsid", "")
_execve = _libc.func("i", "execve", "sPP")
_exit = _libc.func("v", "_exit", "i")
_waitpid = _libc.func("i", "waitpid", "ipi")
_kill = _libc.func("i", "kill", "ii")
_prctl = _libc.func("i", "prctl", "ilLLL")
_sigprocmask = _libc.func("i", "sigprocmask", "ipp")
_signalfd = _libc.func("i", "signalfd", "ipi")
_inotify_init1 = _libc.func("i", "inotify_init1", "i")
_inotify_add_watch = _libc.func("i", "inotify_add_watch", "isI")
_inotify_rm_watch = _libc.func("i", "inotify_rm_watch", "ii")
_mount = _libc.func("i", "mount", "sssLs")
_umount2 = _libc.func("i", "umount2", "si")
_ioctl = _libc.func("i", "ioctl", "iLp")
_recvmsg = _libc.func("l", "recvmsg", "ipi")
_socket = _libc.func("i", "socket", "iii")
_bind = _libc.func("i", "bind", "ipI")
_listen = _libc.func("i", "listen", "ii")
_accept4 = _libc.func("i", "accept4", "ippi")
_chmod = _libc.func("i", "chmod", "sI")
_chown = _libc.func("i", "chown", "sII")
_sethostname = _libc.func("i", "sethostname", "sL")
_clock_settime = _libc.func("i", "clock_settime", "ip")
_lseek = _libc.func("l", "lseek", "ili")


def checked(result, what):
    """``result``, or OSError with what was being done."""
    if result < 0:
        raise OSError(os.errno(), what)
    return result


class _Ready:
    """Suspends the task until a descriptor can be read or written."""

    def __init__(self, queue, descriptor):
        self.queue = queue
        self.descriptor = descriptor

    def __iter__(self):
        return self

    __await__ = __iter__

    def __next__(self):
        if self.queue is None:
            raise StopIteration
        queue, self.queue = self.queue, None
        queue(self.descriptor)


async def readable(descriptor):
    await _Ready(core._io_queue.queue_read, descriptor)


async def writable(descriptor):
    await _Ready(core._io_queue.queue_write, descriptor)


def forget(descriptor):
    """Nobody shall wait for this descriptor any more: it is about to be closed."""
    core._io_queue.remove(descriptor)


def open_file(path, flags, mode=0):
    return checked(_open(path, flags | O_CLOEXEC, mode), path)


def close(descriptor):
    forget(descriptor)
    _close(descriptor)


def read_now(descriptor, buffer, length):
    """Bytes read into ``buffer``; -1 if there are none yet. A terminal whose other end is closed has ended."""
    count = _read(descriptor, buffer, length)
    if count < 0:
        error = os.errno()
        if error in (EAGAIN, EINTR):
            return -1
        if error == EIO:
            return 0
        raise OSError(error, "read")
    return count


async def write_all(descriptor, data):
    view = memoryview(data)
    while len(view):
        count = _write(descriptor, view, len(view))
        if count >= 0:
            view = view[count:]
        elif os.errno() in (EAGAIN, EINTR):
            await writable(descriptor)
        else:
            raise OSError(os.errno(), "write")


def write_at(descriptor, offset, data):
    checked(_lseek(descriptor, offset, 0), "lseek")
    view = memoryview(data)
    while len(view):
        view = view[checked(_write(descriptor, view, len(view)), "write") :]


def pipe():
    """Both ends, closed in other programs: (read, write)."""
    ends = array.array("i", [0, 0])
    checked(_pipe2(ends, O_CLOEXEC), "pipe2")
    return ends[0], ends[1]


def set_nonblocking(descriptor):
    _fcntl(descriptor, 4, O_NONBLOCK)


def _c_strings(texts):
    kept = [text.encode() + b"\0" for text in texts]
    return array.array("Q", [uctypes.addressof(each) for each in kept] + [0]), kept


_no_signals = bytearray(128)
_children_signal = bytearray(128)
_children_signal[0:8] = (1 << (SIGCHLD - 1)).to_bytes(8, "little")
_blocked = bytearray(128)
_blocked[0:8] = (1 << (SIGCHLD - 1) | 1 << (SIGPIPE - 1)).to_bytes(8, "little")


def spawn(command, environment, standard=(-1, -1, -1), session=False):
    """Start a program with these descriptors as its standard streams, -1 for /dev/null; its process."""
    arguments, _kept = _c_strings(command)
    variables, _kept_too = _c_strings(environment)
    streams = [each if each >= 0 else _null for each in standard]
    process = checked(_fork(), "fork")
    if process == 0:
        _sigprocmask(_SIG_SETMASK, _no_signals, None)
        if session:
            _setsid()
        for number in range(3):
            # Descriptors of the agent are above 2, so that none is overwritten before it is used.
            _dup2(streams[number], number)
        _execve(command[0], uctypes.addressof(arguments), uctypes.addressof(variables))
        _exit(127)
    return process


class Children:
    """Who has ended, of those that the agent started or that were left to it: it is their reaper (prctl(2))."""

    def __init__(self):
        self._ended = {}
        self._awaited = {}
        self._kept = set()

    def begin(self):
        _sigprocmask(_SIG_BLOCK, _blocked, None)
        checked(_prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
        self._signals = checked(_signalfd(-1, _children_signal, _SFD), "signalfd")
        asyncio.create_task(self._watch())

    async def _watch(self):
        told, word = bytearray(128 * 16), array.array("i", [0])
        while True:
            await readable(self._signals)
            while _read(self._signals, told, len(told)) > 0:
                pass
            while True:
                process = _waitpid(-1, word, _WNOHANG)
                if process <= 0:
                    break
                how = word[0]
                status = how >> 8 & 0xFF if how & 0x7F == 0 else 128 + (how & 0x7F)
                event = self._awaited.pop(process, None)
                self._ended[process] = status
                if event is not None:
                    event.set()
                if len(self._ended) > 1000:
                    self._drop()

    def _drop(self):
        """Orphans whom nobody asks for."""
        for process in list(self._ended):
            if process not in self._kept:
                del self._ended[process]

    def keep(self, process):
        """Somebody will ask for it."""
        self._kept.add(process)

    def ended(self, process):
        return process in self._ended

    async def wait(self, process):
        """The exit status of a process that was kept; 128 + n after signal n."""
        while process not in self._ended:
            if process not in self._awaited:
                self._awaited[process] = asyncio.Event()
            await self._awaited[process].wait()
        return self._ended[process]

    def release(self, process):
        """Nobody asks for it any more."""
        self._kept.discard(process)
        self._ended.pop(process, None)


def kill(process, signal):
    """False if there is no such process."""
    if _kill(process, signal) == 0:
        return True
    if os.errno() == ESRCH:
        return False
    raise OSError(os.errno(), "kill")


def mount(source, place, kind, options):
    """Mount with options as mount(8) has them."""
    flags, rest = 0, []
    for option in options:
        if option in MS:
            flags |= MS[option]
        elif option not in NO_FLAG:
            rest.append(option)
    checked(_mount(source, place, kind, flags, ",".join(rest)), f"mounting {source} at {place}")
    if flags & MS["bind"] and flags & MS["ro"]:
        # A bind mount takes its flags only when it is changed.
        checked(_mount(source, place, kind, flags | MS["remount"], ""), f"making {place} read-only")


def unmount(place):
    checked(_umount2(place, MNT_DETACH), f"unmounting {place}")


def listen_vsock(port):
    """A socket that listens on a vsock port of this guest (vsock(7)): struct sockaddr_vm."""
    descriptor = checked(_socket(40, 1 | O_NONBLOCK | O_CLOEXEC, 0), "socket")
    address = bytearray(16)
    address[0:2] = (40).to_bytes(2, "little")
    address[4:8] = port.to_bytes(4, "little")
    address[8:12] = b"\xff\xff\xff\xff"
    checked(_bind(descriptor, address, len(address)), f"binding vsock port {port}")
    checked(_listen(descriptor, 64), "listen")
    return descriptor


def listen_unix(path):
    descriptor = checked(_socket(1, 1 | O_NONBLOCK | O_CLOEXEC, 0), "socket")
    address = bytearray(110)
    address[0:2] = (1).to_bytes(2, "little")
    address[2 : 2 + len(path)] = path.encode()
    checked(_bind(descriptor, address, len(address)), f"binding {path}")
    checked(_listen(descriptor, 1), "listen")
    return descriptor


async def accept(listener):
    while True:
        descriptor = _accept4(listener, None, None, O_NONBLOCK | O_CLOEXEC)
        if descriptor >= 0:
            return descriptor
        if os.errno() not in (EAGAIN, EINTR):
            raise OSError(os.errno(), "accept")
        await readable(listener)


async def receive_descriptor(connection):
    """The descriptor that comes with the next message (unix(7), SCM_RIGHTS)."""
    data, control = bytearray(256), bytearray(64)
    vector = array.array("Q", [uctypes.addressof(data), len(data)])
    header = array.array(
        "Q", [0, 0, uctypes.addressof(vector), 1, uctypes.addressof(control), len(control), 0]
    )  # struct msghdr
    while _recvmsg(connection, header, 0) < 0:
        if os.errno() not in (EAGAIN, EINTR):
            raise OSError(os.errno(), "recvmsg")
        await readable(connection)
    if int.from_bytes(control[0:8], "little") < 20:
        raise OSError(EIO, "a message without a descriptor")
    return int.from_bytes(control[16:20], "little")


def set_window(terminal, rows, columns):
    checked(_ioctl(terminal, TIOCSWINSZ, array.array("H", [rows, columns, 0, 0])), "TIOCSWINSZ")


class FileWatch:
    """Tells which of the files that are watched were changed (inotify(7))."""

    def __init__(self):
        self._descriptor = checked(_inotify_init1(_SFD), "inotify_init1")

    def add(self, path):
        return checked(_inotify_add_watch(self._descriptor, path, 2), path)

    def remove(self, number):
        _inotify_rm_watch(self._descriptor, number)

    async def changed(self):
        """Numbers of the files that were changed, after at least one was."""
        buffer = bytearray(4096)
        while True:
            count = read_now(self._descriptor, buffer, len(buffer))
            if count > 0:
                break
            await readable(self._descriptor)
        found, at = [], 0
        while at < count:
            found.append(int.from_bytes(buffer[at : at + 4], "little"))
            at += 16 + int.from_bytes(buffer[at + 12 : at + 16], "little")
        return found


def set_owner(path, uid, gid):
    checked(_chown(path, uid, gid), path)


def set_mode(path, mode):
    checked(_chmod(path, mode), path)


def set_hostname(name):
    checked(_sethostname(name, len(name.encode())), "sethostname")


def set_time(seconds, nanoseconds):
    checked(_clock_settime(0, array.array("q", [seconds, nanoseconds])), "clock_settime")


def make_directories(path, mode=0o755):
    made = ""
    for part in path.strip("/").split("/"):
        made += "/" + part
        try:
            os.mkdir(made)
            set_mode(made, mode)
        except OSError as error:
            if error.args[0] != EEXIST:
                raise


def exists(path):
    try:
        os.stat(path)
    except OSError:
        return False
    return True


_null = open_file("/dev/null", O_RDWR)
