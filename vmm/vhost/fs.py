"""``python -m vmm.vhost.fs SOCKET``: shared directories served by a process of their own, as Kata 2 runs virtiofsd.

It waits for one front end at the socket, serves it, and ends with it, with status 0 then alone. Like a VMM process it
ends with whoever started it, too (:mod:`vmm.rpc.process`). Its control channel is :mod:`vmm.vhost.control`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Final

from vmm.config import FsConfig
from vmm.devices.virtio.fs.device import FsDevice
from vmm.errors import VmmError
from vmm.rpc.endpoint import PrivateListener, require_owner
from vmm.rpc.process import end_within, on_orphaned, say_listening
from vmm.vhost.backend import BackEnd
from vmm.vhost.control import ControlServer, control_path
from vmm.vhost.messages import VhostError

FRONT_END_SECONDS: Final = 60.0  #: until there must be a front end
CLOSE_SECONDS: Final = 20.0  #: for requests under way, before the process just ends


class FsServer:
    """Serves a share to one front end.

    Args:
        listener: the vhost-user socket.
        share: what is served.
    """

    def __init__(self, listener: PrivateListener, share: FsDevice) -> None:
        self._listener = listener
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[str] = self._loop.create_future()
        self._back_end: BackEnd | None = None

    def end(self, why: str = "") -> None:
        """Return from :meth:`run`; with an error if there is a sentence why."""
        if not self._over.done():
            self._over.set_result(why)

    async def run(self) -> None:
        """Serve until the front end has gone.

        Raises:
            VhostError: the front end broke a rule, or the share failed.
        """
        self._loop.add_reader(self._listener.socket, self._accept)
        alone = self._loop.call_later(FRONT_END_SECONDS, self._alone)
        try:
            say_listening()
            why = await self._over
        finally:
            alone.cancel()
            end_within(CLOSE_SECONDS)
            self._loop.remove_reader(self._listener.socket)
            if self._back_end is not None:
                self._back_end.close()
        if why:
            raise VhostError(f"the file system process gave up: {why}")

    def _alone(self) -> None:
        if self._back_end is None:
            self.end(f"no front end came within {FRONT_END_SECONDS:g} s")

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.socket.accept()
        except OSError:
            return
        with contextlib.ExitStack() as refused:
            refused.callback(connection.close)
            with contextlib.suppress(VmmError):
                require_owner(connection)
                if self._back_end is None:
                    refused.pop_all()
                    self._back_end = BackEnd(self._share, connection, self.end)


async def serve(path: Path, config: FsConfig) -> None:
    """Serve at ``path`` until the front end, or the process that started this one, has gone.

    Raises:
        VmmError: no socket can be made there, the directory cannot be shared, or serving failed.
    """
    with contextlib.ExitStack() as stack:
        share = FsDevice(config)
        stack.callback(share.close)
        listener = PrivateListener(path)
        stack.callback(listener.close)
        control_listener = PrivateListener(control_path(path))
        stack.callback(control_listener.close)
        server, control = FsServer(listener, share), ControlServer(control_listener, share)
        loop = asyncio.get_running_loop()
        on_orphaned(loop, server.end)
        loop.add_signal_handler(signal.SIGTERM, server.end, "it was told to by SIGTERM")
        await control.start()
        stack.callback(control.close)
        await server.run()


def main() -> int:
    """Serve; the exit status is 0, or 1 after one sentence on standard error."""
    parser = argparse.ArgumentParser("python -m vmm.vhost.fs", description="Serve a shared directory over vhost-user.")
    parser.add_argument("socket", type=Path, help="path of the socket, in a directory that only this user can enter")
    parser.add_argument("--path", type=Path, help="the directory; without it, only what the control channel adds")
    parser.add_argument("--read-only", action="store_true", help="the guest can only read")
    parser.add_argument("--cache", default="auto", help="none, auto or always, as FsConfig has it")
    parser.add_argument("--queues", type=int, default=1, help="request queues, 1 to 8")
    given = parser.parse_args()
    try:
        config = FsConfig(
            tag="shared", path=given.path, read_only=given.read_only, cache=given.cache, queues=given.queues
        )
        asyncio.run(serve(given.socket, config))
    except VmmError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
