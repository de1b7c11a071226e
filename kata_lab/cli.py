"""The command line ``kata-lab``: what it accepts; each command's work is a module beneath :mod:`kata_lab.commands`.

Exit status: what the command says, of which ``boot`` has its own (see :mod:`kata_lab.commands.boot`); 2 for a command
line or an input that cannot work; 1 for everything else that fails, told in one sentence on standard error. Modules
are imported when their command runs, so that ``kata-lab --help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from kata_lab.commands.container import add_commands as add_container_commands
from kata_lab.commands.image import add_arguments as add_image_arguments
from kata_lab.commands.lab import add_arguments as add_lab_arguments
from kata_lab.errors import KataLabError

FAILED = 1
REFUSED = 2

_UNITS = {"": 1, "m": 1, "mib": 1, "g": 1024, "gib": 1024}


class _Parser(argparse.ArgumentParser):
    """argparse, but a bad command line is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _runs(text: str) -> int:
    runs = _number(text)
    if not 1 <= runs <= 1000:
        raise argparse.ArgumentTypeError(f"{runs} runs cannot be made: the number must be from 1 to 1000")
    return runs


def _mebibytes(text: str) -> int:
    digits = text.rstrip("MmGgIiBb")
    unit = text[len(digits) :].lower()
    if not digits.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: it looks like 256, 256M or 1G")
    return int(digits) * _UNITS[unit]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text} s is no time to wait: it must be more than 0")
    return seconds


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < factor <= 1000:
        raise argparse.ArgumentTypeError(f"loops {text} times as long cannot be run: it must be above 0, to 1000")
    return factor


