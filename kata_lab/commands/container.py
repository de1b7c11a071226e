"""What the command line accepts of containers and pods; the work is in ``run``, ``manage`` and ``pod``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

_STATUS = (
    "Exit status: that of the container's process, 128 + n after signal n, 255 if its end was not seen; 125 for a "
    "failure of kata-lab itself, 126 for a program that cannot be executed, 127 for one that does not exist."
)


def add_commands(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add the commands of containers and pods.

    Args:
        commands: the subparsers to add them to.
        parser_class: for subparsers of their own.
    """

    def add(name: str, told: str, work: str, *, starts: bool = False, **more: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=told, description=told[0].upper() + told[1:] + ".", allow_abbrev=False, **more
        )
        parser.set_defaults(run=_later(work, starts))
        return parser

    _add_creating(add)
    _add_running(add)
    _add_managing(add)
    _add_hotplug(commands, parser_class)
    _add_pod(commands, parser_class)


def _later(work: str, starts: bool) -> Callable[[argparse.Namespace], int]:
    """A command whose module is imported when it runs."""

    def run(options: argparse.Namespace) -> int:
        module, _, name = work.partition(".")
        found: Callable[[argparse.Namespace], int] = getattr(import_module(f"kata_lab.commands.{module}"), name)
        if not starts:
            return found(options)
        from kata_lab.commands.run import carry_out

        return carry_out(found, options)

    return run


Add = Callable[..., argparse.ArgumentParser]


def _add_creating(add: Add) -> None:
    run = add("run", "run a container in a sandbox of its own", "run.run", starts=True, epilog=_STATUS)
    run.add_argument("-d", "--detach", action="store_true", help="leave it running, and print its id")
    run.add_argument("--rm", action="store_true", help="remove it when it ends")
    create = add("create", "create a container, which waits to be started", "run.create", starts=True)
    for parser in (run, create):
        _add_input(parser)
        parser.add_argument("--name", default="", help="by which it is called (default: made up)")
        parser.add_argument(
            "-v",
            "--volume",
            action="append",
            default=[],
            metavar="SRC:DST[:ro]",
            help="a directory or file of this machine in it",
        )
        parser.add_argument("--cpus", type=float, metavar="N", help="processors that it may use, such as 1.5")
        parser.add_argument("-m", "--memory", metavar="SIZE", help="memory that it may use, such as 64m")
        parser.add_argument(
            "--max-cpus", type=_count, metavar="N", help="vCPUs that its sandbox can have while it runs (hotplug)"
        )
        parser.add_argument("--max-memory", metavar="SIZE", help="memory that its sandbox can have while it runs")
        parser.add_argument("--read-only", action="store_true", help="its root cannot be written to")
        parser.add_argument(
            "--tmpfs", action="append", default=[], metavar="DST[:OPTIONS]", help="a directory in memory"
        )
        parser.add_argument("--hostname", default="", help="its host's name (default: its id)")
        parser.add_argument(
            "--network",
            choices=("none", "passt"),
            help="passt: this machine's network, without privileges (default: none, but for -p)",
        )
        parser.add_argument(
            "-p",
            "--publish",
            action="append",
            default=[],
            metavar="PORT[:PORT][/udp]",
            help="a port of this machine that leads into it",
        )
        parser.add_argument("--entrypoint", metavar="PROGRAM", help="in place of the image's")
        parser.add_argument("--cap-add", action="append", default=[], metavar="CAP", help="a capability more; ALL")
        parser.add_argument("--cap-drop", action="append", default=[], metavar="CAP", help="a capability less; ALL")
        roots = parser.add_mutually_exclusive_group()
        roots.add_argument("--rootfs", metavar="DIR", help="a directory in place of an image")
        roots.add_argument("--bundle", metavar="DIR", help="an OCI bundle, which says everything")
        parser.add_argument("--pod", metavar="NAME", help="join the sandbox of a pod or container that runs")
        parser.add_argument(
            "image", nargs="?", metavar="IMAGE", help="busybox, or oci:DIR[:TAG], oci-archive:FILE, ..."
        )
        parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="in place of the image's")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="connect standard input")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal; Ctrl-P Ctrl-Q detaches")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K[=V]", help="an environment variable")
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="its working directory")
    parser.add_argument("-u", "--user", default="", metavar="USER[:GROUP]", help="who it runs as")


def _add_running(add: Add) -> None:
    start = add("start", "start containers that were created or have stopped", "run.start", starts=True)
    start.add_argument("-a", "--attach", action="store_true", help="stay with it until it ends")
    start.add_argument("-i", "--interactive", action="store_true", help="connect standard input")
    start.add_argument("names", nargs="+", metavar="CONTAINER")
    execute = add("exec", "run one more process in a container", "run.exec_in", starts=True, epilog=_STATUS)
    execute.add_argument("-d", "--detach", action="store_true", help="leave it running")
    _add_input(execute)
    execute.add_argument("name", metavar="CONTAINER")
    execute.add_argument("program", metavar="COMMAND")
    execute.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    attach = add("attach", "connect to the first process of a container", "run.attach", starts=True, epilog=_STATUS)
    attach.add_argument("--no-stdin", action="store_true", help="do not connect standard input")
    attach.add_argument("name", metavar="CONTAINER")


