"""``kata-lab doctor``: what this machine can do, and what to do about what it cannot.

Each check looks, compiles nothing and fetches nothing. Its verdict is one of

=========  ===================================================================
ok         it is there
note       the lab runs without it; the advice tells what it would bring
missing    the lab cannot run; the advice tells what to do
=========  ===================================================================

The last line is one sentence: what this machine lacks, and what works all the same. Leaves out whether the network
answers, since only a build of a guest shows that; whether a route leads out of this machine is looked at.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kata_lab.errors import KataLabError

MIB = 1 << 20
LEAST_MEMORY = 512 * MIB  #: the process with a guest of 256 MiB, and room to compile
COURSE_MEMORY = 1536 * MIB  #: Jupyter, and one notebook of the course with its guests
LEAST_DISK = 1024 * MIB  #: packages, the built guest and compiled code take about 350 MiB
LEAST_PYTHON = (3, 11)

_KVM_API_VERSION = 12
_KVM_GET_API_VERSION = 0xAE00
_ROUTE_IS_UP, _ROUTE_REJECTS = 0x1, 0x200  # RTF_UP of route(8), RTF_REJECT
_UNLIMITED = 1 << 60  # a cgroup's "no limit" is written as a very large number in version 1


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        verdict: "ok", "note" or "missing".
        found: what there is, for a person.
        advice: what to do about it; empty if nothing need be done.
        lack: in a few words, what many machines have and this one does not; empty if that is nothing.
    """

    name: str
    verdict: str
    found: str
    advice: str = ""
    lack: str = ""


def run(as_json: bool) -> int:
    """Print all checks; 0 if the lab can run, else 1."""
    found = tuple(examine())
    ready = all(check.verdict != "missing" for check in found)
    if as_json:
        print(
            json.dumps(
                {"ready": ready, "checks": [asdict(check) for check in found], "summary": sentence(found)}, indent=1
            )
        )
    else:
        width = max(len(check.name) for check in found)
        for check in found:
            print(f"{check.verdict:8} {check.name:{width}}  {check.found}")
            if check.advice:
                print(f"{'':8} {'':{width}}  → {check.advice}")
        print(sentence(found))
    return 0 if ready else 1


def sentence(found: Sequence[Check]) -> str:
    """What the machine lacks, and what works all the same."""
    missing = [check.name for check in found if check.verdict == "missing"]
    if missing:
        return f"this machine cannot run the lab yet: see what is said of {_listed(missing)}"
    lacks = {check.name: check.lack for check in found if check.lack}
    if not lacks:
        return "this machine can run the lab"
    works = []
    if "KVM" in lacks or "user" in lacks:
        works.append("guests run on a CPU that is compiled into this process")
    unbuilt = any(check.name == "guests" and check.verdict == "note" for check in found)
    if "network" in lacks and unbuilt:
        works.append("machines boot, but the guests of sandboxes have to come from a bundle")
    elif "network" in lacks:
        works.append("the guests that are built run, and others, such as those of 02-build-a-guest, cannot be built")
    if "memory" in lacks:
        works.append("notebooks run one at a time, so shut a kernel down before you open the next one")
    if "processors" in lacks:
        works.append("vCPUs take turns")
    return f"this machine can run the lab, with {_listed(list(lacks.values()))}: {'; '.join(works)}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def examine(root: Path = Path("/")) -> Iterator[Check]:
    """Look at everything; ``root`` is where /proc, /sys and /dev are."""
    yield check_python()
    yield check_engine()
    yield from check_compiled_code()
    yield check_kvm(root / "dev/kvm")
    yield check_user()
    yield check_network(root)
    yield check_processors(root)
    yield check_memory(root)
    yield from check_places()
    yield from check_guest()
    yield check_course()
    yield from check_programs()
    yield check_qemu()


def check_python(version: tuple[int, int, int] = sys.version_info[:3]) -> Check:
    """The interpreter."""
    found = f"{platform.python_implementation()} {'.'.join(map(str, version))}"
    if version < LEAST_PYTHON:
        return Check("Python", "missing", found, "install Python 3.11 or newer and make the environment anew with it")
    return Check("Python", "ok", found)


def check_engine(find: Callable[[str], object] = importlib.util.find_spec) -> Check:
    """What compiles the CPU."""
    absent = [name for name in ("numba", "llvmlite", "numpy") if find(name) is None]
    if absent:
        advice = f"install {' and '.join(absent)} into this environment: pip install {' '.join(absent)}"
        return Check("engine", "missing", f"no {', no '.join(absent)}", advice)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numba", "llvmlite", "numpy"))
    return Check("engine", "ok", f"rv64 on {platform.machine()}: {versions}")


