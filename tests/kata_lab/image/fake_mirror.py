"""A Debian mirror of a few tiny riscv64 packages on 127.0.0.1, with a signing key of its own, that lies on request."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import subprocess
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

KERNEL = bytes(56) + b"RSC\x05" + b"kernel" * 1000
BUSYBOX = b"\x7fELF busybox " * 500
RELEASE = "6.99-riscv64"
X86_KERNEL = bytes(0x202) + b"HdrS" + b"kernel" * 1000
INDEX = "main/binary-riscv64/Packages"
CONTENTS = "main/Contents-riscv64"


def build_deb(
    control: str, files: Mapping[str, bytes | str], compression: str = "xz", data_name: str | None = None
) -> bytes:
    """A binary package, written by hand after deb(5)."""
    packers: dict[str, Callable[[bytes], bytes]] = {"xz": lzma.compress, "": bytes, "gz": gzip.compress}
    pack = packers[compression]
    suffix = f".{compression}" if compression else ""
    members = {
        "debian-binary": b"2.0\n",
        f"control.tar{suffix}": pack(_tar({"./control": control.encode()})),
        data_name or f"data.tar{suffix}": pack(
            _tar({name if name.startswith("/") else f"./{name}": data for name, data in files.items()})
        ),
    }
    return build_ar(members)


def build_ar(members: dict[str, bytes]) -> bytes:
    archive = b"!<arch>\n"
    for name, data in members.items():
        archive += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return archive


def _tar(files: Mapping[str, bytes | str]) -> bytes:
    """A tar of files (bytes) and symbolic links (the target as a str)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type = tarfile.SYMTYPE
                info.linkname = data
                archive.addfile(info)
                continue
            info.size = len(data)
            info.mode = 0o755
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def build_module(depends: str = "", alias: str = "") -> bytes:
    """A kernel module that consists of its .modinfo section, by hand after elf(5), with a signature appended."""
    information = f"{f'alias={alias}' if alias else 'license=GPL'}\0depends={depends}\0name=x\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    start = 64
    table = start + len(information) + len(names)
    header = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 243, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    sections = bytes(64) + section(1, 1, start, len(information))
    sections += section(10, 3, start + len(information), len(names))
    signature = b"signature" + bytes(8) + (9).to_bytes(4, "big") + b"~Module signature appended~\n"
    return header + information + names + sections + signature