def _add_managing(add: Add) -> None:
    ps = add("ps", "list containers", "manage.ps")
    ps.add_argument("-a", "--all", action="store_true", help="those that have stopped, too")
    ps.add_argument("-q", "--quiet", action="store_true", help="only ids")
    logs = add("logs", "print what a container wrote", "manage.logs")
    logs.add_argument("-f", "--follow", action="store_true", help="and what it writes, until it ends")
    logs.add_argument("-n", "--tail", type=_lines, metavar="N", help="only the last lines (default: all)")
    logs.add_argument("-t", "--timestamps", action="store_true", help="with the time before each line")
    stats = add("stats", "show what containers use", "manage.stats")
    stats.add_argument("--no-stream", action="store_true", help="only once")
    stats.add_argument("names", nargs="*", metavar="CONTAINER", help="(default: all that run)")
    timeline = add("timeline", "show when what happened as a sandbox started", "manage.timeline")
    metrics = add("metrics", "print metrics of a sandbox for Prometheus", "manage.metrics")
    for parser in (ps, stats, timeline):
        parser.add_argument("--json", action="store_true", help="print plain data")
    pause = add("pause", "freeze containers", "manage.pause")
    resume = add("resume", "let frozen containers run", "manage.resume", aliases=["unpause"])
    kill = add("kill", "send a signal to containers", "manage.kill")
    kill.add_argument("-s", "--signal", default="KILL", help="name or number (default KILL)")
    stop = add("stop", "end containers, gently at first", "manage.stop")
    stop.add_argument("-t", "--time", type=_patience, default=10.0, metavar="S", help="seconds before killing (10)")
    rm = add("rm", "remove containers", "manage.rm")
    rm.add_argument("-f", "--force", action="store_true", help="those that run, too")
    update = add("update", "change limits of containers that run", "manage.update")
    update.add_argument("--cpus", type=float, metavar="N", help="processors, such as 1.5")
    update.add_argument("-m", "--memory", metavar="SIZE", help="memory, such as 64m")
    wait = add("wait", "wait until containers end, and print their exit statuses", "manage.wait")
    inspect = add("inspect", "print everything that is known of containers", "manage.inspect")
    for parser in (logs, timeline, metrics):
        parser.add_argument("name", metavar="CONTAINER")
    for parser in (pause, resume, kill, stop, rm, update, wait, inspect):
        parser.add_argument("names", nargs="+", metavar="CONTAINER")


def _add_hotplug(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    hotplug = commands.add_parser("hotplug", help="change the sandbox of a container while it runs")
    actions = hotplug.add_subparsers(title="actions", dest="action", required=True, parser_class=parser_class)

    def add(name: str, told: str, work: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(
            name, help=told, description=told[0].upper() + told[1:] + ".", allow_abbrev=False
        )
        parser.add_argument("name", metavar="CONTAINER", help="one in the sandbox")
        parser.set_defaults(run=_later(f"hotplug.{work}", starts=False))
        return parser

    resize = add("resize", "change vCPUs and memory, as far as --max-cpus and --max-memory allowed", "resize")
    resize.add_argument("--cpus", type=_count, metavar="N", help="how many vCPUs")
    resize.add_argument("-m", "--memory", metavar="SIZE", help="how much memory, such as 512m")
    disk = add("add-disk", "plug in a file as a disk, and print the device's name", "add_disk")
    disk.add_argument("file", metavar="FILE", help="its contents, raw")
    disk.add_argument("--serial", default="", help="its serial number as the guest sees it")
    share = add("add-share", "share a directory (mount -t virtiofs TAG ...), and print the device's name", "add_share")
    share.add_argument("directory", metavar="DIR")
    share.add_argument("tag", metavar="TAG", help="what the guest calls it")
    net = add("add-net", "plug in a network interface (passt), and print the device's name", "add_net")
    for parser in (disk, share, net):
        parser.add_argument("--name", dest="device", default="", metavar="DEVICE", help="(default: made up)")
    for parser in (disk, share):
        parser.add_argument("--read-only", action="store_true", help="the guest cannot write to it")
    remove = add("rm", "take a device away", "remove")
    remove.add_argument("device", metavar="DEVICE")
    listing = add("ls", "show vCPUs, memory and what was plugged in", "show")
    listing.add_argument("--json", action="store_true", help="print plain data")


def _add_pod(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    pod = commands.add_parser("pod", help="run pods as Kubernetes describes them, a subset")
    actions = pod.add_subparsers(title="actions", dest="action", required=True, parser_class=parser_class)
    apply = actions.add_parser("apply", help="run the pods of a file", allow_abbrev=False)
    apply.add_argument("-f", "--file", required=True, metavar="FILE", help="in YAML; - is standard input")
    get = actions.add_parser("get", help="list pods", allow_abbrev=False)
    get.add_argument("--json", action="store_true", help="print plain data")
    get.add_argument("names", nargs="*", metavar="POD")
    delete = actions.add_parser("delete", help="end pods and remove them", allow_abbrev=False)
    delete.add_argument("-f", "--file", metavar="FILE", help="those of a file")
    delete.add_argument("-t", "--time", type=_patience, default=10.0, metavar="S", help="seconds before killing (10)")
    delete.add_argument("names", nargs="*", metavar="POD")
    for parser, work in ((apply, "pod.apply"), (get, "pod.get"), (delete, "pod.delete")):
        parser.set_defaults(run=_later(work, starts=False))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of vCPUs: give a whole one, from 1")
    return int(text)


def _lines(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines: give one, or all")
    return int(text)


def _patience(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text} s is no time to wait: it must be 0 or more")
    return seconds
