"""The system calls that the agent needs and MicroPython has not, through ``ffi`` on the C library.

Constants are those of Linux's generic (asm-generic) numbering, as on riscv64; x86-64 has others for some system calls
(arch/x86/entry/syscalls/syscall_64.tbl).
"""

import array
import os
import platform

import ffi
import uctypes

EPERM, ENOENT, ESRCH, EINTR, EIO, ENXIO, ENOEXEC, EAGAIN, EACCES, EBUSY = 1, 2, 3, 4, 5, 6, 8, 11, 13, 16
EEXIST, ENOTDIR, EISDIR, EINVAL, EPIPE, ELOOP, EOPNOTSUPP, EAFNOSUPPORT = 17, 20, 21, 22, 32, 40, 95, 97
O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_NONBLOCK = 0, 1, 2, 0o100, 0o1000, 0o4000
O_DIRECTORY, O_NOFOLLOW, O_CLOEXEC, O_PATH = 0o200000, 0o400000, 0o2000000, 0o10000000
SIGKILL, SIGPIPE, SIGTERM, SIGCHLD = 9, 13, 15, 17
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
_MNT_DETACH = 2
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
_TIOCSCTTY, _TIOCSWINSZ, _TIOCGPTN, _TIOCSPTLCK, _RNDRESEEDCRNG = 0x540E, 0x5414, 0x80045430, 0x40045431, 0x5207
_F_SETFL, _F_SETPIPE_SZ, _F_ADD_SEALS, _ALL_SEALS = 4, 1031, 1033, 15
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_SIG_BLOCK, _SIG_SETMASK = 0, 2
_POSIX_SPAWN_SETSIGMASK, _POSIX_SPAWN_BYTES = 8, 512  # more than glibc's structures have
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
SYS_PIDFD_OPEN, SYS_CLONE3, SYS_CLOSE_RANGE = 434, 435, 436
_SYS_CLONE, SYS_GETCWD, SYS_CAPSET = (56, 79, 126) if "-x86_64-" in platform.platform() else (220, 17, 91)
_CLONE_NEWPID = 0x20000000
_WNOHANG = 1
_IN_MODIFY = 2
_EPOLL_CTL_ADD, _EPOLL_CTL_MOD, _EPOLLOUT, _EPOLLET = 1, 3, 4, 1 << 31
_MSG_CMSG_CLOEXEC = 0x40000000
_O_NOCTTY = 0o400

_libc = ffi.open("libc.so.6")
_open = _libc.func("i", "open", "sii")
_openat = _libc.func("i", "openat", "isii")
_close = _libc.func("i", "close", "i")
_read = _libc.func("l", "read", "ipL")
_write = _libc.func("l", "write", "ipL")
duplicate = _libc.func("i", "dup2", "ii")
_fcntl = _libc.func("i", "fcntl", "iil")
ioctl = _libc.func("i", "ioctl", "iLp")
_fork = _libc.func("i", "fork", "")
_execve = _libc.func("i", "execve", "sPP")
exit = _libc.func("v", "_exit", "i")
_waitpid = _libc.func("i", "waitpid", "ipi")
_kill = _libc.func("i", "kill", "ii")
_sigprocmask = _libc.func("i", "sigprocmask", "ipp")
_mount = _libc.func("i", "mount", "sssLs")
_umount2 = _libc.func("i", "umount2", "si")
_accept4 = _libc.func("i", "accept4", "ippi")
syscall = _libc.func("l", "syscall", "llllll")  # for what the C library has no function: number and five arguments
set_session = _libc.func("i", "setsid", "")
prctl = _libc.func("i", "prctl", "ilLLL")
strerror = _libc.func("s", "strerror", "i")


def function(result, name, arguments):
    """A function of the C library, with types as ``ffi`` has them."""
    return _libc.func(result, name, arguments)


def _rare(result, name, arguments):
    """A function of the C library that is looked up when it is first called."""
    found = []

    def call(*values):
        if not found:
            found.append(_libc.func(result, name, arguments))
        return found[0](*values)

    return call


