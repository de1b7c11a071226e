"""The capstone's bench: a design of a sandbox is built, run in a process of its own, and measured.

A design is plain data: the guest (the name of an image, or a description as in notebook 2), fields of
:class:`~kata_lab.runtime.config.SandboxConfig`, and wishes for two containers. They run the pod of the job
(:mod:`kata_lab.lab.capstone_probe`): ``web`` takes orders, ``cook`` carries them out. What is counted does not depend
on how fast this machine is or what runs beside: instructions of the guest, bytes, vCPUs. Seconds are told besides.
What cannot be built or started is a result too, with the reason.
"""

from __future__ import annotations

import copy
import json
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.hypervisor import HYPERVISORS
from kata_lab.lab.image_workshop import PREFIX
from kata_lab.lab.machines import LabError
from kata_lab.progress import Progress, ProgressMode

if TYPE_CHECKING:
    from kata_lab.image.description import Description
    from kata_lab.image.library import Image

PROBE: Final = "kata_lab.lab.capstone_probe"
PARTS: Final = ("guest", "sandbox", "web", "cook")
CONTAINERS: Final = ("web", "cook")
NUMBERS: Final = ("vcpus", "memory_mib", "max_vcpus", "max_memory_mib")
FIELDS: Final = (*NUMBERS, "rootfs", "images", "hypervisor", "append")
WISHES: Final = ("cpus", "memory", "pids", "read_only", "user")
_STEPS: Final = ("guest", "sandbox", "pod", "first answer", "memory")
_DEFAULT_MIB: Final = 256  #: of a sandbox whose design does not say