def build_parser() -> argparse.ArgumentParser:
    """Everything that the command line accepts."""
    parser = _Parser(prog="kata-lab", description="Boot, see and measure secure containers.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=_Parser)

    doctor = commands.add_parser("doctor", help="say what this machine can do, and what to do about what it cannot")
    doctor.add_argument("--json", action="store_true", help="print plain data")
    doctor.set_defaults(run=_doctor)

    boot = commands.add_parser(
        "boot",
        help="boot a machine and connect this terminal to its console",
        description=(
            "Boot an unmodified Debian kernel for riscv64 (or your own) in this process. On a terminal every key goes "
            "to the guest; Ctrl-] then q quits, Ctrl-] then ? tells the other keys. Standard input that is no terminal "
            "is typed to the console once the guest's userland is up; at its end Ctrl-D is typed, once a second until "
            "the guest ends."
        ),
        epilog=(
            "Exit status: that of the guest's command or shell, 0 for a guest that shuts down without telling one; "
            "121 the guest shut down because of a failure, 122 the machine could not go on, 123 the kernel panicked, "
            "124 --timeout passed; 1 it could not be started, 2 bad input; 130 Ctrl-C, 143 SIGTERM."
        ),
        allow_abbrev=False,
    )
    boot.add_argument("--vcpus", type=_number, default=1, metavar="N", help="number of harts (default 1)")
    boot.add_argument("--memory", type=_mebibytes, default=256, metavar="MIB", help="as 256 (default), 256M or 1G")
    boot.add_argument("--kernel", metavar="FILE", help="RISC-V Image or ELF, then without the default initrd")
    boot.add_argument("--initrd", metavar="FILE", help="initial RAM file system")
    boot.add_argument("--image", metavar="NAME|FILE", help="an image by its description, built if need be")
    boot.add_argument("--append", default="", metavar="WORDS", help="add to the kernel's command line")
    boot.add_argument("--cmdline", metavar="LINE", help="replace the kernel's command line")
    boot.add_argument(
        "--clock", default="real", help="real (default), or deterministic: time from retired instructions, one hart"
    )
    boot.add_argument("--trace", action="store_true", help="print a timeline of the boot and the exits at the end")
    boot.add_argument("--timeout", type=_seconds, metavar="S", help="end the guest after so many seconds")
    boot.add_argument("--run", metavar="COMMAND", dest="guest_command", help="run it in the guest, then power off")
    boot.add_argument("--mirror", metavar="URI", help="Debian archive to build the guest from")
    _add_devices(boot)
    boot.set_defaults(run=_boot, devices=[])

    add_image_arguments(commands.add_parser("image", help="build guest images and look into them"), _Parser)

    add_container_commands(commands, _Parser)

    add_lab_arguments(commands.add_parser("lab", help="the course: notebooks, exercises, your score"), _Parser)

    bench = commands.add_parser("bench", help="measure, side by side with qemu-system-riscv64, or two images")
    kinds = bench.add_subparsers(title="benchmarks", dest="kind", required=True, parser_class=_Parser)
    for kind, told in (
        ("boot", "from exec to the first line of userland; idle cost; memory"),
        ("compute", "loops on one hart, and on two"),
        ("image", "the lifsea image against the debian image: packages, size, boot to services"),
        ("io", "disk, network, shared directory and sockets of a guest"),
        ("run", "a container from nothing, with the parts of its start; one in a running sandbox; exec; memory"),
        ("fused", "runtime and VMM in one process, in processes of their own, and QEMU"),
        ("hotplug", "vCPUs, memory, disk and shared directory by upcall, against QEMU's ACPI and PCI"),
    ):
        each = kinds.add_parser(kind, help=told, allow_abbrev=False)
        each.add_argument("--json", action="store_true", help="print plain data")
        each.add_argument("--runs", type=_runs, default=5, metavar="N", help="runs of each, in turns (default 5)")
        if kind == "boot":
            each.add_argument("--cold", action="store_true", help="measure the one-time compilation too")
            each.add_argument("--idle", type=_seconds, default=10.0, metavar="S", help="seconds of idling (default 10)")
        elif kind == "compute":
            each.add_argument("--size", type=_factor, default=1.0, metavar="X", help="length of the loops (default 1)")
        elif kind == "io":
            each.add_argument("--seconds", type=_seconds, default=3.0, metavar="S", help="of each load (default 3)")
        elif kind == "run":
            each.add_argument("--rounds", type=_runs, default=5, metavar="N", help="containers of each run (default 5)")
        each.set_defaults(run=_bench)
    return parser


class _AddDevice(argparse.Action):
    """Notes a device; all options of devices make one list, which keeps their order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.devices = [*namespace.devices, (self.dest, values)]


def _add_devices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "devices",
        "The guest finds them in this order; each option may be given several times. A comma in a path is written "
        "twice. What the image's init has no driver for is not used.",
    )
    for option, metavar, told in (
        ("disk", "PATH[,ro][,overlay][,serial=S][,queues=N]", "a disk: a raw file, or an overlay file"),
        ("share", "TAG=DIR[,ro][,cache=none|auto|always]", "a directory: mount -t virtiofs TAG /mnt"),
        ("vsock", "SOCKET[,cid=N]", "sockets between host and guest, by this unix socket"),
        ("port", "NAME=SOCKET", "a named port, by this unix socket; the first is the console hvc0"),
        ("device", "KIND[,NAME=VALUE...]", "any device, by its kind (blk, fs, net, ...) and the fields it has"),
    ):
        group.add_argument(f"--{option}", action=_AddDevice, metavar=metavar, help=told, default=argparse.SUPPRESS)
    for option, metavar, told in (
        ("net", "passt|tap=NAME[,tcp=8080:80]", "a network interface (default by passt), with ports that lead to it"),
        ("balloon", "target=MIB[,statistics=S]", "a way to take memory back"),
        ("rng", "rate=BYTES", "a source of random numbers"),
    ):
        group.add_argument(
            f"--{option}", action=_AddDevice, nargs="?", const="", metavar=metavar, help=told, default=argparse.SUPPRESS
        )


def _doctor(options: argparse.Namespace) -> int:
    from kata_lab.doctor import run

    return run(options.json)


def _boot(options: argparse.Namespace) -> int:
    from kata_lab.commands.boot import BootOptions, run

    return run(
        BootOptions(
            vcpus=options.vcpus,
            memory_mib=options.memory,
            kernel=options.kernel,
            initrd=options.initrd,
            append=options.append,
            cmdline=options.cmdline,
            clock=options.clock,
            trace=options.trace,
            timeout=options.timeout,
            command=options.guest_command,
            mirror=options.mirror,
            image=options.image,
            devices=tuple(options.devices),
        )
    )


def _bench(options: argparse.Namespace) -> int:
    from kata_lab.bench.command import run_boot, run_compute, run_fused, run_hotplug, run_image, run_io, run_run

    if options.kind == "fused":
        return run_fused(options.runs, options.json)
    if options.kind == "hotplug":
        return run_hotplug(options.runs, options.json)
    if options.kind == "run":
        return run_run(options.runs, options.json, options.rounds)
    if options.kind == "io":
        return run_io(options.runs, options.json, options.seconds)
    if options.kind == "image":
        return run_image(options.runs, options.json)
    if options.kind == "boot":
        return run_boot(options.runs, options.json, options.idle, options.cold)
    return run_compute(options.runs, options.json, options.size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``arguments`` are those of the process if None."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.run
    from kata_lab.terminal import Ended, EndingSignals

    with EndingSignals():
        try:
            status = command(options)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except Ended as signal:
            return signal.status
        except BrokenPipeError:
            _drop_output()
            return 128 + 13
        except KataLabError as error:
            return _tell(error)
        except Exception as error:
            # vmm is imported by the commands that need it; without it this cannot be one of its errors.
            errors = sys.modules.get("vmm.errors")
            if errors is None or not isinstance(error, errors.VmmError):
                raise
            return _tell(error, refused=isinstance(error, (errors.ConfigError, errors.BootError)))


def _tell(error: Exception, refused: bool = False) -> int:
    from kata_lab.commands import UsageError

    print(f"kata-lab: {error}", file=sys.stderr)
    return REFUSED if refused or isinstance(error, UsageError) else FAILED


def _drop_output() -> None:
    """Nobody reads standard output any more: the interpreter must not try to flush it at its end."""
    import os

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
