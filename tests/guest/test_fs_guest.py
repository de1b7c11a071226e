"""virtio-fs under Linux's own driver: what programs in a guest do to a share is what the host has, and the reverse."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.shell import GuestShell, boot_image
from vmm import MicroVm
from vmm.config import FsConfig
from vmm.devices.virtio.fs.device import FsDevice
from vmm.devices.virtio.fs.protocol import Opcode

CACHES = ("none", "auto", "always")
SOURCE_FILES = 5000

# Random operations on one file against a model of it in memory, as fsx does; MicroPython, with libc through ffi.
RANDOM_OPERATIONS = r"""
import ffi, hashlib, os, sys, uctypes
libc = ffi.open("libc.so.6")
def function(result, name, arguments):
    called = libc.func(result, name, arguments)
    def call(*values):
        answer = called(*values)
        if answer == -1:
            raise OSError(os.errno(), name)
        return answer
    return call
c_open = function("i", "open", "sii")
c_close = function("i", "close", "i")
pread = function("l", "pread", "ipll")
pwrite = function("l", "pwrite", "ipll")
write = function("l", "write", "ipl")
ftruncate = function("i", "ftruncate", "il")
fallocate = function("i", "fallocate", "iill")
fsync = function("i", "fsync", "i")
rename = function("i", "rename", "ss")
mmap = function("l", "mmap", "lliiil")
munmap = function("i", "munmap", "ll")
RDWR, CREAT, APPEND, LIMIT = 2, 0o100, 0o2000, 200000
directory, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = seed
def pick(below):
    global state
    state = (state * 6364136223846793005 + 1442695040888963407) & 0xffffffffffffffff
    return (state >> 33) % below
