"""ttrpc on asyncio: gRPC's calls without HTTP/2, over one byte stream (ttrpc, PROTOCOL.md, versions 1.0 and 1.2).

::

    async with await Client.connect(path, interface) as client:
        await client.call("grpc.Health", "Check", {})

    server = Server(interface)
    server.add("grpc.Health", {"Check": check})     # async def check(request, call): return {...}
    async with await server.listen(path): ...

Messages are dictionaries (:mod:`kata_lab.protocol`). A call that fails raises :class:`RpcError` with a gRPC status
code.
"""

from __future__ import annotations

from kata_lab.ttrpc.client import Client, ClientStream
from kata_lab.ttrpc.errors import RpcError, StatusCode
from kata_lab.ttrpc.server import Call, Server

__all__ = ["Call", "Client", "ClientStream", "RpcError", "Server", "StatusCode"]
