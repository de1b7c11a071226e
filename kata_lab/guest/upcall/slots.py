"""virtio-mmio slots, which the device tree declares at boot, and which are filled and emptied while the guest runs.

The probe of an empty slot ended without a driver (DeviceID 0; virtio 1.2, 4.2.2); binding the driver tries it again.
Binding and unbinding through sysfs return when probe and removal are over (drivers/base/bus.c), as the kernel's loading
of a module does for the devices that its driver takes: nothing here has to wait.

A device is in use, and stays (EBUSY), when it is a disk that is mounted, swapped on or held by another device, which
shows in that it cannot be opened exclusively (open(2), O_EXCL); when it is a shared directory that any process has
mounted; and when it is the socket device, over which the requests come. A network interface is taken down by its
removal. Left out: a disk that a program has merely opened is removed under it; it gets EIO.
"""

import errno
import os

import ffi

_DEVICES = "/sys/bus/platform/devices/"
_DRIVER = "/sys/bus/platform/drivers/virtio-mmio/"
_SHARES = "/sys/fs/virtiofs"
_BLOCK, _SOCKET, _FS = 2, 19, 26
_EBUSY = 16  # MicroPython's errno has no name for it
_O_EXCL, _O_CLOEXEC = 0o200, 0o2000000

_libc = ffi.open("libc.so.6")
_open = _libc.func("i", "open", "sii")
_close = _libc.func("i", "close", "i")


def _exists(path):
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def _read(path, mode="r"):
    with open(path, mode) as file:
        return file.read()


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def _find(base, size, irq):
    """The platform device of a slot. ENODEV if there is none, EINVAL if it has another size or interrupt."""
    name = f"{base:x}.virtio_mmio"
    if not _exists(_DEVICES + name):
        raise OSError(errno.ENODEV)
    node = _DEVICES + name + "/of_node/"
    if _exists(node):
        told = base.to_bytes(8, "big") + size.to_bytes(8, "big"), irq.to_bytes(4, "big")
        if (_read(node + "reg", "rb"), _read(node + "interrupts", "rb")) != told:
            raise OSError(errno.EINVAL)
    return name


def _virtio_devices(name):
    """Directories in sysfs of what a slot holds: one if it is filled."""
    slot = _DEVICES + name
    return [f"{slot}/{entry[0]}" for entry in os.ilistdir(slot) if entry[0].startswith("virtio")]


def add(base, size, irq):
    """Find what is in a slot, and its driver. ENODEV if it is empty, EEXIST if that was found before."""
    name = _find(base, size, irq)
    if _exists(_DEVICES + name + "/driver"):
        raise OSError(errno.EEXIST)
    _write(_DRIVER + "bind", name)
    try:
        for device in _virtio_devices(name):
            _drive(device)
    except OSError:
        _write(_DRIVER + "unbind", name)
        raise


def _drive(device):
    """EIO if no driver takes the device, EOPNOTSUPP if the guest has none for it."""
    if _exists(device + "/driver"):
        return
    if os.system("modprobe -q " + _read(device + "/modalias").strip()) != 0:
        raise OSError(errno.EOPNOTSUPP)
    if not _exists(device + "/driver"):
        raise OSError(errno.EIO)


def remove(base, size, irq):
    """Take the driver from what is in a slot. ENODEV if none has it, EBUSY if it is in use."""
    name = _find(base, size, irq)
    if not _exists(_DEVICES + name + "/driver"):
        raise OSError(errno.ENODEV)
    claims = []
    try:
        for device in _virtio_devices(name):
            _claim(device, claims)
        _write(_DRIVER + "unbind", name)
    finally:
        for claim in claims:
            _close(claim)


def _claim(device, claims):
    """Keep others from beginning to use a device; EBUSY if somebody does already."""
    kind = int(_read(device + "/device"), 16)
    if kind == _SOCKET or (kind == _FS and _is_mounted(device)):
        raise OSError(_EBUSY)
    if kind == _BLOCK and _exists(device + "/block"):
        for disk in os.listdir(device + "/block"):
            claim = _open("/dev/" + disk, _O_EXCL | _O_CLOEXEC, 0)
            if claim < 0:
                raise OSError(os.errno())
            claims.append(claim)


def _is_mounted(device):
    """Whether any process sees a mount of this shared directory."""
    own = os.stat(device)[1]
    tags = [
        _read(f"{_SHARES}/{share}/tag").strip()
        for share in (os.listdir(_SHARES) if _exists(_SHARES) else ())
        if os.stat(f"{_SHARES}/{share}/device")[1] == own
    ]
    marks = [f" - virtiofs {tag} " for tag in tags]
    seen = set()
    return any(_sees_mount(entry[0], marks, seen) for entry in os.ilistdir("/proc") if entry[0].isdigit())


def _sees_mount(process, marks, seen):
    try:
        space = os.stat(f"/proc/{process}/ns/mnt")[1]
        if space in seen:
            return False
        seen.add(space)
        with open(f"/proc/{process}/mountinfo") as mounts:
            return any(mark in line for line in mounts for mark in marks)
    except OSError:
        return False  # it has just ended