@dataclass(frozen=True, slots=True)
class Inside:
    """What one container told of itself and its guest.

    Attributes:
        limit: bytes of memory that it may use; None for no limit.
        used: bytes of memory that it uses.
        available: bytes of memory that the guest could still give.
        cpus: processors of the guest.
        out_of_memory: a process of it was ended since it was at its limit.
    """

    limit: int | None
    used: int
    available: int
    cpus: int
    out_of_memory: bool

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Inside:
        """Of the probe's answer."""
        limit = None if told["limit"] == "max" else int(told["limit"])
        available = int(told["available"].removesuffix("kB")) << 10
        return cls(limit, int(told["used"]), available, int(told["cpus"]), bool(told["out of memory"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What became of a design.

    Attributes:
        design: as it was then.
        failed: why it did not come so far; "" if it did, and else what follows may be empty.
        consoles: services of the guest that somebody at its console talks to.
        rest_vcpus: vCPUs before the pod came.
        order: what was ordered.
        answer: what the pod said.
        instructions: that the guest retired until then; None if the VMM does not tell.
        seconds: from the guest's first instruction until then.
        inside: of each container.
        guest_bytes: of the host's memory that the guest's takes.
        beside_bytes: memory of all processes beside that: heaps and stacks.
        processes: that the sandbox consists of.
        disk_bytes: that the sandbox takes of the host's disk.
        timeline: what happened when, in seconds.
    """

    design: Mapping[str, Any]
    failed: str = ""
    consoles: tuple[str, ...] = ()
    rest_vcpus: int = 0
    order: str = ""
    answer: str = ""
    instructions: int | None = None
    seconds: float = 0.0
    inside: Mapping[str, Inside] = field(default_factory=dict)
    guest_bytes: int = 0
    beside_bytes: int = 0
    processes: tuple[str, ...] = ()
    disk_bytes: int = 0
    timeline: tuple[tuple[str, float], ...] = ()

    @property
    def most_mib(self) -> int:
        """Memory that the guest can ever have."""
        return most_mib(self.design)

    def __repr__(self) -> str:
        if self.failed:
            return f"not measured: {self.failed}"
        return f"answered {self.answer!r} after {self.seconds:.1f} s; score_card() has the numbers"


def most_mib(design: Mapping[str, Any]) -> int:
    """Memory that the guest of a design can ever have."""
    sandbox = design["sandbox"]
    return max(sandbox.get("memory_mib") or _DEFAULT_MIB, sandbox.get("max_memory_mib") or 0)


def problem_of(design: Any) -> str:
    """What a design lacks to be tried at all, "" if nothing."""
    if not isinstance(design, Mapping) or set(design) != set(PARTS):
        return f"a design is a dictionary with {', '.join(PARTS)}, no more and no fewer"
    if not isinstance(design["guest"], (str, Mapping)):
        return f"the guest is {design['guest']!r}, it must be the name of an image or a description of one"
    for part, known in (("sandbox", FIELDS), ("web", WISHES), ("cook", WISHES)):
        if not isinstance(design[part], Mapping):
            return f"{part!r} is {design[part]!r}, it must be a dictionary"
        if unknown := [name for name in design[part] if name not in known]:
            return f"{part!r} has a field {unknown[0]!r}, which is none of {', '.join(known)}"
    for name in NUMBERS:
        number = design["sandbox"].get(name)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            return f"{name} is {number!r}, it must be a whole number above 0"
    arrangement = design["sandbox"].get("hypervisor", "fused")
    if arrangement not in HYPERVISORS:
        return f"hypervisor is {arrangement!r}, it must be one of {', '.join(HYPERVISORS)}"
    return ""


class DesignBench:
    """Measures designs, and owns the guests that are built for them; close it in the end.

    Args:
        progress: how to show what is going on.
    """

    def __init__(self, progress: ProgressMode = "auto") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kata-lab-capstone-")
        self._progress: ProgressMode = progress
        self._built: set[str] = set()
        #: All that was measured, the oldest first.
        self.history: list[Measured] = []

    def measure(self, design: Mapping[str, Any]) -> Measured:
        """Build it, run it, and measure it; some seconds. May be interrupted: nothing is left running.

        Raises:
            LabError: it is no design.
        """
        if problem := problem_of(design):
            raise LabError(problem)
        kept = copy.deepcopy(dict(design))
        try:
            measured = self._measure(kept)
        except KataLabError as error:
            measured = Measured(design=kept, failed=str(error))
        self.history.append(measured)
        return measured

    def _measure(self, design: dict[str, Any]) -> Measured:
        from kata_lab.bench.fused_account import Memory
        from kata_lab.bench.fused_runtime import RuntimeProcess

        sandbox = dict(design["sandbox"])
        arrangement = sandbox.pop("hypervisor", "fused")
        order = secrets.token_hex(4)
        with Progress("Measuring the design", total=len(_STEPS), mode=self._progress) as bar:
            image, name = self._guest(design["guest"])
            bar.advance(1, _STEPS[0])
            with RuntimeProcess(arrangement, PROBE) as runtime:
                runtime.ask("start", **sandbox, image=name)
                bar.advance(1, _STEPS[1])
                pod = runtime.ask("pod", **{each: design[each] for each in CONTAINERS})
                if pod["failed"]:
                    raise LabError(f"the pod did not come up: {pod['failed']}")
                bar.advance(1, _STEPS[2])
                request = runtime.ask("request", dish=order)
                bar.advance(1, _STEPS[3])
                told = runtime.ask("containers")
                parts = runtime.parts
                memory = Memory.of(parts, most_mib(design) << 20)
                bar.advance(1, _STEPS[4])
        return Measured(
            design=design,
            consoles=_consoles(image),
            rest_vcpus=pod["vcpus"],
            order=order,
            answer=request["answer"],
            instructions=request["instructions"],
            seconds=request["seconds"],
            inside={each: Inside.of(said) for each, said in told["containers"].items()},
            guest_bytes=memory.kinds["guest"],
            beside_bytes=memory.kinds["anonymous"],
            processes=tuple(part.name for part in parts),
            disk_bytes=request["disk"],
            timeline=tuple((what, at) for what, at in told["timeline"]),
        )

    def _guest(self, guest: str | Mapping[str, Any]) -> tuple[Image, str]:
        """The image, built if need be, and what a sandbox calls it."""
        from kata_lab.image.build import build_named
        from kata_lab.image.description import parse_description

        if isinstance(guest, str):
            name = guest
        else:
            description = parse_description(copy.deepcopy(dict(guest)), "the guest")
            _check_guest(description)
            name = self._written(description)
            self._built.add(description.name)
        return build_named(name, progress=self._progress), name

    def _written(self, description: Description) -> str:
        """The file of a description, and beside it the lock of lifsea, which holds if the packages are the same."""
        from kata_lab.image.description import find_description
        from kata_lab.image.lock import lock_path, read_lock, write_lock

        place = Path(self._directory.name) / f"{description.name}.json"
        place.write_text(json.dumps(description.data))
        if (lock := read_lock(lock_path(find_description("lifsea")))) is not None and not lock_path(place).exists():
            write_lock(lock_path(place), lock)
        return str(place)

    def close(self) -> None:
        """Remove the guests that were built here. A second call does nothing."""
        from kata_lab.image.library import Library

        library = Library()
        for name in self._built & set(library.names()):
            library.remove(name)
        self._built.clear()
        self._directory.cleanup()


def _check_guest(description: Description) -> None:
    """Refuse what would only be found out by waiting for an agent that never comes."""
    if not description.name.startswith(PREFIX):
        raise LabError(f"the guest is called {description.name!r}: a guest of your own begins with {PREFIX!r}")
    if description.format != "initramfs":
        raise LabError(f"the guest's root.format is {description.format!r}: that of a sandbox is an initramfs")
    if not description.agent or not any(each.name == "agent" for each in description.services):
        raise LabError("the guest has no agent: nobody would answer the runtime, so leave `agent` and its service in")


def _consoles(image: Image) -> tuple[str, ...]:
    described = image.manifest["description"].get("services", ())
    return tuple(each["name"] for each in described if each.get("console"))