def pattern(length):
    first = pick(251)
    return bytearray(bytes((first + each) % 251 for each in range(251)) * (length // 251 + 1))
def grow(size):
    if size > len(model):
        model.extend(bytes(size - len(model)))
def differs(what, got, wanted):
    print("step", step, what, "differs: seed", seed, "length", len(got), len(wanted))
    sys.exit(1)
model, path = bytearray(), directory + "/random"
file = c_open(path, RDWR | CREAT, 0o644)
for step in range(count):
    what, offset, length = pick(11), pick(LIMIT), pick(30000) + 1
    end = min(offset + length, len(model))
    if what <= 1:
        data = pattern(length)
        done = 0
        while done < length:
            done += pwrite(file, memoryview(data)[done:length], length - done, offset + done)
        grow(offset + length)
        model[offset : offset + length] = data[:length]
    elif what <= 3:
        buffer, done = bytearray(length), 0
        while (got := pread(file, memoryview(buffer)[done:], length - done, offset + done)) > 0:
            done += got
            if done == length:
                break
        if buffer[:done] != model[offset:end]:
            differs("read at %d" % offset, buffer[:done], model[offset:end])
    elif what == 4:
        size = pick(LIMIT)
        ftruncate(file, size)
        grow(size)
        model = model[:size]
    elif what == 5:
        fallocate(file, 0, offset, length)
        grow(offset + length)
    elif what == 6:
        fallocate(file, 3, offset, length)
        if offset < end:
            model[offset:end] = bytes(end - offset)
    elif what == 7:
        rename(path, path + "x")
        path += "x"
        if len(path) > 200:
            rename(path, directory + "/random")
            path = directory + "/random"
    elif what == 8:
        c_close(file)
        file = c_open(path, RDWR, 0)
        if os.stat(path)[6] != len(model):
            differs("size", bytes(os.stat(path)[6]), model)
    elif what == 9:
        more = c_open(path, RDWR | APPEND, 0)
        data = pattern(min(length, 5000))
        grown = min(length, 5000)
        write(more, data, grown)
        model.extend(data[:grown])
        c_close(more)
        if len(model) > 4 * LIMIT:
            ftruncate(file, 0)
            model = bytearray()
    elif model:
        start = min(offset, len(model) - 1) & ~4095
        size = min(len(model) - start, 20000)
        place = mmap(0, size, 3, 1, file, start)
        view = uctypes.bytearray_at(place, size)
        if view != model[start : start + size]:
            differs("mapping at %d" % start, view, model[start : start + size])
        if pick(2):
            data = pattern(size)
            view[:] = data[:size]
            model[start : start + size] = data[:size]
        munmap(place, size)
    if not pick(20):
        fsync(file)
c_close(file)
print(path.split("/")[-1], len(model), "".join("%02x" % each for each in hashlib.sha256(bytes(model)).digest()))
"""

# fcntl's locks between two processes, O_TMPFILE, and renameat2.
SYSTEM_CALLS = r"""
import ffi, os, struct, sys, time
libc = ffi.open("libc.so.6")
c_open = libc.func("i", "open", "sii")
fcntl = libc.func("i", "fcntl", "iip")
fork = libc.func("i", "fork", "")
waitpid = libc.func("i", "waitpid", "ipi")
leave = libc.func("v", "_exit", "i")
linkat = libc.func("i", "linkat", "isisi")
renameat2 = libc.func("i", "renameat2", "isisI")
write = libc.func("l", "write", "ipl")
SETLK, SETLKW, RDLCK, WRLCK, UNLCK, RDWR, CREAT, TMPFILE, HERE = 6, 7, 0, 1, 2, 2, 0o100, 0o20200000, -100
def lock(file, how, kind, start, length):
    return fcntl(file, how, bytearray(struct.pack("<hhiqqii", kind, 0, 0, start, length, 0, 0)))
directory = sys.argv[1]
file = c_open(directory + "/locked", RDWR | CREAT, 0o644)
assert lock(file, SETLK, WRLCK, 0, 100) == 0
child = fork()
if child == 0:
    mine = c_open(directory + "/locked", RDWR, 0)
    taken = lock(mine, SETLK, WRLCK, 50, 10) == -1 and os.errno() == 11
    free = lock(mine, SETLK, WRLCK, 100, 10) == 0
    write(mine, b"asks", 4)
    waited = lock(mine, SETLKW, WRLCK, 0, 100) == 0
    leave(7 if taken and free and waited else 1)
while not os.stat(directory + "/locked")[6]:
    time.sleep(0.05)
time.sleep(0.2)
assert lock(file, SETLK, UNLCK, 0, 100) == 0
status = bytearray(4)
waitpid(child, status, 0)
print("child", status[1])

file = c_open(directory, RDWR | TMPFILE, 0o640)
assert file >= 0, os.errno()
write(file, b"no name", 7)
before = len(os.listdir(directory))
assert linkat(HERE, "/proc/self/fd/%d" % file, HERE, directory + "/named", 0x400) == 0, os.errno()
print("linked", len(os.listdir(directory)) - before)

for name in ("one", "two"):
    with open(directory + "/" + name, "w") as out:
        out.write(name)
assert renameat2(HERE, directory + "/one", HERE, directory + "/two", 1) == -1 and os.errno() == 17
assert renameat2(HERE, directory + "/one", HERE, directory + "/two", 2) == 0, os.errno()
print("exchanged", open(directory + "/one").read(), open(directory + "/two").read())
"""


class Shares:
    """A guest with a share for each cache policy, and one that it may only read; mounted below /mnt."""

    def __init__(self, path: Path, vm: MicroVm, shell: GuestShell) -> None:
        self.path = path
        self.vm = vm
        self.shell = shell

    def run(self, command: str, timeout: float = 120.0) -> str:
        return self.shell.run(command, timeout, check=True).output

    def device(self, tag: str) -> FsDevice:
        device = self.vm.machine.device(tag)
        assert isinstance(device, FsDevice)
        return device


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shares]:
    path = tmp_path_factory.mktemp("shares")
    for tag in (*CACHES, "lower"):
        (path / tag).mkdir()
    (path / "lower" / "kept").mkdir()
    (path / "lower" / "kept" / "file").write_text("from the host\n")
    (path / "lower" / "gone").write_text("to be removed\n")
    devices = [FsConfig(name=tag, path=path / tag, tag=tag, cache=tag) for tag in CACHES]
    devices.append(FsConfig(name="lower", path=path / "lower", tag="lower", read_only=True))
    programs = {"root/random_operations.py": RANDOM_OPERATIONS, "root/system_calls.py": SYSTEM_CALLS}
    files = {name: text.encode() for name, text in programs.items()}
    with boot_image("toolbox", devices=devices, files=files) as (vm, shell):
        for tag in (*CACHES, "lower"):
            shell.run(f"mkdir -p /mnt/{tag} && mount -t virtiofs {tag} /mnt/{tag}", check=True)
        yield Shares(path, vm, shell)


def source_tree(files: int) -> bytes:
    """A tar archive that looks like a source tree: directories, small files, links of both kinds, programs."""
    dice = random.Random(5)
    regular = ""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for number in range(files):
            info = tarfile.TarInfo(f"tree/part{number // 100:02}/deep/file_{number}_{'x' * dice.randrange(60)}.c")
            info.mtime = 1_600_000_000 + number
            info.mode = dice.choice([0o644, 0o600, 0o755])
            if number % 50 == 1:
                info.type, info.linkname = tarfile.SYMTYPE, "file_0"
                archive.addfile(info)
            elif number % 50 == 2:
                info.type, info.linkname = tarfile.LNKTYPE, regular
                archive.addfile(info)
            else:
                regular = info.name
                data = dice.randbytes(dice.randrange(6000))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return whole.getvalue()


def host_hashes(tree: Path) -> dict[str, str]:
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.parametrize(("cache", "files"), [("none", 40), ("auto", SOURCE_FILES), ("always", 100)])
@pytest.mark.timeout(900)
def test_a_source_tree_is_the_same_on_both_sides(shares: Shares, cache: str, files: int) -> None:
    share = shares.path / cache
    (share / "tree.tar").write_bytes(source_tree(files))

    shares.run(f"cd /mnt/{cache} && tar xf tree.tar", timeout=400)
    found = shares.run(f"cd /mnt/{cache}/tree && find . -type f -exec sha256sum {{}} +", timeout=400)
    kinds = shares.run(f"cd /mnt/{cache}/tree && find . -exec stat -c '%n %f %h %Y %i' {{}} +", timeout=400)

    in_guest = dict(reversed(line.split("  ./", 1)) for line in found.splitlines())
    assert in_guest == host_hashes(share / "tree")
    assert len(in_guest) == files - (files + 48) // 50
    for line in kinds.splitlines():
        name, mode, links, changed, number = line.split(" ")
        status = os.lstat(share / "tree" / name)
        assert (int(mode, 16), int(links), int(number)) == (status.st_mode, status.st_nlink, status.st_ino)
        assert stat.S_ISDIR(status.st_mode) or int(changed) == int(status.st_mtime)
    with tarfile.open(share / "tree.tar") as archive:
        assert sum(1 for _ in (share / "tree").rglob("file_*")) == len(archive.getnames())

    shares.run(f"rm -r /mnt/{cache}/tree", timeout=400)
    assert os.listdir(share) == ["tree.tar"]
    (share / "tree.tar").unlink()
    shares.run("echo 3 > /proc/sys/vm/drop_caches")
    assert len(shares.device(cache).share.opened) == 0


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seed", [1, random.SystemRandom().randrange(1 << 31)], ids=["fixed", "random"])
def test_random_operations_agree_with_a_model(shares: Shares, cache: str, seed: int) -> None:
    print(f"seed {seed}")
    directory = f"{cache}/{seed}"
    (shares.path / directory).mkdir()

    ran = shares.shell.run(f"micropython /root/random_operations.py /mnt/{directory} {seed} 500", timeout=200)
    assert ran.status == 0, ran.output

    name, length, digest = ran.output.split()
    assert os.listdir(shares.path / directory) == [name]
    content = (shares.path / directory / name).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (int(length), digest)


@pytest.mark.parametrize("cache", CACHES)
def test_locks_nameless_files_and_exchanges(shares: Shares, cache: str) -> None:
    directory = shares.path / cache / "calls"
    directory.mkdir()

    output = shares.run(f"micropython /root/system_calls.py /mnt/{cache}/calls")

    assert output.splitlines() == ["child 7", "linked 1", "exchanged two one"]
    assert (directory / "named").read_bytes() == b"no name"
    assert stat.S_IMODE((directory / "named").stat().st_mode) == 0o640
    assert (directory / "one").read_text() == "two"


def test_flock_holds_between_host_and_guest(shares: Shares) -> None:
    path = shares.path / "auto" / "flocked"
    path.touch()
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert shares.shell.run("flock -n /mnt/auto/flocked true").status == 1
        shares.run(
            "(flock /mnt/auto/flocked echo granted > /mnt/auto/said) & while ! [ -e /mnt/auto/said ]; do :; done"
        )
        assert not (shares.path / "auto" / "said").read_text()
        fcntl.flock(file, fcntl.LOCK_UN)
    shares.run("while ! grep -q granted /mnt/auto/said; do sleep 0.1; done")
    assert shares.device("auto").requests[Opcode.SETLKW]


def test_extended_attributes_and_kinds_of_files(shares: Shares) -> None:
    directory = shares.path / "auto" / "kinds"
    directory.mkdir()
    shares.run("cd /mnt/auto/kinds && echo x > file && ln file hard && ln -s file soft && mkfifo fifo")
    shares.run(
        "cd /mnt/auto/kinds && setfattr -n user.color -v blue file && (cat fifo > got & echo through > fifo; wait)"
    )

    assert os.getxattr(directory / "file", "user.color") == b"blue"
    assert 'user.color="blue"' in shares.run("cd /mnt/auto/kinds && getfattr -d hard")
    assert (directory / "got").read_text() == "through\n"
    assert os.readlink(directory / "soft") == "file"
    assert (directory / "hard").stat().st_nlink == 2
    (directory / "file").write_text("changed on the host\n")
    assert shares.run("sleep 1.1; cat /mnt/auto/kinds/hard") == "changed on the host\n"


def test_programs_run_from_a_share(shares: Shares) -> None:
    for cache in CACHES:
        shares.run(f"cp /usr/bin/micropython /mnt/{cache}/program")
        assert shares.run(f"/mnt/{cache}/program -c 'print(6 * 7)'") == "42\n"


def test_a_user_of_the_guest_owns_what_it_makes_where_the_vmm_can(shares: Shares) -> None:
    directory = shares.path / "auto" / "users"
    directory.mkdir()
    directory.chmod(0o777)
    as_user = "setpriv --reuid 1234 --regid 1235 --clear-groups"
    shares.run(f"{as_user} sh -c 'cd /mnt/auto/users && umask 027 && echo x > file && mkdir directory'")

    owner = (1234, 1235) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for name, mode in (("file", 0o640), ("directory", 0o750)):
        status = (directory / name).stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (*owner, mode)
    refused = shares.shell.run("setpriv --reuid 99 --regid 99 --clear-groups cat /mnt/auto/users/file")
    assert "Permission denied" in refused.output


def test_a_read_only_share_under_an_overlay_is_a_container_root(shares: Shares) -> None:
    before = host_hashes(shares.path / "lower")
    assert "Read-only file system" in shares.shell.run("touch /mnt/lower/new").output

    shares.run(
        "mkdir -p /tmp/upper /overlay && mount -t tmpfs tmpfs /tmp/upper && mkdir /tmp/upper/u /tmp/upper/w"
        " && mount -t overlay overlay -o lowerdir=/mnt/lower,upperdir=/tmp/upper/u,workdir=/tmp/upper/w /overlay"
    )
    shares.run("cd /overlay && echo more >> kept/file && rm gone && mkdir new && mv kept/file new/moved")

    assert (
        shares.run("cd /overlay && cat new/moved && find . | sort")
        == "from the host\nmore\n.\n./kept\n./new\n./new/moved\n"
    )
    shares.run("umount /overlay /tmp/upper")
    assert host_hashes(shares.path / "lower") == before


def test_a_share_can_be_unmounted_and_mounted_again(shares: Shares) -> None:
    (shares.path / "always" / "here").write_text("still\n")
    shares.run("sync && umount /mnt/always && mount -t virtiofs always /mnt/always")
    assert shares.run("cat /mnt/always/here") == "still\n"
    assert shares.device("always").requests[Opcode.DESTROY]


def test_a_guest_that_is_paused_reads_on(shares: Shares) -> None:
    data = os.urandom(8 << 20)
    (shares.path / "none" / "big").write_bytes(data)
    shares.run("sha256sum /mnt/none/big > /tmp/sum 2>&1 &")
    for _ in range(5):
        shares.vm.pause()
        shares.vm.resume()
    found = shares.run("while ! [ -s /tmp/sum ]; do sleep 0.1; done; cat /tmp/sum")
    assert found.split()[0] == hashlib.sha256(data).hexdigest()
    assert "stall" not in shares.run("dmesg")


def test_two_harts_use_two_queues(tmp_path: Path) -> None:
    config = FsConfig(name="share", path=tmp_path, tag="share", queues=2)
    work = "for n in $(seq 40); do echo $n > /mnt/$hart.$n; cat /mnt/*.$n > /dev/null; done"
    with boot_image("toolbox", devices=[config], vcpus=2) as (vm, shell):
        shell.run("mount -t virtiofs share /mnt", check=True)
        shell.run(f"for hart in 0 1; do taskset $((hart + 1)) sh -c 'hart='$hart'; {work}' & done; wait", check=True)
        used = [queue.save().next_used for queue in vm.machine.device("share").queues]

    assert len(os.listdir(tmp_path)) == 80
    assert (tmp_path / "1.40").read_text() == "40\n"
    assert min(used[1:]) > 40
