"""One boot in a fresh process, timed from within: ``python -m kata_lab.bench.probe KERNEL INITRD CMDLINE MIB``.

Prints one JSON object: ``first_instruction_s`` seconds from before ``import vmm`` to the guest's first instruction,
``first_instruction_at`` that moment on the host's monotonic clock, ``userland_s`` and ``userland_instructions`` from
there to the first line of userland.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Boot, print, and pull the plug."""
    kernel, initrd, cmdline, memory_mib = arguments
    began = time.monotonic()
    import vmm

    with vmm.MicroVm(
        vmm.VmConfig(kernel=Path(kernel), initrd=Path(initrd), cmdline=cmdline, memory_mib=int(memory_mib))
    ) as vm:
        vm.start()
        started = time.monotonic()
        from kata_lab.image.boot import USERLAND_MARKER

        vm.console.expect(USERLAND_MARKER, timeout=300)
        instructions = vm.metrics().instructions
        seconds = time.monotonic() - started
    import json

    print(
        json.dumps(
            {
                "first_instruction_s": started - began,
                "first_instruction_at": started,
                "userland_s": seconds,
                "userland_instructions": instructions,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
