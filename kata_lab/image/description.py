"""What a guest operating system is to be: its description in JSON, checked before anything is downloaded.

The form is ``image.schema.json`` beside the descriptions (JSON Schema, draft 2020-12); this module adds what a schema
cannot say: names that must be told apart, names that must exist, and an order of services that can be kept. Every
refusal names the place as a JSON path (``$.services[2].restart``) and what was probably meant. Whether a package or a
module exists is found out by :mod:`kata_lab.image.build`, which knows the archive.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from kata_lab.errors import ImageError
from kata_lab.image.boot import APPEND
from kata_lab.paths import cache_directory

Format = Literal["initramfs", "erofs", "ext4"]

_SCHEMA = "image.schema.json"
_ENDING = ".json"
_LOCK_ENDING = ".lock.json"
_TYPES = {
    "object": "an object {…}",
    "array": "a list […]",
    "string": "a text",
    "integer": "a whole number",
    "boolean": "true or false",
}


class DescriptionError(ImageError):
    """What a description says cannot be; the message has the place and what would be right."""


@dataclass(frozen=True)
class FileSpec:
    """A file of one's own: a text, the target of a link, or (both None) a directory; ``mode`` is permission bits."""

    path: str
    text: str | None = None
    link: str | None = None
    mode: int | None = None


@dataclass(frozen=True)
class User:
    """An account, as passwd(5) has it."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str


@dataclass(frozen=True)
class Service:
    """What is started at boot; see ``image.schema.json``."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    restart: Literal["no", "on-failure", "always"] = "no"
    once: bool = False
    console: bool = False


