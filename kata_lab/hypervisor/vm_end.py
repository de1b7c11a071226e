"""How a VM ends that consists of a VMM and of a file system process, of which either can be the first to go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmm.vhost.process import FsProcess

VMM_SECONDS: Final = 10.0  #: until a VMM says why it went whose file system process ended well


async def end_of_vm(vmm: asyncio.Future[str], files: FsProcess | None) -> str:
    """Wait for the end of the VMM or of the file system process, without which its guest hangs; says how it went.

    A file system process that ends well does it because its VMM has gone: why, only the VMM can tell, a moment later.

    Args:
        vmm: how the VMM ended.
        files: the file system process, if there is one.
    """
    if files is None:
        return await vmm
    gone = asyncio.wrap_future(files.ended)
    try:
        await asyncio.wait((vmm, gone), return_when=asyncio.FIRST_COMPLETED)
        if files.status == 0:
            await asyncio.wait((vmm,), timeout=VMM_SECONDS)
        return vmm.result() if vmm.done() else gone.result()
    finally:
        gone.cancel()
