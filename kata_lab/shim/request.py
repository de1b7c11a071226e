"""From what somebody asked for to what the runtime takes: a configuration and a root file system.

A request is plain JSON, as a container's record keeps it::

    {"image": "busybox", "args": ["sh"], "env": ["A=1"], "wishes": {"tty": true, "memory": "64m"}, "restart": "never"}

``image`` names an OCI image; ``rootfs``, a directory, stands in its place, or ``bundle``, a directory with a
``config.json`` that says everything. The fields of ``wishes`` are those of :class:`kata_lab.oci.Wishes`. ``resources``
are limits that were changed later, as ``linux.resources`` of the OCI configuration.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from kata_lab.resource.rootfs import DirectoryRoot, LayeredRoot, RootFs
from kata_lab.runtime.errors import RuntimeFault

if TYPE_CHECKING:
    from kata_lab.oci import ImageHandle
    from kata_lab.oci.layered import LayeredTree

#: Names the JSON of an exec that only says how it differs from its container (:func:`exec_process`).
EXEC_WISH: Final = "katalab.v1.ExecWish"

RESTART_POLICIES: Final = ("never", "on-failure", "always")
LOCAL_IMAGE: Final = ("busybox", "busybox:latest")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A container that can be created.

    Attributes:
        spec: its OCI configuration.
        rootfs: its root file system.
        tree: its files as the host sees them, for names of users; None where only the guest knows.
        stop_signal: how its program wants to be asked to end; empty if it does not say.
        release: gives back what is kept open for it.
    """

    spec: dict[str, Any]
    rootfs: RootFs
    tree: LayeredTree | None
    stop_signal: str
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An OCI bundle.

    Attributes:
        path: the directory.
        mounts: what is mounted at its root before, as messages ``containerd.types.Mount``.
    """

    path: Path
    mounts: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class _DirectoryImage:
    """What make_spec() asks of an image, for a directory that says nothing."""

    reference: str
    config: Any
    root: Any

    def tree(self) -> Any:
        return self.root


def prepare(request: Mapping[str, Any]) -> Prepared:
    """Find the image, unpack it if need be, and make the configuration.

    Raises:
        KataLabError: there is no such image, or a wish cannot be granted.
    """
    prepared = _prepare(request)
    if resources := request.get("resources"):
        linux = prepared.spec.setdefault("linux", {})
        linux["resources"] = merged(linux.get("resources") or {}, resources)
    return prepared


def merged(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Objects within objects, in which what is changed takes the place of what was."""
    found = dict(before)
    for name, value in changes.items():
        earlier = before.get(name)
        found[name] = merged(earlier, value) if isinstance(value, dict) and isinstance(earlier, dict) else value
    return found


def _prepare(request: Mapping[str, Any]) -> Prepared:
    if request.get("bundle"):
        return prepare_bundle(Bundle(Path(request["bundle"])))
    from kata_lab.oci import ImageConfig, make_spec
    from kata_lab.oci.layered import LayeredTree

    arguments = request.get("args", ()), request.get("env", ())
    wishes = request.get("wishes", {})
    if request.get("rootfs"):
        path = Path(request["rootfs"])
        if not path.is_dir():
            raise RuntimeFault(f"the root file system {str(path)!r} must be a directory that exists")
        tree = LayeredTree([path])
        bare = cast("ImageHandle", _DirectoryImage(str(path), ImageConfig("riscv64"), tree))
        spec = make_spec(bare, *arguments, **wishes)
        return Prepared(spec, DirectoryRoot(path), tree, "", lambda: None)
    image = _opened(request["image"])
    try:
        spec = make_spec(image, *arguments, **wishes)
        root = LayeredRoot(image.layers(), image.override_stat, image.overlay_options)
        return Prepared(spec, root, image.tree(), image.config.stop_signal, image.close)
    except BaseException:
        image.close()
        raise


def prepare_bundle(bundle: Bundle) -> Prepared:
    """Read an OCI bundle, ``config.json`` and the root that it names, and carry its mounts out.

    Raises:
        KataLabError: the configuration or a mount is refused, or the root is no directory.
    """
    from kata_lab.oci import load_spec
    from kata_lab.oci.layered import LayeredTree

    spec = load_spec(bundle.path)
    root = spec.get("root") or {}
    path = bundle.path / root.get("path", "rootfs")
    with contextlib.ExitStack() as held:
        if bundle.mounts:
            from kata_lab.resource.snapshot_mounts import mounted

            held.enter_context(mounted(bundle.mounts, path))
        if not path.is_dir():
            what = f"$.root.path is {root.get('path')!r}: it must be a directory"
            raise RuntimeFault(f"{bundle.path / 'config.json'}: {what}")
        for mount in spec.get("mounts", ()):
            if mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options", ())):
                mount["source"] = str(bundle.path / mount["source"])
        fixed = bool(root.get("readonly")) or any("ro" in each["options"] for each in bundle.mounts)
        return Prepared(spec, DirectoryRoot(path, fixed), LayeredTree([path]), "", held.pop_all().close)


def _opened(reference: str) -> ImageHandle:
    from kata_lab.oci import ensure_busybox, open_image

    if reference in LOCAL_IMAGE:
        return ensure_busybox()
    return open_image(reference)


def exec_process(spec: Mapping[str, Any], tree: LayeredTree | None, wish: Mapping[str, Any]) -> dict[str, Any]:
    """The process of an exec: the container's own, but for what is wished.

    Args:
        spec: the container's configuration.
        tree: its files, for names of users.
        wish: ``args``, and any of ``env`` (more variables), ``user``, ``cwd`` and ``tty``.

    Raises:
        KataLabError: there is no such user.
    """
    process = json.loads(json.dumps(spec["process"]))
    process["args"] = list(wish["args"])
    process["terminal"] = bool(wish.get("tty"))
    process.pop("consoleSize", None)
    variables = dict(each.split("=", 1) for each in process.get("env", ()))
    if process["terminal"]:
        variables.setdefault("TERM", "xterm")
    variables.update(each.split("=", 1) for each in wish.get("env", ()))
    if wish.get("user"):
        from kata_lab.oci.accounts import resolve_user

        if tree is None:
            raise RuntimeFault(f"the user {wish['user']!r} cannot be looked up in this container: give numbers")
        account = resolve_user(wish["user"], tree)
        process["user"] = {"uid": account.uid, "gid": account.gid, "additionalGids": list(account.groups)}
        capabilities = process.get("capabilities", {})
        held = capabilities.get("bounding", []) if account.uid == 0 else []
        process["capabilities"] = {**capabilities, "effective": list(held), "permitted": list(held)}
        if "HOME" not in {each.split("=", 1)[0] for each in wish.get("env", ())}:
            variables["HOME"] = account.home
    process["env"] = [f"{name}={value}" for name, value in variables.items()]
    if wish.get("cwd"):
        process["cwd"] = wish["cwd"]
    return cast("dict[str, Any]", process)
