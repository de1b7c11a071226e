"""The agent: it serves Kata's agent API on port 1024 and carries it out in this guest; log lines are on port 1025.

Ports are those of vsock, or in a guest without it those of a virtio console (``ports.py``).
"""

import asyncio
import gc

import bundle
import streams
from interface import MESSAGES
from requests import Reader
from rpc import serve
from sandbox import Sandbox

RPC_PORT, LOG_PORT = 1024, 1025
COLLECT_AFTER = 1 << 20  # bytes of the heap that were taken; what is not collected makes every fork cost more


async def serve_log(sandbox):
    """Log lines, one JSON object each, to whoever connects: the last ones, then new ones as they come."""

    async def tell(connection):
        told = 0
        try:
            while True:
                new = min(sandbox.log_count - told, len(sandbox.log_lines))
                told = sandbox.log_count
                for line in sandbox.log_lines[-new:] if new else ():
                    await connection.write(line.encode() + b"\n")
                if told == sandbox.log_count:
                    sandbox.log_added.clear()
                    await sandbox.log_added.wait()
        except OSError:
            connection.close()

    listener = await streams.listen(LOG_PORT)
    while True:
        asyncio.create_task(tell(await listener.accept()))


async def main():
    gc.threshold(COLLECT_AFTER)
    streams.begin()
    sandbox = Sandbox()
    sandbox.begin()
    asyncio.create_task(serve_log(sandbox))
    with open("/proc/cmdline") as file:
        if " agent.debug_console" in " " + file.read():
            import console

            asyncio.create_task(console.serve(sandbox))
    await serve(RPC_PORT, sandbox.handlers(), Reader(MESSAGES, bundle.DESCRIBED, bundle.key_of))


asyncio.run(main())