_pipe2 = _rare("i", "pipe2", "pi")
_socketpair = _rare("i", "socketpair", "iiip")
_signalfd = _rare("i", "signalfd", "ipi")
_inotify_init1 = _rare("i", "inotify_init1", "i")
_inotify_add_watch = _rare("i", "inotify_add_watch", "isI")
_inotify_rm_watch = _rare("i", "inotify_rm_watch", "ii")
_epoll_create1 = _rare("i", "epoll_create1", "i")
_epoll_ctl = _rare("i", "epoll_ctl", "iiip")
_epoll_wait = _rare("i", "epoll_wait", "ipii")
_recvmsg = _rare("l", "recvmsg", "ipi")
_socket = _rare("i", "socket", "iii")
_bind = _rare("i", "bind", "ipI")
_listen = _rare("i", "listen", "ii")
_chmod = _rare("i", "chmod", "sI")
_fchmod = _rare("i", "fchmod", "iI")
_fchownat = _rare("i", "fchownat", "isIIi")
_mkdirat = _rare("i", "mkdirat", "isI")
_symlinkat = _rare("i", "symlinkat", "sis")
_renameat = _rare("i", "renameat", "isis")
_unlinkat = _rare("i", "unlinkat", "isi")
_lseek = _rare("l", "lseek", "ili")
_posix_spawn = _rare("i", "posix_spawn", "psppPP")
_spawnattr_init = _rare("i", "posix_spawnattr_init", "p")
_spawnattr_setflags = _rare("i", "posix_spawnattr_setflags", "ph")
_spawnattr_setsigmask = _rare("i", "posix_spawnattr_setsigmask", "pp")
_actions_init = _rare("i", "posix_spawn_file_actions_init", "p")
_actions_adddup2 = _rare("i", "posix_spawn_file_actions_adddup2", "pii")
_actions_destroy = _rare("i", "posix_spawn_file_actions_destroy", "p")
_memfd_create = _rare("i", "memfd_create", "sI")
_sethostname = _rare("i", "sethostname", "sL")
_clock_settime = _rare("i", "clock_settime", "ip")
_sync = _rare("v", "sync", "")


def explain(error):
    """What an OSError of this module means, in words."""
    number = error.args[0] if error.args else 0
    what = f"{error.args[1]}: " if len(error.args) > 1 else ""
    return f"{what}{strerror(number)} (errno {number})"


def checked(result, what, name=None):
    """``result``, or OSError with what was being done, to what."""
    if result < 0:
        raise OSError(os.errno(), what if name is None else f"{what} {name}")
    return result


# Descriptors.


def open_file(path, flags, mode=0):
    return checked(_open(path, flags | O_CLOEXEC, mode), "opening", path)


def close(descriptor):
    _close(descriptor)


def read(descriptor, buffer, length):
    """Bytes read into ``buffer``; -1 if there are none yet. A terminal whose other end is closed has ended."""
    count = _read(descriptor, buffer, length)
    if count < 0:
        error = os.errno()
        if error in (EAGAIN, EINTR):
            return -1
        if error == EIO:
            return 0
        raise OSError(error, "reading")
    return count


def write(descriptor, buffer, length):
    """Bytes written; -1 if there is no room yet."""
    count = _write(descriptor, buffer, length)
    if count < 0 and os.errno() not in (EAGAIN, EINTR):
        raise OSError(os.errno(), "writing")
    return count


def write_at(descriptor, offset, data):
    """Write all to a file."""
    checked(_lseek(descriptor, offset, 0), "seeking")
    view = memoryview(data)
    while len(view):
        view = view[checked(_write(descriptor, view, len(view)), "writing") :]


def pipe():
    """Both ends, closed in other programs: (read, write)."""
    ends = array.array("i", [0, 0])
    checked(_pipe2(ends, O_CLOEXEC), "making a pipe")
    return ends[0], ends[1]


def set_pipe_size(descriptor, size):
    """As large as asked for, or as it was."""
    _fcntl(descriptor, _F_SETPIPE_SZ, size)


def set_nonblocking(descriptor):
    _fcntl(descriptor, _F_SETFL, O_NONBLOCK)


def sealed_copy(path):
    """A descriptor of a copy of a file in memory, which nobody can change (memfd_create(2))."""
    descriptor = checked(_memfd_create(path, _MFD_CLOEXEC | _MFD_ALLOW_SEALING), "memfd_create")
    with open(path, "rb") as file:
        while part := file.read(1 << 16):
            checked(_write(descriptor, part, len(part)), "copying", path)
    checked(_fcntl(descriptor, _F_ADD_SEALS, _ALL_SEALS), "sealing the copy of", path)
    return descriptor


