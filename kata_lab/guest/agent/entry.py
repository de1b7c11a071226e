"""What a process of a container does between its making and its program: enter, give up privileges, execve(2).

A process is forked from the agent into the container's PID namespace and control group at once (clone3(2)), and enters
the other namespaces itself. What it needs is prepared before the fork, since a fork shares memory only as long as it is
not written. The agent is not dumpable (prctl(2)), and hence neither is the process until its program runs: a container
cannot look into it; and it keeps no descriptor of the agent's that the container could name as its working directory.

The order of steps and what is done without being asked (the home directory, the owner of the streams) are those of the
OCI runtime crun 1.21, which is the referee in the tests. From the OCI runtime specification 1.1, config.md, "process".
Left out, and given to crun by who calls this: seccomp, user namespaces, security labels.
"""

import array
import os

import linux
import uctypes

_CAPABILITIES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"""
_LIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME"
CAPABILITIES = {"CAP_" + name: number for number, name in enumerate(_CAPABILITIES.split())}
LIMITS = {"RLIMIT_" + name: number for number, name in enumerate(_LIMITS.split())}
NAMESPACES = {
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
_CLONE_INTO_CGROUP = 0x200000000
_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _AMBIENT_RAISE = 8, 24, 38, 47, 2
_X_OK, _S_IFMT, _S_IFDIR = 1, 0o170000, 0o040000
_O_NOCTTY, _TIOCSCTTY, _TIOCGPTN, _TIOCSPTLCK, _TIOCGPTPEER = 0o400, 0x540E, 0x80045430, 0x40045431, 0x5441
_MOST_OF_PASSWD = 1 << 20

_setns = linux.function("i", "setns", "ii")
_setrlimit = linux.function("i", "setrlimit", "ip")
_setgroups = linux.function("i", "setgroups", "Lp")
_setresgid = linux.function("i", "setresgid", "III")
_setresuid = linux.function("i", "setresuid", "III")
_fchown = linux.function("i", "fchown", "iII")
_access = linux.function("i", "access", "si")
_chdir = linux.function("i", "chdir", "s")
_umask = linux.function("i", "umask", "I")
_signal = linux.function("p", "signal", "ip")
_sendmsg = linux.function("l", "sendmsg", "ipi")


class Unfit(Exception):
    """What cannot be done here, so that crun shall."""


def _mask(names):
    found = 0
    for name in names:
        if name not in CAPABILITIES:
            raise Unfit(name)
        found |= 1 << CAPABILITIES[name]
    return found


def _variables(texts):
    """As putenv(3) leaves them: the later of two values in the earlier one's place."""
    places, found = {}, []
    for text in texts:
        name, equals, _ = text.partition("=")
        if not equals:
            raise Unfit(text)
        if name in places:
            found[places[name]] = text
        else:
            places[name] = len(found)
            found.append(text)
    return found, places


class Program:
    """The ``process`` of a configuration, prepared for a child. Unfit for what is not carried out here."""

    def __init__(self, description, first=None):
        """``first`` is the description of the container's first process, if this is another one."""
        user = description["user"]
        self.arguments = description["args"]
        if not self.arguments or not self.arguments[0] or description.get("cwd", "/")[:1] != "/":
            raise Unfit("args or cwd")
        self.cwd = description.get("cwd", "/")
        self.uid, self.gid = user["uid"], user["gid"]
        self.groups = array.array("I", user.get("additionalGids", ()))
        self.umask = user.get("umask", 0o22)
        self.terminal = bool(description.get("terminal"))
        self.window = description.get("consoleSize")
        self.score = description.get("oomScoreAdj", 0)
        self.no_new_privileges = bool(description.get("noNewPrivileges"))
        found = description.get("capabilities")
        if found is None and first is not None:
            found = first.get("capabilities")
        self._capabilities(found or {})
        texts = description.get("env") or (first or {}).get("env", ())
        self.variables, places = _variables(texts)
        self.has_home = "HOME" in places
        self.path = self.variables[places["PATH"]][5:] if "PATH" in places else None
        self.limits = []
        for limit in description.get("rlimits", ()):
            name = limit["type"]
            if name not in LIMITS:
                raise Unfit(name)
            numbers = array.array("Q", [limit["soft"], limit["hard"]])
            self.limits.append((LIMITS[name], numbers, name))

    def _capabilities(self, found):
        masks = [_mask(found.get(name, ())) for name in ("effective", "permitted", "inheritable")]
        self.capability_sets = array.array(
            "I", [each & 0xFFFFFFFF for each in masks] + [each >> 32 for each in masks]
        )  # struct __user_cap_data_struct[2]
        bounding, ambient = _mask(found.get("bounding", ())), _mask(found.get("ambient", ()))
        numbers = range(len(CAPABILITIES))
        self.dropped = [number for number in numbers if not bounding >> number & 1]
        self.raised = [number for number in numbers if ambient >> number & 1]


