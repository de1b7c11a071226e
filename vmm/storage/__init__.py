"""What a virtual disk keeps its bytes in: a raw file or block device, or a copy-on-write overlay over another disk.

A disk is opened by :func:`open_disk` with the format that its owner names. The format is never guessed from the
contents: a guest could write the header of an overlay into its raw disk, and have a file of the host opened the next
time.
"""

from __future__ import annotations

from vmm.storage.disk import Disk, DiskError, FileEndedError
from vmm.storage.overlay import OverlayDisk, create_overlay, open_disk
from vmm.storage.raw import RawDisk

__all__ = ["Disk", "DiskError", "FileEndedError", "OverlayDisk", "RawDisk", "create_overlay", "open_disk"]