class Signer:
    """An OpenPGP key in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700)
        self._gpg("--quick-generate-key", "kata-lab test <test@example.invalid>", "ed25519", "sign", "never")
        self.keyring = directory / "keyring.gpg"
        self.keyring.write_bytes(self._gpg("--export"))

    def sign(self, text: bytes) -> bytes:
        return self._gpg("--clearsign", stdin=text)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self._directory), "--kill", "all"], check=True)

    def _gpg(self, *arguments: str, stdin: bytes = b"") -> bytes:
        command = [
            "gpg",
            "--homedir",
            str(self._directory),
            "--batch",
            "--passphrase",
            "",
            "--pinentry-mode",
            "loopback",
        ]
        return subprocess.run([*command, *arguments], input=stdin, capture_output=True, check=True).stdout


class FakeMirror:
    """The mirror's files by path, what to do wrong with them, and how often each was asked for.

    `faults` maps the end of a path to "wrong hash", "wrong size", "truncated" or "stall" (until `release` is set).
    """

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self.faults: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.stalled = threading.Event()
        self.release = threading.Event()
        self.files: dict[str, bytes] = {}
        self.uri = ""
        self.architecture = "riscv64"
        self.suite = "trixie"
        self.packages: dict[str, tuple[str, dict[str, bytes | str]]] = {}
        self.modules: dict[str, bytes] = {}
        self.built_in: list[str] = []
        self.contents = True
        self.unlisted = ""
        self.publish()

    def publish(self, release: str = RELEASE, signer: Signer | None = None, codename: str = "trixie") -> None:
        """Serve an archive whose kernel has this release, signed by `signer`.

        A `suite` other than "trixie" is a second name, under which the same is served; `codename` is what is signed.

        `packages` (name → dependencies and files) are in it too, `modules` (name → content) and `built_in` in its
        kernel, and the index Contents if `contents` is true, without the package `unlisted`.
        """
        architecture = self.architecture
        program = X86_KERNEL if architecture == "amd64" else KERNEL
        kernel: dict[str, bytes | str] = {f"boot/vmlinux-{release}": program + release.encode()}
        for name, content in self.modules.items():
            kernel[f"usr/lib/modules/{release}/kernel/{name}.ko.xz"] = lzma.compress(content)
        if self.built_in:
            lines = "".join(f"kernel/drivers/{name}.ko\n" for name in self.built_in)
            kernel[f"usr/lib/modules/{release}/modules.builtin"] = lines.encode()
        packages: dict[str, tuple[str, dict[str, bytes | str]]] = {
            f"linux-image-{architecture}": (f"linux-image-{release} (= 1)", {}),
            f"linux-image-{release}": ("", kernel),
            "busybox-static": ("", {"usr/bin/busybox": BUSYBOX}),
            **self.packages,
        }
        self.files = {}
        index = ""
        for name, (depends, files) in packages.items():
            control = (
                f"Package: {name}\nVersion: 1:1-1\nArchitecture: {architecture}\nMaintainer: test\nDescription: test\n"
            )
            control += f"Depends: {depends}\n" if depends else ""
            deb = build_deb(control, files)
            path = f"pool/{name}_1-1_{architecture}.deb"
            self.files[f"/{path}"] = deb
            index += f"{control}Filename: {path}\nSize: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\n\n"
        indices = {INDEX.replace("riscv64", architecture): index.encode()}
        if self.contents:
            rows = [(path, name) for name, (_, files) in packages.items() for path in files if name != self.unlisted]
            text = "".join(f"{path:60} section/{name}\n" for path, name in sorted(rows)).encode()
            path = CONTENTS.replace("riscv64", architecture)
            indices |= {path: text, f"{path}.gz": gzip.compress(text, mtime=0)}
        statement = (
            f"Origin: Test\nSuite: {self.suite}\nCodename: {codename}\nDate: Sat, 01 Aug 2026 00:00:00 UTC\n"
            f"Architectures: {architecture}\nComponents: main\nSHA256:\n"
        ).encode()
        for path, data in indices.items():
            statement += f" {hashlib.sha256(data).hexdigest()} {len(data)} {path}\n".encode()
            if not path.endswith(CONTENTS.replace("riscv64", architecture)):  # which Debian has only compressed
                self.files[f"/dists/trixie/{path}"] = data
        self.files["/dists/trixie/Release"] = statement
        self.files["/dists/trixie/InRelease"] = (signer or self._signer).sign(statement)

        for path, data in tuple(self.files.items()):
            self.files[path.replace("/dists/trixie/", f"/dists/{self.suite}/")] = data

    def requests_for(self, ending: str) -> int:
        return sum(count for path, count in self.requests.items() if path.endswith(ending))

    def answer(self, path: str) -> tuple[bytes, int] | None:
        """The bytes to send and the length to announce."""
        self.requests[path] += 1
        data = self.files.get(path)
        if data is None:
            return None
        for ending, fault in self.faults.items():
            if path.endswith(ending):
                match fault:
                    case "wrong hash":
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    case "wrong size":
                        data += b"more"
                    case "truncated":
                        return data[: len(data) // 2], len(data)
                    case "stall":
                        self.stalled.set()
                        self.release.wait(30)
        return data, len(data)


@contextmanager
def serving(mirror: FakeMirror) -> Iterator[FakeMirror]:
    """Serve the mirror on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = mirror.answer(unquote(self.path))
            if answer is None:
                self.send_error(404)
                return
            data, length = answer
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            try:
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="fake-mirror")
    thread.start()
    mirror.uri = f"http://127.0.0.1:{server.server_port}"
    try:
        yield mirror
    finally:
        mirror.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
