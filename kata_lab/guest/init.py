#!/usr/bin/micropython
"""PID 1 of a guest: mounts, loads modules, starts services in order, reaps, and shuts down cleanly.

Runs in MicroPython 1.25 (unix port) with its ``ffi`` module over the C library. What to do is in
``/etc/kata-lab/init.json``, which the image builder writes: modules in the order of their dependencies, services in the
order of theirs. Then the drivers of those virtio devices are loaded that are present: each tells its name in sysfs
(``modalias``, as ``virtio:d00000002vFFFFFFFF``), ``modules.alias`` has the module for it, and ``modules.dep`` what that
needs first.

An initramfs first becomes a mount of its own, since pivot_root(2), with which container runtimes change roots, refuses
the kernel's rootfs. The small initramfs of an image on a disk has nothing to start: there init loads the modules for
the disk, mounts it, empties the initramfs, and gives way to the init that is on the disk. The kernel's side is
Documentation/filesystems/ramfs-rootfs-initramfs.rst (PID 1 never exits) and reboot(2). Signals are busybox's: SIGUSR2
powers off, SIGUSR1 halts, SIGTERM resets. Words on the kernel command line: ``kata.run="…"`` or ``kata.run.base64=…``
runs a shell command after the services are up and powers off, ``kata.poweroff`` powers off at once; ``root=…`` names
the disk with the root (``/dev/vda`` if not said), and ``kata.changes=…`` a disk with an ext4 which keeps changes that
are kept in memory otherwise. Leaves out run levels, sockets that start services, and logins.
"""

import array
import json
import os
import sys
import time

import ffi
import uctypes