class Channel:
    """What a child tells before its program runs: how it failed, and its terminal."""

    def __init__(self, errors, terminal):
        self.errors = errors  # closed by execve
        self.terminal = terminal  # a socket, -1 for none

    def fail(self, number, text):
        said = f"{number} {text}".encode()
        linux.write(self.errors, said, len(said))


_CAPABILITY_HEADER = array.array("I", [0x20080522, 0])  # version 3


def close_all_but(kept):
    """Close every descriptor beyond the standard streams but these."""
    low = 3
    for number in sorted(kept):
        if number >= low:
            if number > low:
                linux.syscall(linux.SYS_CLOSE_RANGE, low, number - 1, 0, 0, 0)
            low = number + 1
    linux.syscall(linux.SYS_CLOSE_RANGE, low, 0x7FFFFFFF, 0, 0, 0)


def make(child, channel, standard, flags, group):
    """Fork a process in a control group; it runs ``child()``, which does not come back. Its number.

    Unfit if the group takes no process, as one with groups of its own below it.
    """
    arguments = array.array("Q", [flags | _CLONE_INTO_CGROUP, 0, 0, 0, linux.SIGCHLD, 0, 0, 0, 0, 0, group])
    number = linux.syscall(linux.SYS_CLONE3, uctypes.addressof(arguments), 88, 0, 0, 0)
    if number == 0:
        try:
            for each in range(3):
                linux.duplicate(standard[each] if standard else linux.null, each)
            child()
        except OSError as error:
            channel.fail(error.args[0], error.args[1] if len(error.args) > 1 else "starting the process")
        except BaseException as error:
            channel.fail(linux.EIO, f"{type(error).__name__}: {error}")
        finally:
            linux.exit(1)
    if number < 0:
        error = os.errno()
        if error in (linux.EBUSY, linux.EOPNOTSUPP):
            raise Unfit("the control group")
        raise OSError(error, "making a process")
    return number


def join(first, namespaces, group, program, channel, standard):
    """Start a program beside the first process of a container, in its namespaces; its number."""
    there = linux.checked(
        linux.syscall(linux.SYS_PIDFD_OPEN, first, 0, 0, 0, 0), "finding the container's first process"
    )
    flags = 0
    for each in namespaces:
        flags |= NAMESPACES[each]
    kept = [each for each in (channel.errors, channel.terminal) if each >= 0]
    kept_before = kept + [there]

    def child():
        close_all_but(kept_before)
        set_limits(program)
        linux.checked(_setns(there, flags & ~NAMESPACES["pid"]), "entering the container's namespaces")
        close_all_but(kept)
        begin_session(program, channel)
        run(program)

    try:
        linux.checked(_setns(there, NAMESPACES["pid"]), "finding the container's PID namespace")
        try:
            return make(child, channel, standard, 0, group)
        finally:
            linux.checked(_setns(_own_pid_namespace, NAMESPACES["pid"]), "returning to the agent's PID namespace")
    finally:
        linux.close(there)


# What follows is done by the child.


def set_limits(program):
    for number, values, name in program.limits:
        linux.checked(_setrlimit(number, values), f"setrlimit `{name}`")


def begin_session(program, channel):
    """A session of its own, and its terminal, if it is to have one."""
    linux.set_session()
    if program.terminal:
        ours, theirs = _open_terminal()
        for number in range(3):
            linux.duplicate(theirs, number)
        linux.close(theirs)
        linux.ioctl(0, _TIOCSCTTY, None)
        if program.uid:
            linux.checked(_fchown(0, program.uid, 0xFFFFFFFF), "giving the terminal away")
        _send_descriptor(channel.terminal, ours)
        linux.close(ours)
        linux.close(channel.terminal)


def _open_terminal():
    """A pseudo-terminal of the container's own."""
    ours = linux.open_file("/dev/ptmx", linux.O_RDWR | _O_NOCTTY)
    number = array.array("i", [0])
    linux.checked(linux.ioctl(ours, _TIOCSPTLCK, number), "unlocking a terminal")
    linux.checked(linux.ioctl(ours, _TIOCGPTN, number), "naming a terminal")
    theirs = linux.ioctl(ours, _TIOCGPTPEER, linux.O_RDWR | _O_NOCTTY | linux.O_CLOEXEC)
    return ours, linux.checked(theirs, "opening a terminal")