# Processes.


def _c_strings(texts):
    kept = [text.encode() + b"\0" for text in texts]
    return array.array("Q", [uctypes.addressof(each) for each in kept] + [0]), kept


def _signal_set(*signals):
    found = bytearray(128)
    found[0:8] = sum(1 << (number - 1) for number in signals).to_bytes(8, "little")
    return found


_NO_SIGNALS = _signal_set()
_attributes = []


def spawn(command, environment, standard=(-1, -1, -1), terminal=False, program=None):
    """Start a program with these descriptors as its standard streams, -1 for /dev/null; its process number.

    With ``terminal``, its standard input becomes the terminal that controls a session of its own. ``program`` is the
    file to run, if that is not what the command says.
    """
    arguments, _kept = _c_strings(command)
    variables, _kept_too = _c_strings(environment)
    # Descriptors of the agent are above 2, so that none is overwritten before it is used.
    streams = [each if each >= 0 else null for each in standard]
    first, second = uctypes.addressof(arguments), uctypes.addressof(variables)
    if terminal:
        return _fork_on_terminal(program or command[0], first, second, streams)
    # No copy of the agent's memory is made for a process that only becomes another one (posix_spawn(3)).
    actions = bytearray(_POSIX_SPAWN_BYTES)
    _actions_init(actions)
    try:
        for number in range(3):
            _actions_adddup2(actions, streams[number], number)
        error = _posix_spawn(_word, program or command[0], actions, _unblocked(), first, second)
    finally:
        _actions_destroy(actions)
    if error:
        raise OSError(error, "starting " + command[0])
    return _word[0]


def _unblocked():
    """Attributes of a program that starts with no signal blocked."""
    if not _attributes:
        made = bytearray(_POSIX_SPAWN_BYTES)
        _spawnattr_init(made)
        _spawnattr_setsigmask(made, _NO_SIGNALS)
        _spawnattr_setflags(made, _POSIX_SPAWN_SETSIGMASK)
        _attributes.append(made)
    return _attributes[0]


def _fork_on_terminal(program, arguments, variables, streams):
    process = checked(_fork(), "fork")
    if process == 0:
        try:
            _sigprocmask(_SIG_SETMASK, _NO_SIGNALS, None)
            for number in range(3):
                duplicate(streams[number], number)
            set_session()
            ioctl(0, _TIOCSCTTY, None)
            _execve(program, arguments, variables)
        finally:
            exit(127)
    return process


def spawn_reaper():
    """Start the first process of a new PID namespace: it reaps there and does nothing else. Its number here."""
    process = checked(syscall(_SYS_CLONE, _CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0), "making a PID namespace")
    if process == 0:
        try:
            syscall(SYS_CLOSE_RANGE, 0, 0x7FFFFFFF, 0, 0, 0)
            children, word = _signal_set(SIGCHLD), array.array("i", [0])
            wait = _libc.func("i", "sigwait", "pp")
            while True:
                while _waitpid(-1, word, _WNOHANG) > 0:
                    pass
                wait(children, word)
        finally:
            exit(1)
    return process


def execute(path, arguments, variables):
    """Become another program; comes back only if that cannot be, with os.errno()."""
    first, _kept = _c_strings(arguments)
    second, _kept_too = _c_strings(variables)
    _execve(path, uctypes.addressof(first), uctypes.addressof(second))


def unblock_signals():
    """Let every signal through."""
    _sigprocmask(_SIG_SETMASK, _NO_SIGNALS, None)


def become_reaper():
    """Orphans below this process become its children; a descriptor that can be read when a child has ended.

    Nobody may look into it any more, nor into what it forks before that is a program of its own.
    """
    checked(prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "becoming private")
    checked(prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "becoming a reaper")
    _sigprocmask(_SIG_BLOCK, _signal_set(SIGCHLD, SIGPIPE), None)
    return checked(_signalfd(-1, _signal_set(SIGCHLD), O_NONBLOCK | O_CLOEXEC), "signalfd")


def reap():
    """A child that has ended, and its exit status, 128 + n after signal n; None if there is none."""
    process = _waitpid(-1, _word, _WNOHANG)
    if process <= 0:
        return None
    how = _word[0]
    return process, how >> 8 & 0xFF if how & 0x7F == 0 else 128 + (how & 0x7F)


