"""The services of a description as units of systemd, for images whose process 1 is systemd.

Follows systemd.unit(5) and systemd.service(5), version 257. Modules are loaded by insmod(8) with their paths, in order:
modprobe(8) would want the index files of depmod(8), which only a maintainer script makes.
"""

from __future__ import annotations

from kata_lab.image.description import Description
from kata_lab.image.tree import RootTree

UNITS = "etc/systemd/system"
TARGET = "multi-user.target"


def add_units(tree: RootTree, description: Description, modules: list[str], marker: str) -> None:
    """Write a unit for each service, one that loads modules, and one that prints `marker` when all are started."""
    tree.symlink(f"{UNITS}/default.target", f"/usr/lib/systemd/system/{TARGET}")
    if modules:
        lines = [f"ExecStart=-/usr/sbin/insmod {path}" for path in modules]
        service = ["Type=oneshot", "RemainAfterExit=yes", *lines]
        _add(tree, "kata-lab-modules", ["DefaultDependencies=no", "Before=sysinit.target"], service, "sysinit.target")
    for each in description.services:
        after = [f"After={name}.service" for name in each.after]
        service = [
            "Type=oneshot" if each.once else "Type=exec",
            *(["RemainAfterExit=yes"] if each.once else [f"Restart={each.restart}"]),
            f"ExecStart={' '.join(_quoted(word) for word in each.command)}",
        ]
        if each.console:
            service += ["StandardInput=tty", "StandardOutput=tty", "TTYPath=/dev/console"]
        _add(tree, each.name, after, service, TARGET)
    names = " ".join(f"{each.name}.service" for each in description.services)
    poweroff = "if grep -q kata.poweroff /proc/cmdline; then systemctl --no-block poweroff; fi"
    text = f"/bin/sh -c 'echo {marker} >/dev/console; {poweroff}'"
    up = [f"After=basic.target dbus.service systemd-logind.service ssh.service cron.service {names}".rstrip()]
    _add(tree, "kata-lab-up", up, ["Type=oneshot", f"ExecStart={text}"], TARGET)


def _add(tree: RootTree, name: str, unit: list[str], service: list[str], wanted_by: str) -> None:
    sections = {"Unit": [f"Description={name}", *unit], "Service": service, "Install": [f"WantedBy={wanted_by}"]}
    text = "\n".join("\n".join((f"[{title}]", *lines, "")) for title, lines in sections.items())
    tree.file(f"{UNITS}/{name}.service", text.encode())
    tree.symlink(f"{UNITS}/{wanted_by}.wants/{name}.service", f"../{name}.service")


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