def _send_descriptor(socket, descriptor):
    """With a message of one byte (unix(7), SCM_RIGHTS)."""
    data, control = bytearray(1), bytearray(24)
    control[0] = 20
    control[8] = control[12] = 1
    control[16:20] = descriptor.to_bytes(4, "little")
    vector = array.array("Q", [uctypes.addressof(data), 1])
    header = array.array("Q", [0, 0, uctypes.addressof(vector), 1, uctypes.addressof(control), len(control), 0])
    linux.checked(_sendmsg(socket, header, 0), "handing over the terminal")


def _change_directory(path):
    """False if that cannot be; OSError if it led out of the root."""
    if _chdir(path) < 0:
        return False
    where = bytearray(4096)
    linux.checked(linux.syscall(linux.SYS_GETCWD, uctypes.addressof(where), len(where), 0, 0, 0), f"chdir to `{path}`")
    if where[0] != 0x2F:
        raise OSError(linux.ENOENT, f"chdir to `{path}`: the current working directory is not in the container")
    return True


def _home(uid):
    """From the container's /etc/passwd (passwd(5))."""
    try:
        with open("/etc/passwd") as file:
            read = 0
            for line in file:
                read += len(line)
                words = line.rstrip("\n").split(":")
                if read > _MOST_OF_PASSWD:
                    break
                if len(words) == 7 and words[2] == str(uid):
                    return words[5]
    except (OSError, UnicodeError):
        pass  # crun, too, takes the root then
    return "/"


def _executable(path):
    """0, or why not."""
    if _access(path, _X_OK) < 0:
        return os.errno()
    try:
        return linux.EACCES if os.stat(path)[0] & _S_IFMT == _S_IFDIR else 0
    except OSError as error:
        return error.args[0]


def _find(program):
    """The file of the program, and 0; or why there is none."""
    name = program.arguments[0]
    if name[0] == ".":
        name = program.cwd + "/" + name
    if name[0] == "/":
        return name, _executable(name)
    if program.path is None:
        return name, linux.ENOENT
    problem = linux.ENOENT
    for directory in program.path.split(":"):
        path = f"{directory or '.'}/{name}"
        why = _executable(path)
        if why == 0:
            return path, 0
        if why == linux.EACCES:
            problem = why
    return name, problem


def run(program):
    """Become the program."""
    there = _change_directory(program.cwd)
    if not program.has_home:
        program.variables.append("HOME=" + _home(program.uid))
    path, problem = _find(program)
    if problem == linux.ENOENT:
        raise OSError(problem, f"executable file `{path}` not found in $PATH")
    linux.checked(_setgroups(len(program.groups), program.groups), "setgroups")
    for number in range(3):
        _fchown(number, program.uid, program.gid)  # not of every kind of file can it be
    _give_up(program)
    if problem:
        path, problem = _find(program)
        if problem:
            raise OSError(problem, f"exec: `{path}`")
    if not there and not _change_directory(program.cwd):
        raise OSError(os.errno(), f"chdir to `{program.cwd}`")
    _umask(program.umask)
    _signal(linux.SIGPIPE, None)
    linux.unblock_signals()
    linux.execute(path, program.arguments, program.variables)
    raise OSError(os.errno(), f"exec `{path}`")


def _give_up(program):
    """Become the user with the capabilities that are wanted (capabilities(7))."""
    prctl, checked = linux.prctl, linux.checked
    for number in program.dropped:
        if prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0 and os.errno() != linux.EINVAL:
            raise OSError(os.errno(), "prctl drop bounding")
    checked(prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    checked(_setresgid(program.gid, program.gid, program.gid), f"setresgid to {program.gid}")
    checked(_setresuid(program.uid, program.uid, program.uid), f"setresuid to {program.uid}")
    sets, header = uctypes.addressof(program.capability_sets), uctypes.addressof(_CAPABILITY_HEADER)
    checked(linux.syscall(linux.SYS_CAPSET, header, sets, 0, 0, 0), "capset")
    for number in program.raised:
        if prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, number, 0, 0) < 0 and os.errno() not in (linux.EINVAL, linux.EPERM):
            raise OSError(os.errno(), "prctl ambient raise")
    if program.no_new_privileges:
        checked(prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")


_own_pid_namespace = linux.open_file("/proc/self/ns/pid", linux.O_RDONLY)
