"""Starting a file system process."""

from __future__ import annotations

from pathlib import Path

from vmm.config import VhostFsConfig
from vmm.rpc.process import ServerProcess
from vmm.vhost.control import control_path


class FsProcess(ServerProcess):
    """``python -m vmm.vhost.fs``, which ends with this process, with :meth:`close`, and with its front end.

    Args:
        socket: where it shall listen, in a directory that only this user can enter.
        path: the directory that it shares; None for only what is added later.
        read_only: the guest can only read.
        cache: as :class:`~vmm.config.FsConfig` has it.
        queues: request queues, 1 to 8.

    Raises:
        RpcError: it cannot be started; in its own words.
    """

    def __init__(
        self,
        socket: Path,
        *,
        path: Path | None = None,
        read_only: bool = False,
        cache: str = "auto",
        queues: int = 1,
    ) -> None:
        self.socket = socket
        self._queues = queues
        arguments = [str(socket), "--cache", cache, "--queues", str(queues)]
        arguments += ["--path", str(path)] if path is not None else []
        arguments += ["--read-only"] if read_only else []
        super().__init__("vmm.vhost.fs", arguments, "the file system process")

    def device(self, tag: str, name: str = "") -> VhostFsConfig:
        """The configuration of the device by which a VM's guest has it."""
        return VhostFsConfig(name=name, tag=tag, socket=self.socket, queues=self._queues)

    def close(self, timeout: float = 10.0) -> str:
        """As :meth:`ServerProcess.close`; also removes the sockets that it left behind if it was killed."""
        how = super().close(timeout)
        for each in (self.socket, control_path(self.socket)):
            each.unlink(missing_ok=True)
        return how