def kill(process, signal):
    """False if there is no such process."""
    if _kill(process, signal) == 0:
        return True
    if os.errno() == ESRCH:
        return False
    raise OSError(os.errno(), f"signal {signal}")


# Mounts, files, names.


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
        checked(_mount(source, place, kind, flags | MS["remount"], ""), "making read-only", place)


def unmount(place):
    checked(_umount2(place, _MNT_DETACH), "unmounting", place)


def enter_directory(parent, name, mode):
    """A descriptor of a directory below another one, which is made if need be; never through a symbolic link."""
    flags = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC
    descriptor = _openat(parent, name, flags, 0)
    if descriptor < 0 and os.errno() == ENOENT:
        if _mkdirat(parent, name, mode) < 0 and os.errno() != EEXIST:
            raise OSError(os.errno(), f"making directory {name}")
        descriptor = _openat(parent, name, flags, 0)
    return checked(descriptor, "directory", name)


def open_below(parent, name, flags, mode=0):
    """A file in a directory; never through a symbolic link."""
    return checked(_openat(parent, name, flags | O_NOFOLLOW | O_CLOEXEC, mode), "opening", name)


def link_below(target, parent, name):
    checked(_symlinkat(target, parent, name), "making link", name)


def rename_below(parent, name, new):
    checked(_renameat(parent, name, parent, new), "naming", new)


def remove_below(parent, name):
    """False if there was none."""
    return _unlinkat(parent, name, 0) == 0


def set_owner(parent, name, uid, gid):
    """Of a file in a directory, or of the directory itself if ``name`` is empty."""
    flags = _AT_SYMLINK_NOFOLLOW | (_AT_EMPTY_PATH if not name else 0)
    checked(_fchownat(parent, name, uid, gid, flags), f"giving {name} to {uid}:{gid}")


def set_mode(path, mode):
    checked(_chmod(path, mode), "changing the mode of", path)


def set_mode_of(descriptor, mode):
    checked(_fchmod(descriptor, mode), "changing a mode")


def set_hostname(name):
    checked(_sethostname(name, len(name.encode())), "naming the guest", name)


def set_time(seconds, nanoseconds):
    checked(_clock_settime(0, array.array("q", [seconds, nanoseconds])), "setting the clock")


def reseed_random(data):
    """Mix ``data`` into the pool, and seed the generator from the pool anew (random(4))."""
    descriptor = open_file("/dev/urandom", O_WRONLY)
    try:
        write(descriptor, data, len(data))
        checked(ioctl(descriptor, _RNDRESEEDCRNG, None), "seeding the random generator")
    finally:
        _close(descriptor)


def synchronise():
    _sync()


# Sockets, terminals, watches.


def _listening(family, address, what):
    descriptor = checked(_socket(family, 1 | O_NONBLOCK | O_CLOEXEC, 0), "socket")
    if _bind(descriptor, address, len(address)) < 0 or _listen(descriptor, 64) < 0:
        error = os.errno()
        _close(descriptor)
        raise OSError(error, f"listening on {what}")
    return descriptor


def listen_vsock(port):
    """A socket that listens on a vsock port of this guest (vsock(7)): struct sockaddr_vm."""
    address = bytearray(16)
    address[0:2] = (40).to_bytes(2, "little")
    address[4:8] = port.to_bytes(4, "little")
    address[8:12] = b"\xff\xff\xff\xff"
    return _listening(40, address, f"vsock port {port}")


def listen_unix(path):
    """A socket that listens at a path of at most 107 bytes (unix(7)): struct sockaddr_un."""
    address = bytearray(110)
    address[0:2] = (1).to_bytes(2, "little")
    address[2 : 2 + len(path)] = path.encode()
    return _listening(1, address, path)


def accept(listener):
    """The next connection; -1 if there is none yet."""
    descriptor = _accept4(listener, None, None, O_NONBLOCK | O_CLOEXEC)
    if descriptor < 0 and os.errno() not in (EAGAIN, EINTR):
        raise OSError(os.errno(), "accepting a connection")
    return descriptor