@dataclass(frozen=True)
class Description:
    """A description that passed every check. Paths begin with ``/``; ``services`` are in the order of their start.

    ``data`` is the JSON that it came from, ``origin`` the file's name, or what else to call it in messages.
    """

    name: str
    summary: str
    suite: str
    architecture: str
    kernel_package: str
    modules: tuple[str, ...]
    modules_on_demand: tuple[str, ...]
    command_line: str
    packages: tuple[str, ...]
    excluded_packages: tuple[str, ...]
    excluded_libraries: tuple[str, ...]
    excluded_paths: tuple[str, ...]
    files: tuple[FileSpec, ...]
    links: tuple[tuple[str, tuple[str, ...]], ...]
    users: tuple[User, ...]
    init: Literal["kata-lab", "systemd"]
    agent: bool
    services: tuple[Service, ...]
    format: Format
    writable: tuple[str, ...]
    data: dict[str, Any]
    origin: str

    @property
    def sha256(self) -> str:
        """Of what it says, in hexadecimal; spelling, order of fields and white space do not matter."""
        return _digest(self.data)

    @property
    def package_inputs(self) -> str:
        """Of what decides which packages come in, in hexadecimal; a lock holds for as long as this stays the same."""
        return _digest(
            [self.suite, self.architecture, self.kernel_package, sorted(self.packages), sorted(self.excluded_packages)]
        )

    def refusal(self, path: str, problem: str) -> DescriptionError:
        """The error that says what is wrong at a JSON path."""
        return DescriptionError(f"{self.origin}: {path}: {problem}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or else all of a few."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if 0 < len(names) <= 30:
        return f"it is one of {', '.join(names)}"
    return "check its spelling"


def descriptions() -> dict[str, Path]:
    """The descriptions that come with Kata Lab, by name."""
    directory = Path(__file__).parent / "descriptions"
    names = (path for path in directory.glob(f"*{_ENDING}") if path.name != _SCHEMA)
    return {path.name.removesuffix(_ENDING): path for path in sorted(names) if not path.name.endswith(_LOCK_ENDING)}


def find_description(name: str) -> Path:
    """The file of a description: one of Kata Lab's by name, or a path (with a ``/`` or ending in ``.json``).

    Raises:
        DescriptionError: there is no such description.
    """
    if "/" in name or name.endswith(_ENDING):
        path = Path(name)
        if not path.is_file():
            raise DescriptionError(f"there is no image description {name!r}: name a JSON file, or one of {_known()}")
        return path
    known = descriptions()
    if name not in known:
        raise DescriptionError(f"there is no image {name!r}: {did_you_mean(name, known)}")
    return known[name]


def load_description(path: Path) -> Description:
    """Read and check a description.

    Raises:
        DescriptionError: not readable, no JSON, a field given twice, or anything that parse_description() refuses.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DescriptionError(f"the image description {path} cannot be read ({error})") from error
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise DescriptionError(f"{path} is not valid JSON: {error}") from error
    return parse_description(data, path.name)


def parse_description(data: Any, origin: str = "image description") -> Description:
    """Check plain data.

    Raises:
        DescriptionError: an unknown field, a wrong type or value, a name given twice, an unknown service, a cycle of
            services; with the JSON path and a suggestion.
    """
    _check_schema(data, origin)
    base, kernel, root = data["base"], data["kernel"], data.get("root", {})
    exclude = data.get("exclude", {})
    services = [
        Service(
            name=each["name"],
            command=tuple(each["command"]),
            after=tuple(each.get("after", ())),
            restart=each.get("restart", "no"),
            once=each.get("once", False),
            console=each.get("console", False),
        )
        for each in data.get("services", ())
    ]
    kind: Format = root.get("format", "initramfs")
    description = Description(
        name=data["name"],
        summary=data.get("summary", ""),
        suite=base["suite"],
        architecture=base["architecture"],
        kernel_package=kernel["package"],
        modules=_module_names(kernel, "modules"),
        modules_on_demand=_module_names(kernel, "modules_on_demand"),
        command_line=kernel.get("command_line", APPEND),
        packages=tuple(data["packages"]),
        excluded_packages=tuple(exclude.get("packages", ())),
        excluded_libraries=tuple(exclude.get("libraries", ())),
        excluded_paths=tuple(exclude.get("paths", ())),
        files=tuple(_file(path, each) for path, each in data.get("files", {}).items()),
        links=tuple((path, tuple(names)) for path, names in data.get("links", {}).items()),
        users=tuple(_user(each) for each in data.get("users", ())),
        init=data.get("init", "kata-lab"),
        agent=data.get("agent", False),
        services=tuple(services),
        format=kind,
        writable=tuple(root.get("writable", () if kind == "initramfs" else ("/etc", "/var"))),
        data=data,
        origin=origin,
    )
    _check_meaning(description)
    return _in_order(description)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _known() -> str:
    return ", ".join(descriptions())


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice in one object")
    return found


def _file(path: str, data: dict[str, Any]) -> FileSpec:
    mode = int(data["mode"], 8) if "mode" in data else None
    return FileSpec(path, data.get("text"), data.get("link"), mode)


def _module_names(kernel: dict[str, Any], field: str) -> tuple[str, ...]:
    return tuple(name.replace("-", "_") for name in kernel.get(field, ()))


def _user(data: dict[str, Any]) -> User:
    home, shell = data.get("home", f"/home/{data['name']}"), data.get("shell", "/bin/sh")
    return User(data["name"], data["uid"], data.get("gid", data["uid"]), home, shell)


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(_schema_text()))


@cache
def _schema_text() -> str:
    return (Path(__file__).parent / "descriptions" / _SCHEMA).read_text("utf-8")


def _check_schema(data: Any, origin: str) -> None:
    # What passed once passes again: loading the validator takes longer than starting a sandbox.
    passed = cache_directory() / "descriptions" / f"{_digest([_schema_text(), data])}.passed"
    if not passed.exists():
        _validate(data, origin)
        with contextlib.suppress(OSError):
            passed.parent.mkdir(exist_ok=True)
            passed.touch()


def _validate(data: Any, origin: str) -> None:
    found = sorted(_validator().iter_errors(data), key=lambda error: (len(error.absolute_path), error.json_path))
    if found:
        error = found[0]
        raise DescriptionError(f"{origin}: {error.json_path}: {_explain(error)}")


def _explain(error: Any) -> str:
    """One complaint of the schema, as what is wrong and what would be right."""
    value, wanted = error.instance, error.validator_value
    match error.validator:
        case "additionalProperties":
            known = error.schema["properties"]
            unknown = next(name for name in value if name not in known)
            return f"the field {unknown!r} is unknown: {did_you_mean(unknown, known)}"
        case "required":
            missing = next(name for name in wanted if name not in value)
            return f"the field {missing!r} is missing"
        case "type":
            return f"{_short(value)} should be {_TYPES.get(wanted, wanted)}"
        case "enum":
            return f"{_short(value)} is unknown: {did_you_mean(str(value), [str(each) for each in wanted])}"
        case "pattern":
            return f"{_short(value)} does not have the form {wanted}"
        case "uniqueItems":
            twice = next(each for each in value if value.count(each) > 1)
            return f"{_short(twice)} is given twice"
    return str(error.message)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _check_meaning(description: Description) -> None:
    _refuse_twice(description, "$.services[{}].name", [each.name for each in description.services])
    _refuse_twice(description, "$.users[{}].name", [each.name for each in description.users])
    _refuse_twice(description, "$.users[{}].uid", [str(each.uid) for each in description.users])
    for place, package in enumerate(description.excluded_packages):
        if package in description.packages:
            problem = f"{package!r} is in $.packages too: take it out of one of them"
            raise description.refusal(f"$.exclude.packages[{place}]", problem)
    for spec in description.files:
        path = f"$.files[{json.dumps(spec.path)}]"
        _check_path(description, path, spec.path)
        given = description.data["files"][spec.path]
        if len(given.keys() & {"text", "link", "directory"}) != 1:
            raise description.refusal(path, "it must have exactly one of 'text', 'link' and 'directory'")
    for target, names in description.links:
        path = f"$.links[{json.dumps(target)}]"
        for name in (target, *names):
            _check_path(description, path, name)
    for place, name in enumerate(description.writable):
        _check_path(description, f"$.root.writable[{place}]", name)


def _check_path(description: Description, path: str, name: str) -> None:
    if any(part in ("", ".", "..") for part in name[1:].split("/")):
        raise description.refusal(path, f"{name!r} is no plain path: it must have no empty, '.' or '..' parts")


def _refuse_twice(description: Description, path: str, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise description.refusal(path.format(place), f"{name!r} is given twice: each must be different")


def _in_order(description: Description) -> Description:
    """The same with services in the order of their start: as listed, but none before what it comes after."""
    from dataclasses import replace

    services = {each.name: each for each in description.services}
    places = {name: place for place, name in enumerate(services)}
    for name, service in services.items():
        for number, earlier in enumerate(service.after):
            if earlier not in services:
                path = f"$.services[{places[name]}].after[{number}]"
                others = (each for each in services if each != name)
                raise description.refusal(path, f"there is no service {earlier!r}: {did_you_mean(earlier, others)}")
    ordered: list[Service] = []
    begun: list[str] = []

    def visit(name: str) -> None:
        if services[name] in ordered:
            return
        if name in begun:
            cycle = " → ".join([*begun[begun.index(name) :], name])
            problem = f"services wait for each other in a circle ({cycle}): take one of these out"
            raise description.refusal(f"$.services[{places[begun[-1]]}].after", problem)
        begun.append(name)
        for earlier in services[name].after:
            visit(earlier)
        begun.pop()
        ordered.append(services[name])

    for name in services:
        visit(name)
    return replace(description, services=tuple(ordered))
