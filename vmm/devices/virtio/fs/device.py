"""The file system device (virtio 1.2, section 5.11): FUSE requests in, answers out.

Queue 0 is for what must not wait (FORGET, INTERRUPT), the others are for requests. A buffer's readable part is a FUSE
request, its writable part takes the answer (5.11.6); one without an answer is given back empty.

Most requests are served at once, on the thread of the vCPU that notified, reads included. What is known to wait for the
host's disk (fsync, reserving and copying much) goes to a worker. A lock that is taken is tried again: when the guest
gives one up, and by a timer, since a process of the host may give one up. INTERRUPT ends such waiting, and so does a
pause (both with EINTR), so that a paused device holds no buffer.

A buffer that has no room for a request's or an answer's header is a mistake, for which the device asks for a reset;
everything else that is wrong with a request is an errno in its answer.

Left out: DAX (no shared memory region is offered), notifications (VIRTIO_FS_F_NOTIFICATION). A saved device has its
nodes and open files but not their locks; a file that has no name and no handle any more is ESTALE after a restore, and
so is everything of an export that was not added by then, or of a directory that is another one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmm.config import FsConfig
from vmm.devices.virtio.fs.directory import SharedDirectory
from vmm.devices.virtio.fs.protocol import ARGUMENTS, IN_HEADER, INTERRUPT_IN, OUT_HEADER, RESULTS, UNANSWERED, Opcode
from vmm.devices.virtio.fs.server import FileServer
from vmm.devices.virtio.fs.share import Answer, Filled, Request, Share, Slow, Waiting, checked
from vmm.devices.virtio.queue import Chain, Queue, QueueError
from vmm.errors import ConfigError

TAG_BYTES: Final = 36
_CONFIG: Final = struct.Struct(f"<{TAG_BYTES}sI")  # tag, num_request_queues
_PRIORITY_QUEUE: Final = 128
#: A buffer of 1 MiB in pages and its headers, which Linux wants to be shorter than the queue.
_REQUEST_QUEUE: Final = 512
_WORKERS: Final = 2
_WAITERS_SHARE: Final = 8  #: of the queue may be taken by buffers that wait for a lock
_LAST_OPCODE: Final = max(Opcode)
_FIRST_RETRY: Final = 0.001  # seconds
_LAST_RETRY: Final = 0.05
_MAY_FREE_LOCKS: Final = frozenset({Opcode.SETLK, Opcode.SETLKW, Opcode.FLUSH, Opcode.RELEASE, Opcode.FORGET})


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A request that waits for a lock."""

    queue: Queue
    chain: Chain
    attempt: Callable[[], bool]