def check_compiled_code() -> Iterator[Check]:
    """Whether the CPU was compiled since its sources changed; the loader itself looks closer, at compiler and host."""
    import vmm.cache
    import vmm.engine.rv64

    sources = Path(vmm.engine.rv64.__file__).parent.glob("*.py")
    newest_source = max(source.stat().st_mtime for source in sources)
    try:
        compiled = max((vmm.cache.cache_directory() / "code").glob("hart-*.o"), key=lambda file: file.stat().st_mtime)
        made = compiled.stat()
    except (ValueError, OSError):
        yield Check("compiled CPU", "note", "not compiled yet", "the first boot compiles it, which takes 10 to 20 s")
        return
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(made.st_mtime))
    if made.st_mtime < newest_source:
        advice = "if that changed the code, the next boot compiles it anew, which takes 10 to 20 s"
        yield Check("compiled CPU", "note", f"compiled {day}, older than its sources", advice)
    else:
        yield Check("compiled CPU", "ok", f"compiled {day}, {made.st_size / 1024:.0f} KiB")


def check_kvm(device: Path) -> Check:
    """Whether this process may use KVM, and if not why."""
    without, lack = "nothing need be done: the lab runs its CPU in this process instead", "no KVM"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Check("KVM", "note", f"no {device}: no virtualization, or its module is not loaded", without, lack)
    except PermissionError:
        return Check("KVM", "note", f"{device} is not yours to open", f"join its group (often kvm), or {without}", lack)
    except OSError as error:
        return Check("KVM", "note", f"{device} cannot be opened: {error.strerror}", without, lack)
    import fcntl

    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION)
    except OSError as error:
        return Check("KVM", "note", f"{device} does not answer: {error.strerror}", without, lack)
    finally:
        os.close(descriptor)
    if version != _KVM_API_VERSION:
        return Check("KVM", "note", f"{device} speaks API {version}, not {_KVM_API_VERSION}", without, lack)
    return Check("KVM", "ok", f"{device} can be opened, API {version}")


def check_user(effective: int | None = None) -> Check:
    """Who runs this; nothing of the lab needs to be root."""
    number = os.geteuid() if effective is None else effective
    if number == 0:
        return Check("user", "ok", "root")
    return Check("user", "ok", f"number {number}, not root, which nothing here needs", lack="no root")


def check_network(root: Path) -> Check:
    """Whether a route leads out of this machine (proc_net(5): IPv4's and IPv6's tables, in hexadecimal)."""
    if _leads_out(root / "proc/net/route", 1, 3, 7) or _leads_out(root / "proc/net/ipv6_route", 0, 8, 1):
        return Check("network", "ok", "a route leads out of this machine")
    advice = "what is built needs none; for the rest, install from a bundle that kata-lab lab bundle made elsewhere"
    return Check("network", "note", "no route leads out of this machine", advice, "no network")


def _leads_out(table: Path, destination: int, flags: int, mask: int) -> bool:
    """Whether a table has a default route; the numbers are those of its columns."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()]
    except OSError:
        return False
    for row in rows:
        with contextlib.suppress(ValueError, IndexError):  # the heading of IPv4's table
            state = int(row[flags], 16)
            usable = state & _ROUTE_IS_UP and not state & _ROUTE_REJECTS
            if usable and int(row[destination], 16) == int(row[mask], 16) == 0:
                return True
    return False


def check_processors(root: Path) -> Check:
    """Processors that this process may use, and a cgroup's share of them."""
    count = len(os.sched_getaffinity(0))
    found = f"{count} of {os.cpu_count()}"
    quota = min((share for share in _cpu_shares(root)), default=None)
    if quota is not None and quota < count:
        found += f", a cgroup allows {quota:g}"
        count = max(int(quota), 1)
    if count < 2:
        return Check("processors", "note", found, "guests with several vCPUs run, but take turns", "one processor")
    return Check("processors", "ok", found)


def check_memory(root: Path) -> Check:
    """Memory that can still be had: of the machine, and of the cgroups that this process is in."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        total = int(fields["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return Check("memory", "note", "unknown: the host does not tell", "have 1 GiB free")
    found = f"{available // MIB:,} of {total // MIB:,} MiB available"
    left = min((limit - used for limit, used in _memory_limits(root)), default=None)
    if left is not None and left < available:
        available = left
        found += f", a cgroup leaves {left // MIB:,} MiB"
    if available < LEAST_MEMORY:
        return Check(
            "memory", "missing", found, f"have {LEAST_MEMORY // MIB} MiB free: end programs or raise the limit"
        )
    if available < COURSE_MEMORY:
        advice = "run one notebook at a time, and shut its kernel down before you open the next"
        return Check("memory", "note", found, advice, f"{available // MIB:,} MiB of memory")
    return Check("memory", "ok", found)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's cgroups with a controller, innermost first (cgroups(7))."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
        place = top / path.lstrip("/")
        while True:
            if place.is_dir():
                yield place
            if place in (top, place.parent):
                break
            place = place.parent


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes, of each cgroup that has a limit; what was only read of files is given up when needed."""
    for place in _cgroups(root, "memory"):
        for limit_name, used_name, files_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                limit, used = int((place / limit_name).read_text()), int((place / used_name).read_text())
            except (OSError, ValueError):  # absent, or "max"
                continue
            if limit < _UNLIMITED:
                yield limit, used - _counted(place / "memory.stat", files_name)


