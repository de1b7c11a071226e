"""The debug console: a shell on a terminal for whoever connects to port 1026."""

import asyncio

import linux
from streams import Stream, listen

PORT = 1026
_SHELL = ["/bin/sh", "-i"]
_ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=vt100")


async def _carry(source, target):
    """Until one of them ends."""
    buffer = bytearray(4096)
    try:
        while count := await source.read(buffer, len(buffer)):
            await target.write(memoryview(buffer)[:count])
    except OSError:
        pass
    source.close()
    target.close()


def _begin(sandbox, connection):
    ours, theirs = linux.open_terminal()
    terminal = Stream(ours)
    try:
        # The shell ends with its terminal.
        shell = sandbox.children.spawn(_SHELL, _ENVIRONMENT, (theirs, theirs, theirs), True)
    except OSError:
        terminal.close()
        raise
    finally:
        linux.close(theirs)
    asyncio.create_task(_carry(connection, terminal))
    asyncio.create_task(_carry(terminal, connection))
    sandbox.log("info", f"debug console is process {shell.number}")


async def serve(sandbox):
    listener = await listen(PORT)
    while True:
        connection = await listener.accept()
        try:
            _begin(sandbox, connection)
        except OSError as error:
            connection.close()
            sandbox.log("error", f"no debug console: {linux.explain(error)}")