CONFIGURATION = "/etc/kata-lab/init.json"
INTERPRETER = "/usr/bin/micropython"
UP = "kata-lab: services are up"
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=vt100", "PS1=kata-lab:\\w# ")

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_MOVE = 1, 2, 4, 8, 0x20, 0x1000, 0x2000
MOUNTS = (
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
EBUSY, EEXIST = 16, 17
MODULES = "/lib/modules/"
NEW_ROOT = "/mnt"
ROOT_DISK = "/dev/vda"
VIRTIO_DEVICES = "/sys/bus/virtio/devices"
AF_INET, SOCK_DGRAM, SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 2, 2, 0x8914, 0x1, 0x40

SIGINT, SIGKILL, SIGUSR1, SIGUSR2, SIGTERM, SIGCHLD = 2, 9, 10, 12, 15, 17
SIG_BLOCK, SIG_SETMASK = 0, 2
WNOHANG = 1
ENDINGS = {SIGUSR2: 0x4321FEDC, SIGUSR1: 0xCDEF0123, SIGTERM: 0x01234567, SIGINT: 0x01234567}  # reboot(2)

GRACE_MS = 2000
RESTART_MS = (100, 5000)  # the first and the longest wait before a service is started again
STEADY_MS = 10000  # a service that ran so long begins again with the first wait

_libc = ffi.open("libc.so.6")
_mount = _libc.func("i", "mount", "sssLs")
_chroot = _libc.func("i", "chroot", "s")
_syscall = _libc.func("l", "syscall", "lisi")
_open = _libc.func("i", "open", "sii")
_close = _libc.func("i", "close", "i")
_dup2 = _libc.func("i", "dup2", "ii")
_fork = _libc.func("i", "fork", "")
_execve = _libc.func("i", "execve", "sPP")
_exit = _libc.func("v", "_exit", "i")
_waitpid = _libc.func("i", "waitpid", "ipi")
_kill = _libc.func("i", "kill", "ii")
_setsid = _libc.func("i", "setsid", "")
_sigprocmask = _libc.func("i", "sigprocmask", "ipp")
_sigtimedwait = _libc.func("i", "sigtimedwait", "ppp")
_sync = _libc.func("v", "sync", "")
_reboot = _libc.func("i", "reboot", "I")
_sethostname = _libc.func("i", "sethostname", "sL")
_socket = _libc.func("i", "socket", "iii")
_ioctl = _libc.func("i", "ioctl", "iLp")

_signals = bytearray(128)
_signals[0:8] = sum(1 << (number - 1) for number in (SIGINT, SIGUSR1, SIGUSR2, SIGTERM, SIGCHLD)).to_bytes(8, "little")
_no_signals = bytearray(128)


class Service:
    """One service and the process that it is now. ``process`` is 0 while there is none."""

    def __init__(self, description):
        self.name = description["name"]
        self.command = description["command"]
        self.restart = description["restart"]
        self.once = description["once"]
        self.process = 0
        self.status = 0
        self.started = 0
        self.due = None
        self.wait = RESTART_MS[0]

    def start(self):
        self.due = None
        self.started = time.ticks_ms()
        self.process = spawn(self.command)

    def ended(self, status):
        """Note how its process ended, and when it is to be started again."""
        self.process = 0
        self.status = status
        if self.restart == "always" or (self.restart == "on-failure" and status != 0):
            if time.ticks_diff(time.ticks_ms(), self.started) > STEADY_MS:
                self.wait = RESTART_MS[0]
            self.due = time.ticks_add(time.ticks_ms(), self.wait)
            self.wait = min(self.wait * 2, RESTART_MS[1])
        if status != 0 and self.restart != "stopped":
            say(f"service {self.name} ended with status {status}")


def say(text):
    print("kata-lab: " + text)


def make_directory(path):
    try:
        os.mkdir(path)
    except OSError as error:
        if error.args[0] != EEXIST:
            raise


def mount_all():
    for source, place, kind, flags, options in MOUNTS:
        try:
            make_directory(place)
        except OSError:
            continue  # below a read-only root, or a kernel without this file system
        if _mount(source, place, kind, flags, options) != 0 and os.errno() != EBUSY:
            say(f"{place} cannot be mounted")


def succeed(result, what):
    if result != 0:
        raise OSError(os.errno(), what)


def enter(place):
    """Make a mount the root, as switch_root(8) does."""
    os.chdir(place)
    succeed(_mount(".", "/", None, MS_MOVE, None), "the new root cannot be moved to /")
    succeed(_chroot("."), "the new root cannot be entered")
    os.chdir("/")


def leave_rootfs():
    """Give the files of the initramfs a mount of their own: not one is copied."""
    succeed(_mount("/", NEW_ROOT, None, MS_BIND, None), "the initramfs cannot be mounted")
    enter(NEW_ROOT)


def remove_all(directory, kept):
    """Remove files and directories, to free their memory, but not below ``kept``."""
    for entry in os.ilistdir(directory):
        path = directory.rstrip("/") + "/" + entry[0]
        if path in kept or entry[0] in (".", ".."):
            continue
        if entry[1] == 0x4000:
            remove_all(path, kept)
        else:
            os.remove(path)


def start_from_disk(configuration):
    """Mount the root that is on a disk, and become the init there."""
    for source, place, kind, flags, options in MOUNTS:
        if place in ("/proc", "/dev"):
            succeed(_mount(source, place, kind, flags, options), f"{place} cannot be mounted")
    load_modules(configuration["modules"], configuration["finit_module"])
    disk = word_of("root", first_line("/proc/cmdline")) or ROOT_DISK
    succeed(_mount(disk, NEW_ROOT, configuration["root"], MS_RDONLY, None), f"the root cannot be mounted from {disk}")
    for place in ("/proc", "/dev"):
        succeed(_mount(place, NEW_ROOT + place, None, MS_MOVE, None), f"{place} cannot be moved to the root")
    remove_all("/", (NEW_ROOT, "/proc", "/dev"))
    enter(NEW_ROOT)
    arguments, _kept = c_strings(["/init"])
    environment, _kept_too = c_strings(ENVIRONMENT)
    _execve("/init", uctypes.addressof(arguments), uctypes.addressof(environment))
    raise OSError(os.errno(), f"{disk} has no /init that can be run")


def word_of(name, line):
    """The value of a word ``name=value`` on the kernel command line, "" for none."""
    for word in line.split():
        if word.startswith(name + "="):
            return word[len(name) + 1 :]
    return ""


def overlay(paths, disk):
    """Make directories of a read-only root writable: changes go to memory, or to a disk."""
    changes = "/run/kata-lab-changes"
    if paths:
        make_directory(changes)
    if paths and disk and _mount(disk, changes, "ext4", MS_NOSUID | MS_NODEV, None) != 0:
        say(f"changes are kept in memory, since {disk} cannot be mounted as ext4")
    for path in paths:
        base = f"{changes}/{path.strip('/').replace('/', '-')}"
        for place in (base, base + "/upper", base + "/work"):
            make_directory(place)
        options = f"lowerdir={path},upperdir={base}/upper,workdir={base}/work"
        if _mount("overlay", path, "overlay", MS_NOSUID | MS_NODEV, options) != 0:
            say(f"{path} cannot be made writable")


def protect(path):
    """Make a program unchangeable where it is run from, also for whom it is his own: see /proc/<n>/exe in proc(5)."""
    if _mount(path, path, None, MS_BIND, None) != 0 or (
        _mount(None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID, None) != 0
    ):
        say(f"{path} cannot be protected")


def load_modules(paths, finit_module):
    """Load module files in this order; one that the kernel has already is well."""
    for path in paths:
        descriptor = _open(path, 0, 0)
        loaded = descriptor >= 0 and (_syscall(finit_module, descriptor, "", 0) == 0 or os.errno() == EEXIST)
        if descriptor >= 0:
            _close(descriptor)
        if not loaded:
            say(f"module {path} cannot be loaded")


def first_line(path):
    with open(path) as file:
        return file.readline().strip()


def load_drivers(finit_module):
    """Load the drivers of the virtio devices that the machine has, as modprobe would."""
    try:
        devices = sorted(entry[0] for entry in os.ilistdir(VIRTIO_DEVICES))
    except OSError:
        return  # no bus of that name: virtio_mmio is not loaded
    if not devices:
        return
    names = [first_line(f"{VIRTIO_DEVICES}/{device}/modalias") for device in devices]
    base = MODULES + first_line("/proc/sys/kernel/osrelease")
    wanted = []
    with open(base + "/modules.alias") as file:
        for line in file:
            words = line.split()  # alias virtio:d00000002v* virtio_blk
            if any(name.startswith(words[1].rstrip("*")) for name in names):
                wanted.append(words[2])
    loaded = set()
    with open(base + "/modules.dep") as file:
        for line in file:
            path, _, needed = line.partition(":")  # kernel/…/virtio_net.ko: kernel/…/net_failover.ko kernel/…
            if path.split("/")[-1].split(".")[0].replace("-", "_") not in wanted:
                continue
            for each in reversed(f"{path} {needed}".split()):
                if each not in loaded:
                    loaded.add(each)
                    load_modules([f"{base}/{each}"], finit_module)


def bring_up_loopback():
    descriptor = _socket(AF_INET, SOCK_DGRAM, 0)
    request = bytearray(40)  # struct ifreq: 16 bytes of name, then flags
    request[0:2] = b"lo"
    request[16] = IFF_UP | IFF_RUNNING
    if descriptor < 0 or _ioctl(descriptor, SIOCSIFFLAGS, request) != 0:
        say("the loopback interface cannot be brought up")
    if descriptor >= 0:
        _close(descriptor)


def c_strings(texts):
    """A NULL-terminated array of C strings, and what must stay alive with it."""
    kept = [text.encode() + b"\0" for text in texts]
    return array.array("Q", [uctypes.addressof(each) for each in kept] + [0]), kept


def spawn(command):
    """Start a program in a session of its own; its process."""
    arguments, _kept = c_strings(command)
    environment, _kept_too = c_strings(ENVIRONMENT)
    process = _fork()
    if process == 0:
        _sigprocmask(SIG_SETMASK, _no_signals, None)
        _setsid()
        _execve(command[0], uctypes.addressof(arguments), uctypes.addressof(environment))
        say(f"{command[0]} cannot be run")
        _exit(127)
    return process


def next_signal(timeout_ms):
    """The number of the next signal, negative if none came in time."""
    timeout = array.array("q", [timeout_ms // 1000, timeout_ms % 1000 * 1000000])
    return _sigtimedwait(_signals, None, timeout)


def reap():
    """Processes that have ended, as (process, exit status); a signal counts as 128 + its number, as in a shell."""
    word = array.array("i", [0])
    while True:
        process = _waitpid(-1, word, WNOHANG)
        if process <= 0:
            return
        how = word[0]
        yield process, how >> 8 & 0xFF if how & 0x7F == 0 else 128 + (how & 0x7F)


class Init:
    """The services, and a wish to end once somebody has one."""

    def __init__(self, services):
        self.services = services
        self.ending = None

    def turn(self, timeout_ms):
        """Wait for a signal and do what it asks for; returns the processes that have ended."""
        number = next_signal(max(timeout_ms, 0))
        if number in ENDINGS:
            self.ending = ENDINGS[number]
        ended = dict(reap())
        for service in self.services:
            if service.process in ended:
                service.ended(ended[service.process])
        return ended

    def wait_for(self, process):
        """Until a process has ended; its status, or None if the guest shall end first."""
        while self.ending is None:
            ended = self.turn(1000)
            if process in ended:
                return ended[process]
            self.start_due()
        return None

    def start_due(self):
        """Start what is due; milliseconds until the next is."""
        wait = 60000
        for service in self.services:
            if service.due is not None:
                left = time.ticks_diff(service.due, time.ticks_ms())
                if left <= 0:
                    service.start()
                else:
                    wait = min(wait, left)
        return wait

    def start_all(self):
        failed = 0
        for service in self.services:
            if self.ending is not None:
                return
            service.start()
            if service.once:
                status = self.wait_for(service.process)
                failed += status != 0
        if failed:
            say(f"{failed} services failed")
        else:
            print(UP)

    def stop_all(self):
        """Ask services to end in the opposite order, then end everything."""
        for service in self.services:
            service.restart = "stopped"
            service.due = None
        for service in reversed(self.services):
            if service.process:
                self.stop(service)
        _kill(-1, SIGKILL)
        _sync()

    def stop(self, service):
        deadline = time.ticks_add(time.ticks_ms(), GRACE_MS)
        _kill(service.process, SIGTERM)
        # An interactive shell ignores SIGTERM and ends when its terminal does.
        _kill(service.process, 1)
        while service.process and time.ticks_diff(deadline, time.ticks_ms()) > 0:
            self.turn(100)
        if service.process:
            _kill(service.process, SIGKILL)


def wanted_command(line):
    """What the kernel command line asks for: a shell command, "" for none, None to power off at once."""
    padded = " " + line.strip() + " "
    if " kata.run.base64=" in padded:
        import binascii

        return binascii.a2b_base64(padded.split(" kata.run.base64=")[1].split(" ")[0]).decode()
    if ' kata.run="' in padded:
        return padded.split(' kata.run="')[1].split('"')[0]
    if " kata.run=" in padded:
        return padded.split(" kata.run=")[1].split(" ")[0]
    return None if " kata.poweroff " in padded else ""


def main():
    with open(CONFIGURATION) as file:
        configuration = json.load(file)
    if "root" in configuration:
        start_from_disk(configuration)
    _sigprocmask(SIG_BLOCK, _signals, None)
    if configuration["format"] == "initramfs":
        leave_rootfs()
    mount_all()
    line = first_line("/proc/cmdline")
    load_modules(configuration["modules"], configuration["finit_module"])
    load_drivers(configuration["finit_module"])
    overlay(configuration["writable"], word_of("kata.changes", line))
    protect(INTERPRETER)
    bring_up_loopback()
    _sethostname(configuration["name"], len(configuration["name"]))
    command = wanted_command(line)
    shell_instead = command == ""
    init = Init([Service(each) for each in configuration["services"] if shell_instead or not each["console"]])
    init.start_all()
    if command:
        status = init.wait_for(spawn(["/bin/sh", "-c", command]))
        say(f"exit status {0 if status is None else status}")
    if not shell_instead and init.ending is None:
        init.ending = ENDINGS[SIGUSR2]
    while init.ending is None:
        init.turn(init.start_due())
    init.stop_all()
    _reboot(init.ending)


try:
    main()
except BaseException as error:
    sys.print_exception(error)
    say("init has failed; the guest resets")
    _sync()
    _reboot(ENDINGS[SIGTERM])