def _counted(statistics: Path, name: str) -> int:
    """A number of a cgroup's statistics in bytes; 0 if it is not told."""
    try:
        return int(dict(line.split(" ", 1) for line in statistics.read_text().splitlines())[name])
    except (OSError, KeyError, ValueError):
        return 0


def _cpu_shares(root: Path) -> Iterator[float]:
    """Processors' worth of time that each cgroup with a limit allows."""
    for place in _cgroups(root, "cpu"):
        try:
            if (place / "cpu.max").exists():
                quota, period = map(int, (place / "cpu.max").read_text().split())
            else:
                quota = int((place / "cpu.cfs_quota_us").read_text())
                period = int((place / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        if quota > 0 and period > 0:
            yield quota / period


def check_places() -> Iterator[Check]:
    """The directories that the lab writes to, and the disk beneath the larger one."""
    from kata_lab.paths import cache_directory, state_directory

    try:
        cache = cache_directory()
    except KataLabError as error:
        yield Check("cache", "missing", "no cache directory", str(error))
    else:
        free = shutil.disk_usage(cache).free
        found = f"{cache}, {free // MIB:,} MiB free"
        if not os.access(cache, os.W_OK | os.X_OK):
            yield Check("cache", "missing", found, "make it writable, or set KATA_LAB_HOME to another directory")
        elif free < LEAST_DISK:
            yield Check("cache", "note", found, "350 MiB are needed to build the guest and to compile the CPU")
        else:
            yield Check("cache", "ok", found)
    try:
        state = state_directory()
    except KataLabError as error:
        yield Check("state", "missing", "no state directory", str(error))
        return
    if os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("KATA_LAB_HOME"):
        yield Check("state", "ok", str(state))
    else:
        yield Check("state", "ok", f"{state}, since XDG_RUNTIME_DIR is not set")


def check_guest() -> Iterator[Check]:
    """The boot guest; and, as it is built from packages, APT, a mirror and its keys."""
    release = _built_release()
    worst = "missing" if release is None else "note"
    if release is None:
        yield Check("boot guest", "note", "not built yet", "the first boot builds it, from 100 MB of packages")
    else:
        yield Check("boot guest", "ok", f"Linux {release}")
    yield check_apt(worst)
    yield _asked("Debian mirror", worst, _mirror)
    yield _asked("Debian keys", worst, _keyring)


def check_course() -> Check:
    """The guests of the notebooks."""
    from kata_lab.image.library import Library
    from kata_lab.lab.bundle_content import IMAGES

    try:
        built = Library().names()
    except KataLabError as error:
        return Check("guests", "missing", "unknown", str(error))
    absent = [name for name in IMAGES if name not in built]
    if absent:
        advice = "kata-lab lab prepare builds them now, else each is built when it is first needed"
        return Check("guests", "note", f"not built yet: {', '.join(absent)}", advice)
    return Check("guests", "ok", ", ".join(IMAGES))


def _built_release() -> str | None:
    """The kernel's release of the guest that was built last."""
    from kata_lab.paths import cache_directory

    try:
        manifests = (cache_directory() / "boot").glob("*/manifest.json")
        newest = max(manifests, key=lambda manifest: manifest.stat().st_mtime)
        return str(json.loads(newest.read_bytes())["release"])
    except (OSError, ValueError, KeyError, KataLabError):
        return None


def check_apt(worst: str, which: Callable[[str], str | None] = shutil.which) -> Check:
    """The programs that fetch packages; ``worst`` is the verdict if there are none."""
    absent = [name for name in ("apt-get", "apt-cache", "apt-config") if which(name) is None]
    if not absent:
        return Check("APT", "ok", which("apt-get") or "")
    advice = "build on a Debian or Ubuntu machine, and copy its cache directory here"
    return Check("APT", worst, f"no {', no '.join(absent)}", advice)


def _asked(name: str, worst: str, question: Callable[[], str]) -> Check:
    """What the image builder itself would find, or its own words about why not."""
    try:
        return Check(name, "ok", question())
    except KataLabError as error:
        return Check(name, worst, "none", str(error))


def _mirror() -> str:
    from kata_lab.image.mirror import find_mirror

    return find_mirror()


def _keyring() -> str:
    from kata_lab.image.apt import find_keyring

    return str(find_keyring())


def check_programs(which: Callable[..., str | None] = shutil.which) -> Iterator[Check]:
    """Programs that sandboxes use; system directories are searched as well, where a user's PATH often does not lead."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for name, package, use in (
        ("mke2fs", "e2fsprogs", "sandboxes need it for their disks"),
        ("passt", "passt", "networks of guests need it, where there is no tap"),
    ):
        found = which(name, path=path)
        if found is None:
            yield Check(name, "note", f"no {name}", f"{use}: install the package {package}")
        else:
            yield Check(name, "ok", found)


def check_qemu(which: Callable[[str], str | None] = shutil.which) -> Check:
    """The peer of the benchmarks."""
    from kata_lab.bench.peer import PROGRAM, install_advice

    found = which(PROGRAM)
    if found is None:
        return Check("QEMU", "note", f"no {PROGRAM}", f"only kata-lab bench and the tests need it: {install_advice()}")
    return Check("QEMU", "ok", found)
