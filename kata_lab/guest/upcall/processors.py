"""CPUs of a guest that are present, and are brought up and taken down through sysfs.

The kernel's side is Documentation/core-api/cpu_hotplug.rst: a write to ``online`` returns when the CPU is up, or down.
"""

import errno

_ROOT = "/sys/devices/system/cpu"


def _numbers(name):
    """CPUs of a list such as ``0-2,5``, in order."""
    with open(_ROOT + "/" + name) as file:
        parts = file.read().strip().split(",")
    found = []
    for part in parts:
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found


def _switch(cpu, on):
    with open(f"{_ROOT}/cpu{cpu}/online", "w") as file:
        file.write("1" if on else "0")


def _switch_all(cpus, on):
    """All of them, or none."""
    done = []
    try:
        for cpu in cpus:
            _switch(cpu, on)
            done.append(cpu)
    except OSError:
        for cpu in reversed(done):
            try:
                _switch(cpu, not on)
            except OSError as error:
                print(f"kata-lab: cpu{cpu} cannot be brought back: errno {error.args[0]}")
        raise


def add(count):
    """Bring the next ``count`` up that are down; the index of the last. ENODEV if there are not so many."""
    online = _numbers("online")
    chosen = [cpu for cpu in _numbers("present") if cpu not in online][:count]
    if count < 1:
        raise OSError(errno.EINVAL)
    if len(chosen) < count:
        raise OSError(errno.ENODEV)
    _switch_all(chosen, True)
    return chosen[-1]


def remove(count):
    """Take the ``count`` highest down; the index of the last. EINVAL if CPU 0 would be among them."""
    chosen = [cpu for cpu in reversed(_numbers("online")) if cpu != 0][:count]
    if count < 1 or len(chosen) < count:
        raise OSError(errno.EINVAL)
    _switch_all(chosen, False)
    return chosen[-1]
