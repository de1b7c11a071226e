"""The store of unpacked layers in the cache: each unpacked once, verified, kept while somebody uses it.

A layer lies in ``<cache>/layers/v1/<digits>/tree``; the number changes when the form of layers does. The digits are
those of its chain (the layers up to it, as ``ChainID`` of the OCI image specification 1.1, config.md), because what a
layer leaves unsaid of a directory comes from those beneath; images with the same base share its layers. ``.mapped``
behind the digits says that owners are kept as :mod:`kata_lab.oci.attributes` says, which is so unless root unpacked. A
layer is unpacked under a temporary name, and renamed when both its digests are right (that of the blob, and that of the
unpacked archive, ``diff_id``) and the disk has all of it.

Who uses a layer holds a shared lock (flock(2)) on its directory, which ends with the process however it ends, and
prune() leaves such layers alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import gzip
import hashlib
import io
import os
import shutil
import zlib
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from kata_lab.image.store import PARTIAL, exclusive, publish, scratch
from kata_lab.oci.attributes import can_own
from kata_lab.oci.blobs import BlobSource, opened_blob
from kata_lab.oci.descriptor import LAYER_COMPRESSIONS, Descriptor, OciError
from kata_lab.oci.layered import LayeredTree
from kata_lab.oci.unpack import DEFAULT_LIMITS, LayerWriter, Limits
from kata_lab.paths import cache_directory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FORMAT: Final = 1
MAPPED_ENDING: Final = ".mapped"

_TREE = "tree"
_GZIP_MAGIC = b"\x1f\x8b"
_PACKED_MAGICS = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2"}


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The digest of every chain of layers, lowest first."""
    chains: list[str] = []
    for diff_id in diff_ids:
        chain = diff_id
        if chains:
            chain = f"sha256:{hashlib.sha256(f'{chains[-1]} {diff_id}'.encode()).hexdigest()}"
        chains.append(chain)
    return chains


@dataclass(frozen=True)
class LayerSource:
    """Where a layer comes from: its blob, and the digest of the unpacked archive."""

    blob: Descriptor
    diff_id: str


class LayerStack:
    """Unpacked layers in use, as a context manager.

    Attributes:
        paths: their directories, lowest first; to be read only.
        mapped: whether owners are kept as :mod:`kata_lab.oci.attributes` says.
    """

    def __init__(self, paths: Sequence[Path], mapped: bool, leases: ExitStack) -> None:
        self.paths = list(paths)
        self.mapped = mapped
        self._leases = leases

    @property
    def tree(self) -> LayeredTree:
        """The layers as one tree."""
        return LayeredTree(self.paths, self.mapped)

    def close(self) -> None:
        """Let prune() have the layers."""
        self._leases.close()

    def __enter__(self) -> LayerStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class LayerStore:
    """The store of unpacked layers.

    Args:
        mapped: keep owners in attributes; None as this process must.
        limits: how much one layer may be.
    """

    def __init__(self, mapped: bool | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self.directory = cache_directory() / "layers" / f"v{FORMAT}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._mapped = not can_own(self.directory) if mapped is None else mapped
        self._limits = limits

    def ensure(self, source: BlobSource, layers: Sequence[LayerSource]) -> LayerStack:
        """The layers of an image, lowest first; what the store lacks is unpacked.

        Raises:
            OciError: a blob is missing or wrong, or a layer is refused; see :mod:`kata_lab.oci.unpack`.
            ImageError: the cache cannot be written to.
        """
        places = [self._place(chain) for chain in chain_ids([each.diff_id for each in layers])]
        with ExitStack() as leases:
            found: list[Path] = []
            for layer, place in zip(layers, places, strict=True):
                while not _lease(place, leases):
                    with exclusive(self.directory):
                        if not place.exists():
                            self._unpack(source, layer, place, LayeredTree(found, self._mapped))
                found.append(place / _TREE)
            return LayerStack(found, self._mapped, leases.pop_all())

    def prune(self, kept_chains: Set[str]) -> int:
        """Remove layers that nobody uses and that are of none of the chains.

        Returns:
            how many were removed.
        """
        kept = {self._name(chain) + ending for chain in kept_chains for ending in ("", MAPPED_ENDING)}
        removed = 0
        with exclusive(self.directory):
            for place in sorted(self.directory.iterdir()):
                if place.name in kept or place.name == PARTIAL or not place.is_dir():
                    continue
                descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    with scratch(self.directory) as old:
                        place.rename(old / place.name)
                    removed += 1
                except BlockingIOError:
                    pass  # in use
                finally:
                    os.close(descriptor)
        return removed

    def _place(self, chain: str) -> Path:
        return self.directory / (self._name(chain) + (MAPPED_ENDING if self._mapped else ""))

    @staticmethod
    def _name(chain: str) -> str:
        return chain.partition(":")[2]

    def _unpack(self, source: BlobSource, layer: LayerSource, place: Path, lower: LayeredTree) -> None:
        origin = f"the layer {layer.blob.digest} in {source.origin}"
        with scratch(self.directory) as partial:
            new = partial / place.name
            new.mkdir()
            try:
                with opened_blob(source, layer.blob) as blob:
                    plain = _Hashed(_plain(blob, layer.blob, origin), layer.diff_id)
                    LayerWriter(new / _TREE, lower, self._mapped, self._limits, origin).unpack(cast(BinaryIO, plain))
                    plain.check(origin)
                new.chmod(0o700)
                _sync_file_system(new)
                publish(new, place)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise OciError(f"{origin} cannot be unpacked ({error})") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)


def _sync_file_system(directory: Path) -> None:
    """Wait until the disk has all of a layer: once, since a sync of every file would take far longer."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(descriptor)


def _lease(place: Path, leases: ExitStack) -> bool:
    """Hold a layer, if it is there."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        there = os.path.samestat(place.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        there = False  # pruned while we waited
    if there:
        leases.callback(os.close, descriptor)
    else:
        os.close(descriptor)
    return there


def _plain(blob: io.RawIOBase, descriptor: Descriptor, origin: str) -> io.BufferedIOBase:
    buffered = io.BufferedReader(blob, 1 << 20)
    magic = buffered.peek(4)[:4]
    if LAYER_COMPRESSIONS[descriptor.media_type] == "gzip" or magic[:2] == _GZIP_MAGIC:
        return cast(io.BufferedIOBase, gzip.GzipFile(fileobj=buffered))
    for known, name in _PACKED_MAGICS.items():
        if magic.startswith(known):
            raise OciError(f"{origin} is compressed with {name}: it must be a tar archive, plain or with gzip")
    return buffered


class _Hashed(io.RawIOBase):
    """Passes on an unpacked archive while it hashes it."""

    def __init__(self, source: io.BufferedIOBase, diff_id: str) -> None:
        self._source = source
        algorithm, _, self._expected = diff_id.partition(":")
        self._hash = hashlib.new(algorithm)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        got = self._source.readinto(buffer)
        self._hash.update(memoryview(buffer).cast("B")[:got])
        return got

    def check(self, origin: str) -> None:
        found = self._hash.hexdigest()
        if found != self._expected:
            raise OciError(
                f"{origin} unpacks to an archive with the digest {self._hash.name}:{found}: "
                f"the image's configuration wants {self._expected}"
            )