class FsDevice(SharedDirectory):
    """A host directory for the guest.

    Args:
        config: which directory, and how.
        descriptors: how many of the host's descriptors it may use, 0 for a quarter of what the process may have.

    Raises:
        ConfigError: the directory is not there or cannot be opened.
    """

    DEVICE_ID: ClassVar[int] = 26
    KIND: ClassVar[str] = "fs"

    def __init__(self, config: FsConfig, descriptors: int = 0) -> None:
        super().__init__(config.name)
        self._tag = config.tag.encode()
        self._request_queues = config.queues
        try:
            self.share = Share(config.path, config.read_only, config.cache, descriptors)
        except OSError as error:
            raise ConfigError(
                f"fs path {str(config.path)!r} cannot be shared: {error.strerror}; it must be a directory"
            ) from error
        self._server = FileServer(self.share)
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix=f"{self.name}-worker")
        self._slow: dict[Future[bytes | int], tuple[Queue, Chain, int]] = {}
        self._waiters: dict[int, _Waiter] = {}  # by the request's unique number
        self._timer: asyncio.TimerHandle | None = None
        self._retry_seconds = _FIRST_RETRY
        #: Requests so far, by opcode; 0 counts those of unheard-of ones.
        self.requests: Counter[int] = Counter()

    def add(self, name: str, path: os.PathLike[str], *, read_only: bool = False, override_stat: bool = False) -> None:
        """Let a directory or file of the host appear in the share's top directory, from any thread.

        Args:
            name: under which it appears.
            path: what; a symbolic link is followed now, and never again.
            read_only: the guest can only read here. The same file may be writable where another export has it.
            override_stat: owner, mode and kind of the files are in :data:`~vmm.devices.virtio.fs.override.OVERRIDE`,
                where they have that attribute; what the guest makes gets it, and what it changes changes there.

        Raises:
            ConfigError: the share has a directory of its own, the name is taken or none, or there is nothing at the
                path.
        """
        if not self.share.inodes.virtual:
            raise ConfigError(f"{self.name} shares a directory of its own; leave its path out to add others to it")
        try:
            encoded = checked(os.fsencode(name))
            if b"\0" in encoded:
                raise ValueError(name)
            with self.lock:
                self.share.inodes.add(encoded, path, read_only, override_stat)
        except OSError as error:
            raise ConfigError(f"{os.fspath(path)!r} cannot be shared as {name!r}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{name!r} is no name of a file") from error

    def remove(self, name: str) -> None:
        """Undo :meth:`add`, from any thread: nothing of it is open on the host any more, and what the guest still knows
        of it is stale (ESTALE; EBADF for what it had open).

        Raises:
            ConfigError: nothing is shared under this name.
        """
        try:
            with self.lock:
                self.share.remove(os.fsencode(name))
        except OSError as error:
            raise ConfigError(f"{self.name} shares nothing as {name!r}") from error

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (_PRIORITY_QUEUE,) + (_REQUEST_QUEUE,) * self._request_queues

    @property
    def config_space(self) -> bytes:
        return _CONFIG.pack(self._tag, self._request_queues)

    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            self._serve(queue, chain)
        queue.signal()

    def _serve(self, queue: Queue, chain: Chain) -> None:
        if chain.readable_bytes < ARGUMENTS:
            raise QueueError(
                f"a request of {self.name} has {chain.readable_bytes} bytes, fewer than the {ARGUMENTS} of its header"
            )
        data = chain.read(0, Request.HEAD)
        length, opcode, unique, node, uid, gid, _, _ = IN_HEADER.unpack(data)
        if queue.tracing:
            chain.detail = f"{_name(opcode)} node {node}"
        self.requests[opcode if opcode <= _LAST_OPCODE else 0] += 1
        if opcode not in UNANSWERED and chain.writable_bytes < RESULTS:
            raise QueueError(
                f"a request of {self.name} has room for an answer of {chain.writable_bytes} bytes, fewer than the"
                f" {RESULTS} of its header"
            )
        if length < len(data):
            data = data[:length]
        request = Request(chain, data, length, unique, node, uid, gid)
        outcome: bytes | int | None
        try:
            if not ARGUMENTS <= length <= chain.readable_bytes:
                raise ValueError(length)
            if opcode == Opcode.INTERRUPT:
                answer = self._interrupt(request)
            else:
                answer = self._server.answer(opcode, request)
            if isinstance(answer, Slow):
                self._start(queue, chain, unique, answer)
                return
            if isinstance(answer, Waiting):
                self._wait(queue, chain, unique, answer)
                return
            outcome = answer
        except OSError as error:
            outcome = -(error.errno or errno.EIO)
        except (ValueError, OverflowError, struct.error):
            outcome = -errno.EINVAL
        except MemoryError:
            outcome = -errno.ENOMEM
        written = 0 if opcode in UNANSWERED else self._reply(chain, unique, outcome)
        queue.push(chain, written)
        if self._waiters and opcode in _MAY_FREE_LOCKS:
            self._retry()

    @staticmethod
    def _reply(chain: Chain, unique: int, answer: bytes | int | None) -> int:
        """Write the answer: results, :class:`Filled`, or a negated errno; returns its length."""
        if isinstance(answer, bytes):
            length = RESULTS + len(answer)
            if length <= chain.writable_bytes:
                return chain.write(OUT_HEADER.pack(length, 0, unique) + answer)
            answer = -errno.EINVAL
        if isinstance(answer, Filled):
            chain.write(OUT_HEADER.pack(RESULTS + answer, 0, unique))
            return RESULTS + answer
        return chain.write(OUT_HEADER.pack(RESULTS, answer or 0, unique))

    # Answers that come later.

    def _start(self, queue: Queue, chain: Chain, unique: int, slow: Slow) -> None:
        future = self._workers.submit(_work, slow)
        self._slow[future] = (queue, chain, unique)
        future.add_done_callback(self._worked)

    def _worked(self, future: Future[bytes | int]) -> None:
        with self.served():
            self._finish(future)

    def _finish(self, future: Future[bytes | int]) -> None:
        # After a reset, and when a pause waited for it, there is nothing left to answer.
        pending = self._slow.pop(future, None)
        if pending is not None:
            queue, chain, unique = pending
            self._answer(queue, chain, unique, future.result())

    def _wait(self, queue: Queue, chain: Chain, unique: int, waiting: Waiting) -> None:
        # Whoever waits holds a buffer of several descriptors; with all of them held nobody could give a lock up.
        if unique in self._waiters or len(self._waiters) >= max(queue.size // _WAITERS_SHARE, 1):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        self._waiters[unique] = _Waiter(queue, chain, waiting.attempt)
        self._retry_seconds = _FIRST_RETRY
        self.host.loop.call_soon_threadsafe(self._set_timer)

    def _set_timer(self) -> None:
        with self.served():
            if self._waiters and self._timer is None:
                self._timer = self.host.loop.call_later(self._retry_seconds, self._timed)

    def _timed(self) -> None:
        with self.served():
            self._timer = None
            self._retry()
            self._retry_seconds = min(2 * self._retry_seconds, _LAST_RETRY)
            self._set_timer()

    def _retry(self) -> None:
        for unique, waiter in list(self._waiters.items()):
            try:
                if waiter.attempt():
                    self._release(unique, b"")
            except OSError as error:
                self._release(unique, -(error.errno or errno.EIO))

    def _release(self, unique: int, answer: bytes | int) -> None:
        waiter = self._waiters.pop(unique)
        self._answer(waiter.queue, waiter.chain, unique, answer)

    def _answer(self, queue: Queue, chain: Chain, unique: int, answer: bytes | int) -> None:
        # A queue that the driver took away meanwhile leaves its buffers to the driver.
        if queue.held.get(chain.head) == chain.serial:
            queue.push(chain, self._reply(chain, unique, answer))
            queue.signal()

    def _interrupt(self, request: Request) -> Answer:
        (unique,) = INTERRUPT_IN.unpack(request.data, ARGUMENTS)
        if unique in self._waiters:
            self._release(unique, -errno.EINTR)
        return None

    # The device's life.

    def deactivate(self) -> None:
        self._slow.clear()
        self._waiters.clear()
        self._server.end()

    def pause(self) -> None:
        for unique in list(self._waiters):
            self._release(unique, -errno.EINTR)
        pending = list(self._slow)
        wait(pending)
        for future in pending:
            self._finish(future)

    def save_own(self) -> dict[str, Any]:
        return {
            "begun": self._server.begun,
            "features": int(self.share.features),
            "nodes": self.share.inodes.save(),
            "opened": self.share.opened.save(),
        }

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self._server.end()
        if own["begun"]:
            self._server.resume(own["features"])
            self.share.inodes.restore(own["nodes"])
            self.share.opened.restore(own["opened"], self.share.writeback)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._workers.shutdown()
        self.share.close()


def _work(slow: Slow) -> bytes | int:
    try:
        return slow.work()
    except OSError as error:
        return -(error.errno or errno.EIO)
    except OverflowError:
        return -errno.EINVAL
    finally:
        slow.finish()


def _name(opcode: int) -> str:
    with suppress(ValueError):
        return Opcode(opcode).name.lower()
    return f"opcode {opcode}"