def watch_edges(descriptor):
    """A descriptor that can be read when another one becomes writable, or hangs up (epoll(7), edge-triggered)."""
    watch = checked(_epoll_create1(O_CLOEXEC), "making an epoll")
    _epoll_event[0] = _EPOLLET | _EPOLLOUT
    checked(_epoll_ctl(watch, _EPOLL_CTL_ADD, descriptor, _epoll_event), "watching a descriptor")
    return watch


def watch_hang_up(watch, descriptor):
    """From now on ``watch`` tells only that the other one hangs up."""
    _epoll_event[0] = _EPOLLET
    checked(_epoll_ctl(watch, _EPOLL_CTL_MOD, descriptor, _epoll_event), "watching a descriptor")


def next_edge(watch):
    """The events of which nobody was told yet, as poll(2) has them; 0 for none."""
    return _epoll_event[0] if checked(_epoll_wait(watch, _epoll_event, 1, 0), "reading an epoll") else 0


def socket_pair():
    """Two sockets that are connected, closed in other programs."""
    ends = array.array("i", [0, 0])
    checked(_socketpair(1, 1 | O_CLOEXEC, 0, ends), "making a pair of sockets")
    return ends[0], ends[1]


def receive_descriptor(connection):
    """The descriptor that comes with the next message (unix(7), SCM_RIGHTS); -1 if there is none yet."""
    data, control = bytearray(256), bytearray(64)
    vector = array.array("Q", [uctypes.addressof(data), len(data)])
    header = array.array(
        "Q", [0, 0, uctypes.addressof(vector), 1, uctypes.addressof(control), len(control), 0]
    )  # struct msghdr
    if _recvmsg(connection, header, _MSG_CMSG_CLOEXEC) < 0:
        if os.errno() not in (EAGAIN, EINTR):
            raise OSError(os.errno(), "receiving a descriptor")
        return -1
    if int.from_bytes(control[0:8], "little") < 20:
        raise OSError(EIO, "a message without a descriptor")
    return int.from_bytes(control[16:20], "little")


def open_terminal():
    """A pseudo-terminal (pty(7)): our end, and the end for a program."""
    ours = open_file("/dev/ptmx", O_RDWR | _O_NOCTTY)
    number = array.array("i", [0])
    ioctl(ours, _TIOCSPTLCK, number)
    ioctl(ours, _TIOCGPTN, number)
    theirs = _open(f"/dev/pts/{number[0]}", O_RDWR | _O_NOCTTY | O_CLOEXEC, 0)
    if theirs < 0:
        error = os.errno()
        _close(ours)
        raise OSError(error, "opening a terminal")
    set_nonblocking(ours)
    return ours, theirs


def set_window(terminal, rows, columns):
    checked(ioctl(terminal, _TIOCSWINSZ, array.array("H", [rows, columns, 0, 0])), "setting the window's size")


def watch_files():
    return checked(_inotify_init1(O_NONBLOCK | O_CLOEXEC), "inotify_init1")


def watch_file(watch, path):
    return checked(_inotify_add_watch(watch, path, _IN_MODIFY), "watching", path)


def unwatch_file(watch, number):
    _inotify_rm_watch(watch, number)


# Files, with what MicroPython has.


def make_directories(path, mode=0o755):
    """Make a directory with its parents, as far as they are missing."""
    try:
        try:
            os.mkdir(path)
        except OSError as error:
            if error.args[0] != ENOENT:
                raise
            make_directories(path.rpartition("/")[0], mode)
            os.mkdir(path)
        set_mode(path, mode)
    except OSError as error:
        if error.args[0] != EEXIST:
            raise OSError(error.args[0], f"making directory {path}")


def exists(path):
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def remove_tree(path):
    """Remove a directory with all that is in it; never what is mounted there or below it."""
    try:
        _remove_within(path, os.stat(path.rpartition("/")[0])[2])
    except OSError:
        pass  # there is none, or something is mounted in it


def _remove_within(path, device):
    if os.stat(path)[2] != device:
        return
    for entry in list(os.ilistdir(path)):
        inner = path + "/" + entry[0]
        if entry[1] == 0x4000:
            _remove_within(inner, device)
        else:
            os.remove(inner)
    os.rmdir(path)


_word = array.array("i", [0])
_epoll_event = array.array("I", [0, 0, 0, 0])  # struct epoll_event, whose first word are the events
null = open_file("/dev/null", O_RDWR)
