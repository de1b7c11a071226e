"""The control channel of a file system process: what it shares comes and goes while a guest uses it.

A unix socket beside the vhost-user one, ``<socket>.control``, which speaks as a VMM process does (:mod:`vmm.rpc.wire`)
and knows one action, :class:`~vmm.actions.ManipulateFsBackend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from vmm import actions
from vmm.devices.virtio.fs.directory import SharedDirectory, manipulate
from vmm.errors import ConfigError, VmmError
from vmm.rpc import wire
from vmm.rpc.codec import CodecError
from vmm.rpc.endpoint import PrivateListener, require_owner
from vmm.rpc.server import HELLO_SECONDS, read_frame

MAX_CLIENTS: Final = 16
_WHAT: Final = "the file system process"


def control_path(path: Path) -> Path:
    """Where the control channel of the process at ``path`` is."""
    return path.with_name(path.name + ".control")


class ControlServer:
    """Serves the control channel.

    Args:
        listener: its socket.
        share: what is manipulated.
    """

    def __init__(self, listener: PrivateListener, share: SharedDirectory) -> None:
        self._listener = listener
        self._share = share
        self._clients = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Serve, from now on."""
        self._server = await asyncio.start_unix_server(self._connected, sock=self._listener.socket)

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            with contextlib.suppress(OSError, EOFError, TimeoutError, asyncio.CancelledError):
                if self._clients <= MAX_CLIENTS:
                    await self._serve(reader, writer)
        finally:
            self._clients -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            require_owner(writer.get_extra_info("socket"))
            async with asyncio.timeout(HELLO_SECONDS):
                wire.require_same_version(await read_frame(reader), _WHAT)
        except VmmError as error:
            writer.write(wire.pack(wire.Refused(str(error))))
            await writer.drain()
            return
        writer.write(wire.pack(wire.Welcome(wire.PROTOCOL, wire.version(), os.getpid())))
        while True:
            data = b""
            try:
                data = await read_frame(reader)
                reply: wire.Message = self._answer(data)
            except VmmError as error:
                reply = wire.failure(wire.request_number(data), error, "ManipulateFsBackend")
            writer.write(wire.pack(reply))
            await writer.drain()

    def _answer(self, data: bytes) -> wire.Answer:
        match wire.unpack(data):
            case wire.Request(number, actions.ManipulateFsBackend() as action):
                manipulate(self._share, action)
                return wire.Answer(number, actions.Empty())
            case wire.Request(_, action):
                raise ConfigError(f"{_WHAT} knows ManipulateFsBackend only, not {action.name}")
            case message:
                raise CodecError(f"a client sends requests, not {type(message).__name__}")
