"""Users and groups of a container: what ``-u`` or an image's ``User`` means in its own /etc/passwd and /etc/group.

Follows passwd(5), group(5), and config.md of the OCI image specification 1.1: ``user``, ``uid``, each alone or with
``:group`` or ``:gid``. A number need not be in the files. Without a group it is the one that passwd names, else root's,
and the groups that list the user come with it. Lines that have not the form are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

from kata_lab.oci.layered import LayeredTree
from kata_lab.oci.shape import nearest
from kata_lab.oci.spec import LARGEST_ID, SpecError

PASSWD = "etc/passwd"
GROUP = "etc/group"
LARGEST_FILE = 4 << 20


@dataclass(frozen=True)
class Account:
    """Who a process runs as. `home` is ``/`` when passwd does not say; `groups` are the additional ones, sorted."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True)
class _User:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def resolve_user(wanted: str, root: LayeredTree) -> Account:
    """Who ``name|uid[:group|gid]`` is in a root file system; empty is root.

    Raises:
        SpecError: no such name, or a number that is none of a user or group.
    """
    user_text, colon, group_text = (wanted or "0").partition(":")
    if not user_text or (colon and not group_text):
        raise SpecError(f"the user {wanted!r} is no user: it must be like 1000, nobody, 1000:100 or nobody:users")
    users, groups = _users(root), _groups(root)
    number = _number(user_text, "user")
    user = next(
        (each for each in users if (each.uid == number if number is not None else each.name == user_text)), None
    )
    if user is None and number is None:
        names = [each.name for each in users]
        raise SpecError(
            f"there is no user {user_text!r} in the image's /etc/passwd: "
            f"{nearest(user_text, names) if names else 'give a number'}"
        )
    if user is None:
        assert number is not None
        user = _User("", number, 0, "/")
    if group_text:
        return Account(user.uid, _group(group_text, groups), (), user.home)
    own = {each.gid for each in groups if user.name and user.name in each.members}
    return Account(user.uid, user.gid, tuple(sorted(own - {user.gid})), user.home)


def _group(text: str, groups: list[_Group]) -> int:
    number = _number(text, "group")
    if number is not None:
        return number
    for each in groups:
        if each.name == text:
            return each.gid
    names = [each.name for each in groups]
    raise SpecError(
        f"there is no group {text!r} in the image's /etc/group: {nearest(text, names) if names else 'give a number'}"
    )


def _number(text: str, what: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > 10 or int(text) > LARGEST_ID:
        raise SpecError(f"the {what} {text[:40]} is too large: it must be from 0 to {LARGEST_ID}")
    return int(text)


def _users(root: LayeredTree) -> list[_User]:
    found = []
    for fields in _lines(root, PASSWD):
        if len(fields) >= 6 and _is_id(fields[2]) and _is_id(fields[3]):
            home = fields[5] if fields[5].startswith("/") else "/"
            found.append(_User(fields[0], int(fields[2]), int(fields[3]), home))
    return found


def _groups(root: LayeredTree) -> list[_Group]:
    return [
        _Group(fields[0], int(fields[2]), tuple(fields[3].split(",")))
        for fields in _lines(root, GROUP)
        if len(fields) >= 4 and _is_id(fields[2])
    ]


def _lines(root: LayeredTree, path: str) -> list[list[str]]:
    text = (root.read(path, LARGEST_FILE) or b"").decode("utf-8", "replace")
    return [line.split(":") for line in text.splitlines() if line and not line.startswith("#")]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= LARGEST_ID
