#!/usr/bin/micropython
"""Follows the kernel's device events in the guest of the ACPI comparison, and tells the host what it can use.

Runs in MicroPython 1.25 (unix port). Events come from the kernel itself, over netlink (netlink(7),
NETLINK_KOBJECT_UEVENT; lib/kobject_uevent.c): nothing here waits by the clock. What udev would do is done here: a
processor that ACPI added is brought online through sysfs. Memory is onlined by the kernel (``memhp_default_state``), a
disk is read and a shared directory mounted and listed, so that the host hears of what was used. One line for each, on
the second serial port:

======================  ==================================================================
``up BYTES``            listening; the size of a block of memory
``add KIND NAME``       the kernel has found a device: ``cpu cpu1``, ``memory memory34``, ``pci 0000:01:00.0``, or a
                        driver has taken one: ``block vda``, ``virtiofs 0``
``online cpu LIST``     processors that are online now (``/sys/devices/system/cpu/online``)
``online memory NAME``  a block of memory is in use
``online disk SERIAL``  the first sector of a disk was read
``online share TAG``    a shared directory was mounted and listed
``offline KIND NAME``   a processor or a block of memory is about to go
``failed KIND NAME WHY``
======================  ==================================================================
"""

import os
import socket
import struct

import ffi

AF_NETLINK, SOCK_DGRAM, NETLINK_KOBJECT_UEVENT = 16, 2, 15
LARGEST_EVENT = 8192
REPORTS = "/dev/ttyS1"
TOLD = ("cpu", "memory", "pci", "block", "virtiofs")
SYSTEM = "/sys/devices/system"
SECTOR = 512
PLACE = "/mnt"

_libc = ffi.open("libc.so.6")
_mount = _libc.func("i", "mount", "sssLs")
_umount = _libc.func("i", "umount", "s")


def first_line(path):
    with open(path) as file:
        return file.readline().strip()


def online_processor(event, name, tell):
    with open("/sys" + event["DEVPATH"] + "/online", "w") as file:
        file.write("1")
    tell("online cpu " + first_line(SYSTEM + "/cpu/online"))


def read_disk(event, name, tell):
    if event.get("DEVTYPE") != "disk":
        return
    with open("/dev/" + name, "rb") as file:
        if len(file.read(SECTOR)) != SECTOR:
            raise OSError(5)
    tell("online disk " + first_line("/sys/block/" + name + "/serial"))


def list_share(event, name, tell):
    tag = event["TAG"]
    if _mount(tag, PLACE, "virtiofs", 0, None) != 0:
        raise OSError(os.errno())
    try:
        os.listdir(PLACE)
    finally:
        _umount(PLACE)
    tell("online share " + tag)


USE = {"cpu": online_processor, "block": read_disk, "virtiofs": list_share}


def handle(event, tell):
    kind, action = event["SUBSYSTEM"], event["ACTION"]
    name = event["DEVPATH"].split("/")[-1]
    if action == "add":
        if kind in TOLD:
            tell(f"add {kind} {name}")
        if kind in USE:
            try:
                USE[kind](event, name, tell)
            except OSError as error:
                tell(f"failed {kind} {name} {error.errno}")
    elif action == "online" and kind == "memory":
        tell(f"online memory {name}")
    elif action == "offline" and kind in ("cpu", "memory"):
        tell(f"offline {kind} {name}")


def main():
    events = socket.socket(AF_NETLINK, SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
    events.bind(struct.pack("<HHII", AF_NETLINK, 0, 0, 1))
    with open(REPORTS, "wb") as port:

        def tell(line):
            port.write(line + "\n")

        tell(f"up {int(first_line(SYSTEM + '/memory/block_size_bytes'), 16)}")
        while True:
            words = events.recv(LARGEST_EVENT).decode().split("\0")
            event = dict(word.split("=", 1) for word in words if "=" in word)
            if "SUBSYSTEM" in event:
                handle(event, tell)


main()
