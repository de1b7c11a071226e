"""``kata-lab boot``: boot a machine and connect its console to this process.

Exit status, like ssh's that of what ran at the other end: the status which the guest's init tells on its last line
("kata-lab: exit status N"), 0 for a guest that ends without telling one; and

======  ======================================================================================
121     the guest shut down and gave a system failure as its reason
122     the machine could not go on: an engine or device fault, no hart left to run, or the last one hangs
123     the guest's kernel panicked
124     the time given with ``--timeout`` passed
======  ======================================================================================

With 121 to 124 the report of the machine is on standard error.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kata_lab.commands import UsageError
from kata_lab.errors import ImageError
from kata_lab.image.boot import (
    APPEND,
    EXIT_STATUS,
    USERLAND_MARKER,
    BootSource,
    append_running,
    boot_source,
    build_boot_guest,
)
from kata_lab.terminal import RawTerminal, WindowSize
from vmm.actions import EndKind, MachineEnd
from vmm.config import ConsoleConfig, DeviceConfig, VmConfig
from vmm.microvm import MicroVm

if TYPE_CHECKING:
    from kata_lab.image.library import Image

USERLAND = "userland"
MILESTONES = {USERLAND: re.escape(USERLAND_MARKER)}

STATUS_OF_END = {EndKind.FAILURE: 121, EndKind.HANG: 122, EndKind.CRASH: 122, EndKind.PANIC: 123}
TIMED_OUT = 124


@dataclass(frozen=True, slots=True, kw_only=True)
class BootOptions:
    """What the command line says; ``command`` is what the guest shall run, ``timeout`` is in seconds.

    ``devices`` are options of :mod:`kata_lab.commands.devices`, each with its name and what was given to it.
    """

    vcpus: int = 1
    memory_mib: int = 256
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    cmdline: str | None = None
    clock: str = "real"
    trace: bool = False
    timeout: float | None = None
    command: str | None = None
    mirror: str | None = None
    image: str | None = None
    devices: tuple[tuple[str, str], ...] = ()


def configure(options: BootOptions) -> tuple[VmConfig, Image | None]:
    """The VM's configuration; builds the default guest, or the image, unless a kernel is named.

    Returns:
        the configuration, and the image whose files it names, to be kept until the VM has started.

    Raises:
        UsageError: a command line that the kernel would not take, an image that cannot be built as it is described or
            cannot boot here, or words that make no device.
        ConfigError: a value that certainly cannot work.
        ImageError: the guest cannot be built.
    """
    if options.image is not None and options.kernel is not None:
        raise UsageError(f"--image {options.image} brings its kernel: leave out --kernel {options.kernel}, or --image")
    # Before anything is fetched: what cannot work is said at once.
    config = VmConfig(
        vcpus=options.vcpus,
        memory_mib=options.memory_mib,
        kernel=_file("kernel", options.kernel),
        initrd=_file("initrd", options.initrd),
        cmdline=_command_line(options, APPEND),
        clock=options.clock,
        console=ConsoleConfig(milestones=MILESTONES),
        trace=options.trace,
        devices=_devices(options),
    )
    if options.kernel is not None:
        return config, None
    if options.image is not None:
        image, source = _source(options.image, options.mirror)
        config = config.replace(
            kernel=source.kernel,
            initrd=config.initrd or source.initrd,
            cmdline=_command_line(options, source.append),
            devices=(*source.disks, *config.devices),
        )
        return config, image
    guest = build_boot_guest(mirror=options.mirror)
    return config.replace(kernel=guest.kernel, initrd=config.initrd or guest.initrd), None


def _devices(options: BootOptions) -> tuple[DeviceConfig, ...]:
    if not options.devices:
        return ()
    from kata_lab.commands.devices import parse_devices

    return parse_devices(options.devices)


def _source(name: str, mirror: str | None) -> tuple[Image, BootSource]:
    from kata_lab.image.build import build_named
    from kata_lab.image.description import DescriptionError

    try:
        image = build_named(name, mirror=mirror)
    except DescriptionError as error:
        raise UsageError(str(error)) from error
    try:
        return image, boot_source(image)
    except ImageError as error:
        raise UsageError(str(error)) from error


def _file(what: str, name: str | None) -> Path | None:
    if name is None:
        return None
    if not name:
        raise UsageError(f"--{what} names no file: give the path of one, or leave --{what} out")
    return Path(name)


def _command_line(options: BootOptions, append: str) -> str:
    line = append if options.cmdline is None else options.cmdline
    if options.append:
        line = f"{line} {options.append}".strip()
    if options.command is None:
        return line
    if not options.command.strip():
        raise UsageError("--run was given an empty command: give one, or leave --run out for a shell")
    try:
        return append_running(options.command, line)
    except ImageError as error:
        raise UsageError(str(error)) from error


def run(options: BootOptions) -> int:
    """Boot, stay connected until the guest ends, and return the exit status."""
    config, image = configure(options)
    from kata_lab.hypervisor.acting import compile_hart

    compile_hart()
    from kata_lab.commands.console import ConsoleLoop, Streams, standard_input, standard_output

    source = standard_input()
    output = standard_output()
    interactive = source is not None and os.isatty(source) and os.isatty(output)
    streams = Streams(
        input=source,
        output=output,
        interactive=interactive,
        type_after=_ready_line(options),
        tell=_tell_in_raw_mode,
    )
    if interactive:
        size = WindowSize.of(output)
        window = f"; the window has {size.rows} rows and {size.columns} columns" if size else ""
        print(f"kata-lab: Ctrl-] then q quits, Ctrl-] then ? tells the other keys{window}", file=sys.stderr)
    with MicroVm(config) as vm:
        with contextlib.ExitStack() as connected:
            loop = connected.enter_context(ConsoleLoop(vm, streams))
            if interactive and source is not None:
                connected.enter_context(RawTerminal(source))
            vm.start()
            del image
            in_time = loop.run(options.timeout)
        return _finish(vm, options, in_time)


def _ready_line(options: BootOptions) -> str | None:
    """What the guest prints when its shell can be typed to; None if nobody knows."""
    if options.kernel is not None or options.initrd is not None:
        return None
    if options.image is None:
        return USERLAND_MARKER
    from kata_lab.image.build import SERVICES_MARKER

    return SERVICES_MARKER


def _tell_in_raw_mode(text: str) -> None:
    print(f"\r\nkata-lab: {text}\r", file=sys.stderr, flush=True)


def _finish(vm: MicroVm, options: BootOptions, in_time: bool) -> int:
    """Say how it went, after the terminal has its mode back."""
    if not in_time:
        report = str(vm.report())
        vm.shutdown()
        print(f"kata-lab: the guest had not ended after {options.timeout:g} s\n{report}", file=sys.stderr)
        status = TIMED_OUT
    else:
        end = vm.shutdown()
        status = exit_status(end, vm.console.text)
        if end.kind in STATUS_OF_END:
            print(f"kata-lab: {end.detail}\n{vm.report()}", file=sys.stderr)
        elif end.kind is EndKind.REBOOT:
            print(f"kata-lab: {end.detail}, which ends a micro-VM", file=sys.stderr)
    if options.trace:
        from kata_lab.commands.timeline import exits_table, recent_exits, timeline

        trace = vm.trace
        parts = timeline(trace.milestones), exits_table(trace.exits), recent_exits(trace.recent)
        print(*parts, sep="\n\n", file=sys.stderr)
    return status


def exit_status(end: MachineEnd, console: str) -> int:
    """What the process exits with after a guest ended so, with this on its console."""
    if end.kind in STATUS_OF_END:
        return STATUS_OF_END[end.kind]
    told = EXIT_STATUS.findall(console.replace("\r", ""))
    return int(told[-1]) & 0xFF if told and end.kind is not EndKind.HOST else 0
