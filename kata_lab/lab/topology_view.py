"""A sandbox from outside to inside in one picture: processes of the host, the VM with its devices, the guest.

What is drawn is what the runtime knows: its configuration, what was plugged in since, the processes of its arrangement,
and the containers with the processes that they run. The guest is not asked.
"""

from __future__ import annotations

import html
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kata_lab.lab.picture import BLACK, BLUE, ORANGE, SKY, YELLOW, Picture, Table, drawing

if TYPE_CHECKING:
    from kata_lab.runtime import Container, Sandbox

_WIDTH: Final = 900
_LINE: Final = 17
_LEFT, _HOST, _VM, _GUEST = 10, 220, 290, 590  #: edges: of the host's processes, from … to, of the VM, of the guest
_WORDS: Final = 42  #: of a process's command line
_MOST: Final = 12  #: containers that are drawn
_STATES: Final = {"created": "◌", "running": "▶", "paused": "❚❚", "stopped": "■"}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a sandbox.

    Attributes:
        where: ``host``, ``VM`` or ``guest``.
        what: its kind.
        name: its own name, or number.
        detail: what else there is to say.
    """

    where: str
    what: str
    name: str
    detail: str = ""


def topology(sandbox: Sandbox) -> list[Part]:
    """The parts of a sandbox as they are now, from the outside to the inside."""
    return [*_host(sandbox), *_machine(sandbox), *_guest(sandbox)]


def _host(sandbox: Sandbox) -> Iterator[Part]:
    yield Part("host", "runtime", str(os.getpid()), "this notebook's kernel")
    if str(sandbox.state) != "running":
        return
    for pid in sandbox.hypervisor.get_pids():
        if pid != os.getpid():
            yield Part("host", "VMM", str(pid), sandbox.hypervisor.name)


def _machine(sandbox: Sandbox) -> Iterator[Part]:
    if str(sandbox.state) != "running":
        return
    size, most = sandbox.size, sandbox.most
    threads = sorted(name for name in sandbox.hypervisor.get_thread_ids() if name.startswith("vcpu"))
    upto = f", at most {most.vcpus}" if most.vcpus > size.vcpus else ""
    known = f"threads {', '.join(threads)}" if len(threads) <= 2 else f"{len(threads)} threads"
    yield Part("VM", "vCPUs", str(size.vcpus), f"{known}{upto}" if threads else upto.removeprefix(", "))
    upto = f"at most {most.memory_mib} MiB" if most.memory_mib > size.memory_mib else ""
    yield Part("VM", "memory", f"{size.memory_mib} MiB", upto)
    yield Part("VM", "virtio-vsock", "agent", "ttrpc, port 1024")
    yield Part("VM", "virtio-fs", "shared", "layers and volumes, read by the guest")
    yield Part("VM", "virtio-blk", "scratch", "what containers write")
    yield from (Part("VM", "virtio-blk", reference, "an image") for reference in sandbox.config.images)
    yield Part("VM", "virtio-rng", "entropy")
    if sandbox.config.network is not None:
        yield Part("VM", "virtio-net", sandbox.config.network.name or "net", sandbox.config.network.backend)
    if most.memory_mib > sandbox.config.memory_mib:
        yield Part("VM", "virtio-balloon", "balloon")
    for name, device in sandbox.plugged.items():
        yield Part("VM", type(device).__name__.removesuffix("Config"), name, "plugged in since")


def _guest(sandbox: Sandbox) -> Iterator[Part]:
    if str(sandbox.state) != "running":
        return
    yield Part("guest", "kernel", sandbox.config.image, "paused" if sandbox.paused else "runs")
    yield Part("guest", "agent", "ttrpc server", "makes containers")
    for container in tuple(sandbox.containers.values()):
        yield Part("guest", "container", container.id, str(container.state))
        yield from _processes(container)


def _processes(container: Container) -> Iterator[Part]:
    args = container.spec.get("process", {}).get("args", [])
    status = container.process.status
    yield Part("guest", "process", _short(" ".join(args)), "" if status is None else f"ended with status {status}")
    for name in container.execs:
        yield Part("guest", "process", _short(name), "entered by exec")


def _short(text: str) -> str:
    return textwrap.shorten(text, _WORDS, placeholder=" …") or text[:_WORDS]


def topology_table(sandbox: Sandbox) -> Table:
    """The parts of a sandbox in rows."""
    rows = [(each.where, each.what, each.name, each.detail) for each in topology(sandbox)]
    return Table(("where", "what", "name", "more"), rows, _title(sandbox))


def sandbox_topology(sandbox: Sandbox) -> Picture:
    """Processes of the host on the left, the VM with its vCPUs and devices, and in it the guest with its containers."""
    parts = topology(sandbox)
    host, machine, guest = ([each for each in parts if each.where == where] for where in ("host", "VM", "guest"))
    rows = max(len(machine) + 2, 3 * len(host), _guest_rows(guest))
    height = 70 + _LINE * rows
    body = [_text(_LEFT, 16, _title(sandbox), "font-weight='bold'"), _text(_LEFT, 40, "host", "font-style='italic'")]
    body.extend(_host_boxes(host))
    if machine:
        body.append(_machine_box(machine, height))
        body.append(_guest_box(guest, height))
        body.append(_link(_HOST, _VM, 70, ""))
        row = next(number for number, each in enumerate(machine) if each.what == "virtio-vsock")
        body.append(_link(_VM + 140, _GUEST, 62 + _LINE * row, "ttrpc"))
    said = "; ".join(
        f"{each.where}: {each.what} {each.name}{f' ({each.detail})' if each.detail else ''}" for each in parts
    )
    return drawing("".join(body), _WIDTH, height, f"{_title(sandbox)}. {said}.")


def _title(sandbox: Sandbox) -> str:
    state = "paused" if sandbox.paused else str(sandbox.state)
    return f"Sandbox {sandbox.id}: {state}, arrangement {sandbox.hypervisor.name}"


def _host_boxes(host: Sequence[Part]) -> Iterator[str]:
    for number, each in enumerate(host):
        y = 48 + 3 * _LINE * number
        yield _rect(_LEFT, y, _HOST - _LEFT, 44, SKY if each.what == "runtime" else ORANGE)
        yield _text(_LEFT + 8, y + 18, f"{each.what}  {each.name}", "font-weight='bold'")
        yield _text(_LEFT + 8, y + 35, each.detail, "font-size='11'")
        if number:
            yield f"<line x1='{_LEFT + 30}' y1='{y - 7}' x2='{_LEFT + 30}' y2='{y}' stroke='{BLACK}'/>"


def _machine_box(machine: Sequence[Part], height: int) -> str:
    drawn = [
        _rect(_VM, 28, _WIDTH - _VM - 10, height - 34, "#f4f4f4"),
        _text(_VM + 8, 44, "VM", "font-style='italic'"),
    ]
    for number, each in enumerate(machine):
        y = 66 + _LINE * number
        detail = f"  {each.detail}" if each.what in ("vCPUs", "memory") and each.detail else ""
        drawn.append(f"<rect x='{_VM + 10}' y='{y - 9}' width='9' height='9' fill='{_colour(each)}' stroke='{BLACK}'/>")
        drawn.append(_text(_VM + 26, y, _cut(f"{each.what}  {each.name}{detail}", 46), "font-size='11'"))
    return "".join(drawn)


def _colour(part: Part) -> str:
    return ORANGE if part.what == "vCPUs" else BLUE if part.what == "memory" else "white"


def _guest_rows(guest: Sequence[Part]) -> int:
    containers = sum(each.what == "container" for each in guest)
    return len(guest) + containers + 3


def _guest_box(guest: Sequence[Part], height: int) -> str:
    wide = _WIDTH - _GUEST - 20
    drawn = [_rect(_GUEST, 48, wide, height - 62, "white"), _text(_GUEST + 8, 64, "guest", "font-style='italic'")]
    y, shown = 84, 0
    for number, each in enumerate(guest):
        if each.what == "container":
            shown += 1
            if shown > _MOST:
                drawn.append(_text(_GUEST + 10, y, f"and {sum(p.what == 'container' for p in guest) - _MOST} more"))
                break
            inside = _inside(guest, number)
            drawn.append(_rect(_GUEST + 8, y - 10, wide - 16, _LINE * (inside + 1) + 4, YELLOW))
            drawn.append(_text(_GUEST + 14, y + 4, f"{_STATES[each.detail]} {each.name}  {each.detail}", _SMALL_BOLD))
            y += _LINE + 2
        elif each.what == "process":
            ended = f"  {each.detail}" if each.detail else ""
            drawn.append(_text(_GUEST + 26, y + 2, _cut(f"› {each.name}{ended}", 40), _MONOSPACE))
            y += _LINE
            if number + 1 == len(guest) or guest[number + 1].what == "container":
                y += 8
        else:
            drawn.append(_text(_GUEST + 10, y, f"{each.what}  {each.name}: {each.detail}", "font-size='11'"))
            y += _LINE + (4 if each.what == "agent" else 0)
    return "".join(drawn)


_SMALL_BOLD: Final = "font-size='11' font-weight='bold'"
_MONOSPACE: Final = "font-size='11' font-family='monospace'"


def _inside(guest: Sequence[Part], container: int) -> int:
    """How many processes follow a container."""
    rest = [each.what for each in guest[container + 1 :]]
    return rest.index("container") if "container" in rest else len(rest)


def _link(start: int, end: int, y: int, word: str) -> str:
    return f"<line x1='{start}' y1='{y}' x2='{end}' y2='{y}' stroke='{BLACK}' stroke-width='2'/>" + _text(
        (start + end) // 2, y - 6, word, "text-anchor='middle' font-size='10'"
    )


def _rect(x: int, y: int, width: int, height: int, colour: str) -> str:
    return f"<rect x='{x}' y='{y}' width='{width}' height='{height}' fill='{colour}' stroke='{BLACK}' rx='3'/>"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: int, y: int, text: str, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' {more}>{html.escape(text)}</text>"
